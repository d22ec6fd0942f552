"""Lowering of `rope`."""

from __future__ import annotations

import numpy as np
import onnx_ir as onnx

from moec.backends.onnxruntime.backend import backend
from moec.backends.onnxruntime.emit import Emitter
from moec.ir import Node


@backend.lowers("rope.apply")
def rope(e: Emitter, node: Node) -> onnx.Value:
    """Split, rotate, join: RotaryEmbedding would need its tables per batch row, not broadcast."""
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
