"""Lowerings of `quant`: FP8 values are carried in f32, stored weights stay FP8 or integers in the file.

A stored weight becomes DequantizeLinear with blocks along its inner axis, its 128×128 scales repeated along
the outer one; with `session.disable_quant_qdq=1` ONNX Runtime folds it to f32 at load, unless folding is off. Products
with integer weights take those as they are (see nbits), unless the model is to be portable.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as onnx
import torch

from moec.backends.onnxruntime.backend import backend
from moec.backends.onnxruntime.blocks import Blocks
from moec.backends.onnxruntime.emit import Emitter, given
from moec.ir import DType, Node, Value
from moec.ir.arrays import BYTES, as_bytes


@backend.lowers("quant.quantize")
def quantize(e: Emitter, node: Node) -> tuple[onnx.Value, ...]:
    (x,), v = e.operands(node), given(node)[0]
    blocks = Blocks.of(v.shape, node.attrs["block"])
    codes, scale = blocks.quantize(e, blocks.split(e, e.cast(x, v.dtype, DType.F32)))
    results = blocks.join(e, codes), blocks.scales(e, scale)
    # whoever dequantises both takes them before they are joined; unused nodes are removed
    e.memo[("split", *results)] = blocks, codes, scale
    return results


def dequantized(e: Emitter, codes: Value, scale: Value, block: tuple[int, int]) -> onnx.Value:
    """codes [..., R, C] · scale in f32."""
    if codes.weight is not None and scale.weight is not None:
        return stored_blocks(e, codes, scale, block, codes.shape)
    blocks, s = Blocks.of(codes.shape, block), e.value(scale)
    c = e.cast(e.value(codes), codes.dtype, DType.F32)
    memo = ("dequantized", c, s, blocks)
    if memo not in e.memo:
        known, split, spread = e.memo.get(("split", c, s), (None, None, None))
        if known != blocks:
            split, spread = blocks.split(e, c), blocks.spread(e, s)
        e.memo[memo] = blocks.join(e, e.op("Mul", split, spread))
    return e.memo[memo]


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
        t = t if rows is None else t.index_select(-2, rows)
        return t.transpose(-1, -2) if transpose else t

    def pick_codes(t: torch.Tensor) -> torch.Tensor:
        return pick(t.view(torch.uint8)).contiguous().view(t.dtype)

    out, inner = codes.shape[-2:]
    axis = len(shape) - (2 if transpose else 1)
    if e.options.mapped:  # nothing is folded at load, or it would be memory of the session's own

        def product(c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
            wide = s.repeat_interleave(block[0], dim=-2)[..., :out, :].repeat_interleave(block[1], dim=-1)
            return pick(as_bytes(c).float() * wide[..., :inner].float())

        return e.scaled(codes, scale, f"{key}.by{block[0]}x{block[1]}", shape, product, index=index)
    held = codes.dtype if codes.dtype in BYTES else None
    stored = e.stored(codes, key, shape, pick_codes, index=index, dtype=held, widened=DType.F32)
    blocks = [-(-s // block[1]) if i == axis else s for i, s in enumerate(shape)]
    # one scale may serve weights of other heights, in other blocks
    by = f"{key}.{out}by{block[0]}x{block[1]}"

    def pick_scales(t: torch.Tensor) -> torch.Tensor:
        return pick(t.repeat_interleave(block[0], dim=-2)[..., :out, :])

    scales = e.stored(scale, by, blocks, pick_scales, index=index, scales=True)
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
    y = scaled_product(e, rows, w, w_scale, block)
    y = e.cast(y, DType.F32, dtype)
    return y if bias is None else e.op("Add", y, e.value(bias))


def scaled_product(e: Emitter, x: onnx.Value, codes: Value, scale: Value, block: tuple[int, int]) -> onnx.Value:
    """f32 x [..., K] times the transpose of codes [N, K] · scale."""
    if codes.weight is None or scale.weight is None:
        return e.op("MatMul", x, e.op("Transpose", dequantized(e, codes, scale, block), perm=[1, 0]))
    n, k = codes.shape

    def some(rows: torch.Tensor | None) -> onnx.Value:
        key, count = (".T", n) if rows is None else (f".T.{int(rows[0])}", len(rows))
        return stored_blocks(e, codes, scale, block, (k, count), key=key, rows=rows, transpose=True)

    return e.product(x, (n, k), some)
