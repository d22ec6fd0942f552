"""Lowerings of `linear`."""

from __future__ import annotations

import onnx_ir as onnx

from moec.backends.onnxruntime.backend import backend
from moec.backends.onnxruntime.emit import Emitter, given
from moec.ir import Node, Value


@backend.lowers("linear.matmul")
def matmul(e: Emitter, node: Node) -> onnx.Value:
    return e.op("MatMul", *e.operands(node))


def transposed(e: Emitter, weight: Value) -> onnx.Value:
    """weight [N, K] as [K, N]: a constant is stored that way, so that MatMul packs it at load."""
    if weight.weight is None:
        return e.op("Transpose", e.value(weight), perm=[1, 0])
    n, k = weight.shape
    return e.weight(weight, ".T", (k, n), lambda t: t.T)


@backend.lowers("linear.linear")
def linear(e: Emitter, node: Node) -> onnx.Value:
    x, weight, bias = given(node)
    y = e.op("MatMul", e.value(x), transposed(e, weight))
    return y if bias is None else e.op("Add", y, e.value(bias))
