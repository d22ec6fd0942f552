"""Lowering of `recurrent`: the products of all rows at once, then a Loop over the steps.

ONNX Runtime's LSTM, GRU and RNN cut what goes into their activations, so that a NaN comes out as a number, and crash
without a step or a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as onnx

from moec.backends.onnxruntime.backend import backend
from moec.backends.onnxruntime.elementwise import sigmoid_of
from moec.backends.onnxruntime.emit import Emitter, given
from moec.backends.onnxruntime.linear import product
from moec.backends.onnxruntime.types import onnx_type
from moec.ir import Node, Value

Values = Sequence[onnx.Value]
# what a row has from the input [B, G·H], and the states before [B, H] → the states after
Step = Callable[[onnx.Value, Values], Values]


@backend.lowers("recurrent.lstm")
def lstm(e: Emitter, node: Node) -> Values:
    x, w, r, bias, h, c = given(node)
    dtype, recurrent = x.dtype, _transposed(e, r)

    def step(row: onnx.Value, state: Values) -> Values:
        i, f, g, o = _parts(e, e.op("Add", row, e.op("MatMul", state[0], recurrent)), 4, r)
        kept = e.op("Mul", sigmoid_of(e, f, dtype), state[1])
        memory = e.op("Add", kept, e.op("Mul", sigmoid_of(e, i, dtype), e.op("Tanh", g)))
        return e.op("Mul", sigmoid_of(e, o, dtype), e.op("Tanh", memory)), memory

    return _steps(e, node, _projected(e, x, w, bias), [h, c], step)


@backend.lowers("recurrent.gru")
def gru(e: Emitter, node: Node) -> Values:
    x, w, r, bias, r_bias, h = given(node)
    dtype, recurrent, one = x.dtype, _transposed(e, r), e.scalar(1, x.dtype)
    added = None if r_bias is None else e.value(r_bias)

    def step(row: onnx.Value, state: Values) -> Values:
        inner = e.op("MatMul", state[0], recurrent)
        inner = inner if added is None else e.op("Add", inner, added)
        a, b = _parts(e, row, 3, r), _parts(e, inner, 3, r)
        reset, update = (sigmoid_of(e, e.op("Add", a[k], b[k]), dtype) for k in (0, 1))
        new = e.op("Tanh", e.op("Add", a[2], e.op("Mul", reset, b[2])))
        return (e.op("Add", e.op("Mul", e.op("Sub", one, update), new), e.op("Mul", update, state[0])),)

    return _steps(e, node, _projected(e, x, w, bias), [h], step)


@backend.lowers("recurrent.rnn")
def rnn(e: Emitter, node: Node) -> Values:
    x, w, r, bias, h = given(node)
    recurrent, kind = _transposed(e, r), {"tanh": "Tanh", "relu": "Relu"}[node.attrs["activation"]]

    def step(row: onnx.Value, state: Values) -> Values:
        return (e.op(kind, e.op("Add", row, e.op("MatMul", state[0], recurrent))),)

    return _steps(e, node, _projected(e, x, w, bias), [h], step)


def _projected(e: Emitter, x: Value, w: Value, bias: Value | None) -> onnx.Value:
    y = product(e, e.value(x), w)
    return y if bias is None else e.op("Add", y, e.value(bias))


def _transposed(e: Emitter, r: Value) -> onnx.Value:
    return e.op("Transpose", e.value(r), perm=[1, 0])


def _parts(e: Emitter, x: onnx.Value, count: int, r: Value) -> Values:
    return e.op("Split", x, np.array([int(r.shape[1])] * count), outputs=count, axis=-1)


def _steps(e: Emitter, node: Node, rows: onnx.Value, states: Sequence[Value], step: Step) -> Values:
    """Rows [T, B, H] of the first state, and the last states."""
    x, reverse = given(node)[0], node.attrs["reverse"]
    length, type = e.sizes.scalar(x.shape[0]), onnx.TensorType(onnx_type(x.dtype))
    end = e.op("Sub", length, np.int64(1)) if reverse else None
    at = onnx.Value(name=e.unique("step"), type=onnx.TensorType(onnx.DataType.INT64), shape=onnx.Shape([]))
    going = onnx.Value(name=e.unique("going"), type=onnx.TensorType(onnx.DataType.BOOL), shape=onnx.Shape([]))
    before = [onnx.Value(name=e.unique("before"), type=type, shape=onnx.Shape([None] * 2)) for _ in states]
    with e.body() as nodes:
        row = e.op("Gather", rows, at if end is None else e.op("Sub", end, at), axis=0)
        after = step(row, before)
        seen, still = e.op("Identity", after[0]), e.op("Identity", going)
    still.type, still.shape = onnx.TensorType(onnx.DataType.BOOL), onnx.Shape([])
    for v in (seen, *after):
        v.type, v.shape = type, onnx.Shape([None] * 2)
    body = onnx.Graph([at, going, *before], [still, *after, seen], nodes=nodes, name=e.unique("each_step"))
    *last, y = e.op("Loop", length, None, *map(e.value, states), outputs=1 + len(states), body=body)
    # after no step at all, the Loop gives an axis of 0 for every size it does not know
    y = e.op("Reshape", y, e.sizes.vector(node.results[0].shape), allowzero=1)
    if reverse:
        y = e.op("Slice", y, np.array([-1]), np.array([np.iinfo(np.int64).min]), np.array([0]), np.array([-1]))
    return y, *last
