"""Causal attention in blocks of queries, each with the keys that it may see: half of the products and of the softmax
fall away, and the scores of a block stay in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as onnx

from moec.backends.onnxruntime.emit import Emitter
from moec.backends.onnxruntime.types import onnx_type
from moec.ir import Dim, DType

SHORTEST = 64  # queries; fewer are one block
MOST = 8  # blocks of longer sequences


@dataclass(frozen=True, eq=False)
class Causal:
    """Attention of q [B, H, S, D] to k, v [B, Hkv, T, …], or of q [B, S, H·D] to k, v [B, T, …], query i to keys up to
    i + T − S. `mask`: bool [..., S, T], causal already, or None; `axis`: the sequence's; `attrs`: of Attention."""

    q: onnx.Value
    k: onnx.Value
    v: onnx.Value
    mask: onnx.Value | None
    s: int | Dim
    t: int | Dim
    axis: int
    attrs: dict[str, Any]

    def emit(self, e: Emitter, whole: Any) -> onnx.Value:
        """`whole()` emits it as one operator."""
        if isinstance(self.s, int):
            return self._blocks(e) if self.s > SHORTEST else whole()
        length = e.sizes.one(self.s)
        e.sizes.one(self.t), e.sizes.one(self.t - self.s)  # sizes are made outside of bodies
        key = ("long", self.s)
        if key not in e.memo:
            e.memo[key] = e.op("Greater", length, np.array([SHORTEST]))
        with e.body() as long:
            blocks = self._blocks(e)
        with e.body() as short:
            one = whole()
        for out in (blocks, one):
            out.type = onnx.TensorType(onnx_type(DType.F32))
        return e.op(
            "If",
            e.memo[key],
            then_branch=onnx.Graph([], [blocks], nodes=long, name=e.unique("blocks")),
            else_branch=onnx.Graph([], [one], nodes=short, name=e.unique("whole")),
        )

    def _blocks(self, e: Emitter) -> onnx.Value:
        length, shift, axis = e.sizes.one(self.s), e.sizes.one(self.t - self.s), np.array([self.axis])
        rows = e.op(
            "Max", e.op("Div", e.op("Add", length, np.array([MOST - 1])), np.array([MOST])), np.array([SHORTEST])
        )
        count = e.op("Div", e.op("Add", length, e.op("Sub", rows, np.array([1]))), rows)
        dtype = onnx_type(DType.F32)
        sequence = onnx.SequenceType(onnx.TensorType(dtype))
        step = onnx.Value(name=e.unique("step"), type=onnx.TensorType(onnx.DataType.INT64), shape=onnx.Shape([]))
        going = onnx.Value(name=e.unique("going"), type=onnx.TensorType(onnx.DataType.BOOL), shape=onnx.Shape([]))
        done = onnx.Value(name=e.unique("done"), type=sequence)
        with e.body() as nodes:
            start = e.op("Mul", step, rows)
            end = e.op("Min", e.op("Add", start, rows), length)
            seen = e.op("Max", e.op("Add", end, shift), np.array([1]))  # none may be seen: all are masked
            q = e.op("Slice", self.q, start, end, axis)
            k, v = (e.op("Slice", x, np.array([0]), seen, axis) for x in (self.k, self.v))
            y = e.op("Attention", q, k, v, self._mask(e, start, end, seen, shift), **self.attrs)
            more = e.op("SequenceInsert", done, y)
            still = e.op("Identity", going)
        more.type, still.type, still.shape = sequence, onnx.TensorType(onnx.DataType.BOOL), onnx.Shape([])
        body = onnx.Graph([step, going, done], [still, more], nodes=nodes, name=e.unique("each_block"))
        empty = e.op("SequenceEmpty", dtype=dtype.value)
        results = e.op("Loop", e.op("Squeeze", count, np.array([0])), None, empty, body=body)
        return e.op("ConcatFromSequence", results, axis=self.axis)

    def _mask(self, e: Emitter, start: onnx.Value, end: onnx.Value, seen: onnx.Value, shift: onnx.Value) -> onnx.Value:
        if self.mask is not None:
            begin = e.op("Concat", start, np.array([0]), axis=0)
            return e.op("Slice", self.mask, begin, e.op("Concat", end, seen, axis=0), np.array([-2, -1]))
        bounds = [e.op("Squeeze", e.op("Add", x, shift), np.array([0])) for x in (start, end)]
        queries = e.op("Unsqueeze", e.op("Range", *bounds, np.int64(1)), np.array([1]))
        keys = e.op("Range", np.int64(0), e.op("Squeeze", seen, np.array([0])), np.int64(1))
        return e.op("LessOrEqual", keys, queries)
