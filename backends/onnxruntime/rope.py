"""Lowering of `rope`."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as onnx

from moec.backends.onnxruntime.backend import backend
from moec.backends.onnxruntime.emit import MICROSOFT, Emitter, given
from moec.backends.onnxruntime.types import carrier
from moec.ir import Dim, DType, Node, Value


@backend.lowers("rope.apply")
def rope(e: Emitter, node: Node) -> onnx.Value:
    """RotaryEmbedding where the angles are the same for all heads; else split, rotate, join."""
    x, cos, sin = given(node)
    tables = None if node.attrs["deinterleave"] else _tables(e, x, cos, sin)
    if tables is None:
        return _composed(e, node)
    domain, inputs, heads = tables
    shape: tuple[int | Dim, ...] = x.shape
    merged = shape if heads is None else (*shape[:2], heads * shape[3])
    attrs: dict[str, Any] = {} if heads is None else {"num_heads": heads}
    values = [e.reshape(e.value(x), shape, merged), *inputs]
    y = e.op("RotaryEmbedding", *values, domain=domain, interleaved=int(node.attrs["interleaved"]), **attrs)
    return e.reshape(y, merged, shape)


def _tables(e: Emitter, x: Value, cos: Value, sin: Value) -> tuple[str, list[Any], int | None] | None:
    """The operator's domain, its inputs after x, and the number of heads where they follow the sequence in x. None
    where it cannot be had: it rotates f32 x [B, H, S, D] or [B, S, H·D] by one table of angles per row, or for all."""
    if carrier(x.dtype) is not DType.F32 or x.type.rank != 4:
        return None
    b, *middle, half = (1,) * (4 - cos.type.rank) + tuple(cos.shape)
    if half != x.shape[3] // 2:
        return None
    if middle[0] == 1 and middle[1] == x.shape[2]:
        length, heads = x.shape[2], None
    elif middle[1] == 1 and middle[0] == x.shape[1] and isinstance(x.shape[2], int) and x.shape[2] > 0:
        length, heads = x.shape[1], x.shape[2]
    else:
        return None
    shared = b == 1
    if not shared and b != x.shape[0]:
        return None
    shape = (length, half) if shared else (b, length, half)
    key = ("angles", e.value(cos), e.value(sin), shape)
    if key not in e.memo:
        e.memo[key] = [e.reshape(e.value(t), t.shape, shape) for t in (cos, sin)]
    cos_table, sin_table = e.memo[key]
    if not shared:
        return "", [cos_table, sin_table], heads
    if not e.options.portable:  # a position to start from, for all rows
        return MICROSOFT, [np.array([0]), cos_table, sin_table], heads
    rows = e.sizes.vector((x.shape[0], length))
    place = ("positions", rows)
    if place not in e.memo:
        e.memo[place] = e.op("Expand", e.sizes.range(length), rows)
    return "", [cos_table, sin_table, e.memo[place]], heads


def _composed(e: Emitter, node: Node) -> onnx.Value:
    x, cos, sin = e.operands(node)
    half = node.result.shape[-1] // 2
    if node.attrs["interleaved"]:
        last = np.array([-1]), np.array([2])
        a = e.op("Slice", x, np.array([0]), np.array([2 * half]), *last)
        b = e.op("Slice", x, np.array([1]), np.array([2 * half]), *last)
    else:
        a, b = e.op("Split", x, np.array([half, half]), outputs=2, axis=-1)
    ra = e.op("Sub", e.op("Mul", a, cos), e.op("Mul", b, sin))
    rb = e.op("Add", e.op("Mul", b, cos), e.op("Mul", a, sin))
    if not node.attrs["interleaved"] or node.attrs["deinterleave"]:
        return e.op("Concat", ra, rb, axis=-1)
    pairs = [e.op("Unsqueeze", r, np.array([-1])) for r in (ra, rb)]
    shape = node.result.shape
    return e.reshape(e.op("Concat", *pairs, axis=-1), (*shape[:-1], half, 2), shape)
