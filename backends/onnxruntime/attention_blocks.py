"""Causal attention in blocks of queries, each with the keys that it may see: nearly half of the products and of the
softmax fall away, and the scores of a block stay in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as onnx

from moec.backends.onnxruntime.emit import Emitter
from moec.backends.onnxruntime.types import onnx_type
from moec.ir import Dim, DType

SHORTEST = 64  # queries; fewer are one block
BLOCKS = 4


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
        if isinstance(self.s, int) and self.s <= SHORTEST:
            return whole()
        key = ("blocks", self.s, self.t)
        if key not in e.memo:
            e.memo[key] = self._bounds(e)
        if isinstance(self.s, int):
            return self._blocks(e, *e.memo[key])
        long = ("long", self.s)
        if long not in e.memo:
            e.memo[long] = e.op("Greater", e.sizes.one(self.s), np.array([SHORTEST]))
        with e.body() as several:
            blocks = self._blocks(e, *e.memo[key])
        with e.body() as single:
            one = whole()
        for out in (blocks, one):
            out.type = onnx.TensorType(onnx_type(DType.F32))
        return e.op(
            "If",
            e.memo[long],
            then_branch=onnx.Graph([], [blocks], nodes=several, name=e.unique("blocks")),
            else_branch=onnx.Graph([], [one], nodes=single, name=e.unique("whole")),
        )

    def _bounds(self, e: Emitter) -> tuple[onnx.Value, tuple[onnx.Value, ...], tuple[onnx.Value, ...]]:
        """How many queries the blocks have, i64[BLOCKS]; where each begins, and how many keys it sees, i64[1] each."""
        length, shift = e.sizes.one(self.s), e.sizes.one(self.t - self.s)
        rows = e.op("Div", e.op("Add", length, np.array([BLOCKS - 1])), np.array([BLOCKS]))
        ends = e.op("Min", e.op("Mul", rows, np.arange(1, BLOCKS + 1)), length)
        starts = e.op("Min", e.op("Mul", rows, np.arange(BLOCKS)), length)
        seen = e.op("Max", e.op("Add", ends, shift), np.array([1]))  # none may be seen: all are masked
        each = (e.op("Split", bounds, outputs=BLOCKS, axis=0, num_outputs=BLOCKS) for bounds in (starts, seen))
        return e.op("Sub", ends, starts), *each

    def _blocks(
        self, e: Emitter, counts: onnx.Value, starts: tuple[onnx.Value, ...], seen: tuple[onnx.Value, ...]
    ) -> onnx.Value:
        parts = []
        axis, first, shift = np.array([self.axis]), np.array([0]), e.sizes.one(self.t - self.s)
        for i, q in enumerate(e.op("Split", self.q, counts, outputs=BLOCKS, axis=self.axis)):
            k, v = (x if i == BLOCKS - 1 else e.op("Slice", x, first, seen[i], axis) for x in (self.k, self.v))
            if self.mask is not None:
                end = e.op("Add", starts[i], e.op("Slice", counts, np.array([i]), np.array([i + 1])))
                begin, until = (e.op("Concat", *pair, axis=0) for pair in ((starts[i], first), (end, seen[i])))
                mask = e.op("Slice", self.mask, begin, until, np.array([-2, -1]))
            else:
                at = e.op("Squeeze", e.op("Add", starts[i], shift), first)
                end = e.op("Add", at, e.op("Squeeze", e.op("Slice", counts, np.array([i]), np.array([i + 1])), first))
                queries = e.op("Unsqueeze", e.op("Range", at, end, np.int64(1)), np.array([1]))
                keys = e.op("Range", np.int64(0), e.op("Squeeze", seen[i], first), np.int64(1))
                mask = e.op("LessOrEqual", keys, queries)
            parts.append(e.op("Attention", q, k, v, mask, **self.attrs))
        return e.op("Concat", *parts, axis=self.axis)
