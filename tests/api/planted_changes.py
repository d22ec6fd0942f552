"""Ways to get a lowering wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as onnx

from moec.backends.onnxruntime import Emitter
from moec.ir import Node

from .planted import changed, refed, reweighted

F16, BF16, F32 = onnx.DataType.FLOAT16.value, onnx.DataType.BFLOAT16.value, onnx.DataType.FLOAT.value
LAST = np.array([-1])


def attrs(**wrong: Any) -> Any:
    """The right lowering with other attributes."""
    return lambda right, e, node: right(e, changed(node, **wrong))


def weight(name: str, change: Any) -> Any:
    """The right lowering with a weight changed."""
    return lambda right, e, node: right(e, reweighted(node, name, change))


def operand(name: str, change: Any) -> Any:
    """The right lowering with an operand changed: `change(e, value)`."""
    return lambda right, e, node: right(e, refed(e, node, name, lambda x: change(e, x)))


def without(name: str) -> Any:
    """The right lowering with an operand forgotten."""

    def wrong(right: Any, e: Emitter, node: Node) -> Any:
        copy = changed(node)
        at = list(node.opdef.named_operands(node.operands)).index(name)
        copy.operands = tuple(None if i == at else v for i, v in enumerate(node.operands))
        return right(e, copy)

    return wrong


def after(change: Any) -> Any:
    """The first result of the right lowering changed: `change(e, value)`."""

    def wrong(right: Any, e: Emitter, node: Node) -> Any:
        results = right(e, node)
        if isinstance(results, tuple):
            return change(e, results[0]), *results[1:]
        return change(e, results)

    return wrong


def through(dtype: int) -> Any:
    """Rounded to a narrower float."""
    return lambda e, x: e.op("Cast", e.op("Cast", x, to=dtype), to=F32)


def size(e: Emitter, x: onnx.Value, axis: int) -> onnx.Value:
    shape = e.op("Shape", x)
    return e.op("Gather", shape, np.int64(axis))


def positions(e: Emitter, x: onnx.Value, axis: int) -> onnx.Value:
    """0, 1, … along an axis, of the rank that broadcasts from there."""
    index = e.op("Range", np.int64(0), size(e, x, axis), np.int64(1))
    return e.op("Unsqueeze", index, np.arange(1, -axis)) if axis < -1 else index


def taken(e: Emitter, x: onnx.Value, axis: int, index: onnx.Value) -> onnx.Value:
    return e.op("Gather", x, index, axis=axis)


def shifted(axis: int, by: int = 1) -> Any:
    """Everything from the neighbour before; the first stays."""

    def change(e: Emitter, x: onnx.Value) -> onnx.Value:
        index = e.op("Range", np.int64(0), size(e, x, axis), np.int64(1))
        return taken(e, x, axis, e.op("Max", e.op("Sub", index, np.int64(by)), np.int64(0)))

    return change


def spoilt(which: Any, what: Any, axis: int) -> Any:
    """`what(e, x)` where `which(e, positions)` holds along an axis."""
    return lambda e, x: e.op("Where", which(e, positions(e, x, axis)), what(e, x), x)


def number(value: float) -> onnx.Value | Any:
    return np.float32(value)


def scaled(by: float) -> Any:
    return lambda e, x: e.op("Mul", x, number(by))
