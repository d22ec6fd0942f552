"""Lowerings of reductions, softmax, scans and sorting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as onnx

from moec.backends.onnxruntime.backend import backend
from moec.backends.onnxruntime.elementwise import order_key
from moec.backends.onnxruntime.emit import Emitter, given
from moec.backends.onnxruntime.types import NARROW_INTEGERS, onnx_type
from moec.ir import DType, Node
from moec.ir.dims import product


def wide_operand(e: Emitter, node: Node) -> tuple[onnx.Value, DType]:
    """The only operand, 8- and 16-bit integers and bools as i32."""
    (x,), dtype = e.operands(node), given(node)[0].dtype
    narrow = dtype in (*NARROW_INTEGERS, DType.BOOL)
    return (e.cast(x, dtype, DType.I32), DType.I32) if narrow else (x, dtype)


def reduce(e: Emitter, kind: str, x: onnx.Value, axes: Sequence[int], keepdim: bool) -> onnx.Value:
    return e.op(kind, x, np.array(axes, np.int64), keepdims=int(keepdim), noop_with_empty_axes=1)


def reduce_extreme(
    e: Emitter, kind: str, x: onnx.Value, axes: Sequence[int], keepdim: bool, dtype: DType
) -> onnx.Value:
    """ReduceMax or ReduceMin where NaN wins; the kernels skip NaN."""
    y = reduce(e, kind, x, axes, keepdim)
    if not dtype.is_float:
        return y
    # a sum of magnitudes is NaN where one of them is
    found = e.op("IsNaN", reduce(e, "ReduceL1", x, axes, keepdim))
    return e.op("Where", found, e.scalar(np.nan, dtype), y)


@backend.lowers("math.sum", "math.prod", "math.mean", "math.amax", "math.amin")
def reduction(e: Emitter, node: Node) -> onnx.Value:
    axes, keepdim = node.attrs["axes"], node.attrs["keepdim"]
    x, dtype = wide_operand(e, node)
    if not axes:
        return e.value(given(node)[0])
    if node.op == "math.sum":
        y = reduce(e, "ReduceSum", x, axes, keepdim)
    elif node.op == "math.prod":
        y = reduce(e, "ReduceProd", x, axes, keepdim)
    elif node.op == "math.mean":
        y = _mean(e, node, x, axes, keepdim)
    else:
        y = reduce_extreme(e, "ReduceMax" if node.op == "math.amax" else "ReduceMin", x, axes, keepdim, dtype)
    return e.cast(y, dtype, node.result.dtype)


def _mean(e: Emitter, node: Node, x: onnx.Value, axes: Sequence[int], keepdim: bool) -> onnx.Value:
    count = product([given(node)[0].shape[a] for a in axes])
    if isinstance(count, int) and count > 0:
        return reduce(e, "ReduceMean", x, axes, keepdim)
    # the mean of nothing is NaN; ReduceMean gives 0
    total = reduce(e, "ReduceSum", x, axes, keepdim)
    return e.op("Div", total, e.cast(e.sizes.scalar(count), DType.I64, node.result.dtype))


@backend.lowers("math.all", "math.any")
def logical(e: Emitter, node: Node) -> onnx.Value:
    axes, keepdim = node.attrs["axes"], node.attrs["keepdim"]
    (x,) = e.operands(node)
    if not axes:
        return x
    # all(x) = not any(not x); counting handles an empty axis
    every = node.op == "math.all"
    hits = e.op("Cast", e.op("Not", x) if every else x, to=onnx_type(DType.I64).value)
    found = e.op("Greater", reduce(e, "ReduceSum", hits, axes, keepdim), e.scalar(0, DType.I64))
    return e.op("Not", found) if every else found


@backend.lowers("math.softmax")
def softmax(e: Emitter, node: Node) -> onnx.Value:
    return e.op("Softmax", *e.operands(node), axis=node.attrs["axis"])


@backend.lowers("math.log_softmax")
def log_softmax(e: Emitter, node: Node) -> onnx.Value:
    (x,), axis, given_x = e.operands(node), node.attrs["axis"], given(node)[0]
    size = given_x.shape[axis] if given_x.type.rank else 1
    if given_x.dtype is not DType.F64 or size == 0:
        return e.op("LogSoftmax", x, axis=axis)
    # that kernel gives numbers for NaN and ∞. No maximum is taken of an empty axis
    padded = (
        x if isinstance(size, int) else e.op("Pad", x, np.array([0, 1]), e.scalar(-np.inf, DType.F64), np.array([axis]))
    )
    below = e.op("Sub", x, reduce(e, "ReduceMax", padded, (axis,), True))
    return e.op("Sub", below, e.op("Log", reduce(e, "ReduceSum", e.op("Exp", below), (axis,), True)))


@backend.lowers("math.cumsum")
def cumsum(e: Emitter, node: Node) -> onnx.Value:
    x, dtype = wide_operand(e, node)
    return e.cast(e.op("CumSum", x, np.int64(node.attrs["axis"])), dtype, node.result.dtype)


@backend.lowers("math.argmax")
def argmax(e: Emitter, node: Node) -> onnx.Value:
    x, dtype = wide_operand(e, node)
    key = order_key(e, x, dtype) if dtype.is_float else x
    return e.op("ArgMax", key, axis=node.attrs["axis"], keepdims=int(node.attrs["keepdim"]))


def sorted_indices(
    e: Emitter, x: onnx.Value, dtype: DType, count: onnx.Value, axis: int, largest: bool
) -> tuple[onnx.Value, onnx.Value]:
    """The first `count` (i64[1]) in order, (values, indices); TopK keeps the order of ties."""
    key = order_key(e, x, dtype) if dtype.is_float else x
    values, indices = e.op("TopK", key, count, outputs=2, axis=axis, largest=int(largest), sorted=1)
    return (e.op("GatherElements", x, indices, axis=axis) if dtype.is_float else values), indices


@backend.lowers("math.sort")
def sort(e: Emitter, node: Node) -> tuple[onnx.Value, ...]:
    x, dtype = wide_operand(e, node)
    axis = node.attrs["axis"]
    if given(node)[0].type.rank == 0:
        return x, e.scalar(0, DType.I64)
    count = e.sizes.one(given(node)[0].shape[axis])
    values, indices = sorted_indices(e, x, dtype, count, axis, node.attrs["descending"])
    return e.cast(values, dtype, node.results[0].dtype), indices


@backend.lowers("math.topk")
def topk(e: Emitter, node: Node) -> tuple[onnx.Value, ...]:
    x, dtype = wide_operand(e, node)
    count = e.sizes.one(node.attrs["k"])
    values, indices = sorted_indices(e, x, dtype, count, node.attrs["axis"], node.attrs["largest"])
    return e.cast(values, dtype, node.results[0].dtype), indices
