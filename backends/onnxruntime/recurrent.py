"""Lowering of `recurrent`: ONNX's LSTM, GRU and RNN, whose gates lie in another order."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as onnx
import sympy

from moec.backends.onnxruntime.backend import backend
from moec.backends.onnxruntime.emit import Emitter, given
from moec.backends.onnxruntime.sizes import at_least
from moec.backends.onnxruntime.types import carrier
from moec.ir import Dim, DType, Node, Value
from moec.ir.dims import size


def _kernels(node: Node) -> str | None:
    wide = given(node)[0].dtype is DType.F64
    return f"ONNX Runtime has no f64 kernel for {node.op}" if wide else None


@backend.lowers("recurrent.lstm", check=_kernels)
def lstm(e: Emitter, node: Node) -> tuple[onnx.Value, ...]:
    x, w, r, bias, h, c = given(node)
    return _run(e, node, "LSTM", x, [w, r], [bias, None], [h, c], gates=(0, 3, 1, 2))  # ONNX: i, o, f, c


@backend.lowers("recurrent.gru", check=_kernels)
def gru(e: Emitter, node: Node) -> tuple[onnx.Value, ...]:
    x, w, r, bias, r_bias, h = given(node)
    return _run(e, node, "GRU", x, [w, r], [bias, r_bias], [h], gates=(1, 0, 2), linear_before_reset=1)  # z, r, h


@backend.lowers("recurrent.rnn", check=_kernels)
def rnn(e: Emitter, node: Node) -> tuple[onnx.Value, ...]:
    x, w, r, bias, h = given(node)
    activation = {"tanh": "Tanh", "relu": "Relu"}[node.attrs["activation"]]
    return _run(e, node, "RNN", x, [w, r], [bias, None], [h], gates=(0,), activations=[activation])


def _run(e: Emitter, node: Node, kind: str, x: Value, weights: list[Value], biases: list[Value | None],
         states: list[Value], gates: tuple[int, ...], **attrs: Any) -> tuple[onnx.Value, ...]:  # fmt: skip
    """ONNX has a leading axis for directions: one here."""
    hidden = int(weights[1].shape[1])
    order = np.concatenate([np.arange(g * hidden, (g + 1) * hidden) for g in gates])
    first = np.array([0])

    def sorted_rows(v: onnx.Value) -> onnx.Value:
        return v if len(gates) == 1 else e.op("Gather", v, order, axis=0)

    w, r = (e.op("Unsqueeze", sorted_rows(e.value(v)), first) for v in weights)
    bias = None
    if any(b is not None for b in biases):
        nothing = e.constant(np.zeros(len(order), dtype=np.float32))
        halves = [nothing if b is None else sorted_rows(e.value(b)) for b in biases]
        bias = e.op("Unsqueeze", e.op("Concat", *halves, axis=0), first)
    sequence, start = e.value(x), [e.value(s) for s in states]
    # without a step or a batch ONNX Runtime crashes, or has states of 0: there is one more then, which is cut off
    missing = [_missing(e.sizes.resolve(n)) for n in x.shape[:2]]
    if any(missing):
        sequence = e.op("Pad", sequence, e.sizes.vector((0, 0, 0, *missing, 0)))
    if missing[1]:
        start = [e.op("Pad", s, e.sizes.vector((0, 0, missing[1], 0))) for s in start]
    start = [e.op("Unsqueeze", s, first) for s in start]
    direction = "reverse" if node.attrs["reverse"] else "forward"
    assert carrier(x.dtype) is DType.F32
    y, *last = e.op(
        kind, sequence, w, r, bias, None, *start, outputs=1 + len(states), hidden_size=hidden, direction=direction,
        **attrs,
    )  # fmt: skip
    y = e.op("Squeeze", y, np.array([1]))
    if missing[0]:
        none = e.op("Equal", e.sizes.scalar(x.shape[0]), np.int64(0))
        last = [e.op("Where", none, before, after) for before, after in zip(start, last, strict=True)]
    last = [e.op("Squeeze", s, first) for s in last]
    if any(missing):
        y = e.op("Slice", y, np.array([0, 0]), e.sizes.vector(x.shape[:2]), np.array([0, 1]))
    if missing[1]:
        last = [e.op("Slice", s, first, e.sizes.one(x.shape[1]), first) for s in last]
    return y, *last


def _missing(n: int | Dim) -> int | Dim:
    """What is missing of 1; the number 0 where nothing can be."""
    return 0 if at_least(n, 1) else size(sympy.Max(0, 1 - (n.expr if isinstance(n, Dim) else n)))
