"""Lowerings of `quant`: FP8 values are carried in f32, stored weights stay FP8 in the file.

A stored weight becomes DequantizeLinear with blocks along its inner axis, its 128×128 scales repeated along
the outer one; with `session.disable_quant_qdq=1` ONNX Runtime folds it to f32 at load.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as onnx
import torch

from moec.backends.onnxruntime.backend import backend
from moec.backends.onnxruntime.emit import Emitter, given
from moec.backends.onnxruntime.reduction import reduce_extreme
from moec.ir import Dim, DType, Node, Value
from moec.ir.dims import ceil_div
from moec.ir.ops.quant import E4M3_MAX

Shape = Sequence[int | Dim]


def blocked_shape(shape: Shape, block: tuple[int, int]) -> tuple[int | Dim, ...]:
    """[..., R, C] → [..., R blocks, rows, C blocks, columns]."""
    *lead, rows, columns = shape
    return (*lead, ceil_div(rows, block[0]), block[0], ceil_div(columns, block[1]), block[1])


def to_blocks(e: Emitter, x: onnx.Value, shape: Shape, block: tuple[int, int], dtype: DType) -> onnx.Value:
    """x padded with zeros to whole blocks, in the blocked shape."""
    whole = _padded(shape, block)
    if whole != tuple(shape):
        after = [w - s for w, s in zip(whole, shape, strict=True)]
        x = e.op("Pad", x, e.sizes.vector((*[0] * len(shape), *after)), e.scalar(0, dtype))
    return e.reshape(x, whole, blocked_shape(shape, block))


def from_blocks(e: Emitter, x: onnx.Value, shape: Shape, block: tuple[int, int]) -> onnx.Value:
    """The inverse of `to_blocks`."""
    whole = _padded(shape, block)
    x = e.reshape(x, blocked_shape(shape, block), whole)
    if whole == tuple(shape):
        return x
    return e.op("Slice", x, np.array([0, 0]), e.sizes.vector(shape[-2:]), np.array([-2, -1]))


def _padded(shape: Shape, block: tuple[int, int]) -> tuple[int | Dim, ...]:
    *lead, rows, columns = shape
    return (*lead, ceil_div(rows, block[0]) * block[0], ceil_div(columns, block[1]) * block[1])


def quantize_blocked(e: Emitter, x: onnx.Value) -> tuple[onnx.Value, onnx.Value]:
    """Blocked f32 → (its E4M3 values in f32, scales with the inner axes of each block kept as 1)."""
    amax = reduce_extreme(e, "ReduceMax", e.op("Abs", x), (-3, -1), True, DType.F32)
    scale = e.op("Div", amax, e.scalar(E4M3_MAX, DType.F32))
    scale = e.op("Where", e.op("Equal", scale, e.scalar(0, DType.F32)), e.scalar(1, DType.F32), scale)
    return e.round_to(e.op("Div", x, scale), DType.F8E4M3), scale


@backend.lowers("quant.quantize")
def quantize(e: Emitter, node: Node) -> tuple[onnx.Value, ...]:
    (x,), block, v = e.operands(node), node.attrs["block"], given(node)[0]
    wide = e.cast(x, v.dtype, DType.F32)
    codes, scale = quantize_blocked(e, to_blocks(e, wide, v.shape, block, DType.F32))
    return from_blocks(e, codes, v.shape, block), e.op("Squeeze", scale, np.array([-3, -1]))


def rounded(e: Emitter, x: onnx.Value, shape: Shape, group: int) -> onnx.Value:
    """f32 rows quantised per (1, group) and dequantised at once."""
    codes, scale = quantize_blocked(e, to_blocks(e, x, shape, (1, group), DType.F32))
    return from_blocks(e, e.op("Mul", codes, scale), shape, (1, group))


def dequantized(e: Emitter, codes: Value, scale: Value, block: tuple[int, int]) -> onnx.Value:
    """codes [..., R, C] · scale in f32."""
    if codes.weight is not None and scale.weight is not None:
        return stored_blocks(e, codes, scale, block, codes.shape)
    blocks = to_blocks(e, e.value(codes), codes.shape, block, DType.F32)
    wide = e.op("Unsqueeze", e.value(scale), np.array([-3, -1]))
    return from_blocks(e, e.op("Mul", blocks, wide), codes.shape, block)


def stored_blocks(
    e: Emitter,
    codes: Value,
    scale: Value,
    block: tuple[int, int],
    shape: Sequence[int],
    *,
    key: str = "",
    index: int | None = None,
    rows: torch.Tensor | None = None,
    transpose: bool = False,
) -> onnx.Value:
    """Stored codes and scales as f32 of `shape`, which is that of the codes after: taking matrix `index`
    along the first axis, taking `rows` in that order, and a transpose of the last two axes."""

    def pick(t: torch.Tensor) -> torch.Tensor:
        t = t if index is None else t[index]
        t = t if rows is None else t.index_select(-2, rows)
        return t.transpose(-1, -2) if transpose else t

    def pick_codes(t: torch.Tensor) -> torch.Tensor:
        return pick(t.view(torch.uint8)).contiguous().view(torch.float8_e4m3fn)

    out, inner = codes.shape[-2:]
    axis = len(shape) - (2 if transpose else 1)
    stored = e.stored(codes, key, shape, pick_codes)
    blocks = [-(-s // block[1]) if i == axis else s for i, s in enumerate(shape)]
    scales = e.stored(scale, f"{key}.rows", blocks, lambda t: pick(t.repeat_interleave(block[0], dim=-2)[..., :out, :]))
    memo = ("dequantized", stored.name, scales.name)
    if memo not in e.memo:
        if 0 in shape:
            e.memo[memo] = e.op("Cast", stored, to=onnx.DataType.FLOAT.value)
        else:
            e.memo[memo] = e.op("DequantizeLinear", stored, scales, axis=axis, block_size=min(block[1], int(inner)))
    return e.memo[memo]


@backend.lowers("quant.dequantize")
def dequantize(e: Emitter, node: Node) -> onnx.Value:
    codes, scale = given(node)
    return e.cast(dequantized(e, codes, scale, node.attrs["block"]), DType.F32, node.result.dtype)


@backend.lowers("quant.scaled_linear")
def scaled_linear(e: Emitter, node: Node) -> onnx.Value:
    x, x_scale, w, w_scale, bias = given(node)
    block, dtype = node.attrs["block"], node.result.dtype
    rows = dequantized(e, x, x_scale, (1, node.attrs["group"]))
    y = e.op("MatMul", rows, dequantized_transposed(e, w, w_scale, block))
    y = e.cast(y, DType.F32, dtype)
    return y if bias is None else e.op("Add", y, e.value(bias))


def dequantized_transposed(e: Emitter, codes: Value, scale: Value, block: tuple[int, int]) -> onnx.Value:
    """codes [N, K] · scale as f32 [K, N]."""
    n, k = codes.shape
    if codes.weight is not None and scale.weight is not None:
        return stored_blocks(e, codes, scale, block, (k, n), key=".T", transpose=True)
    return e.op("Transpose", dequantized(e, codes, scale, block), perm=[1, 0])
