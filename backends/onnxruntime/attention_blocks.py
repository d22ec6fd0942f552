"""Causal attention in blocks of queries, each with the keys that it may see: nearly half of the products and of the
softmax fall away, and the scores of a block stay in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as onnx
import sympy

from moec.backends.onnxruntime.emit import Emitter
from moec.backends.onnxruntime.sizes import at_least
from moec.backends.onnxruntime.types import onnx_type
from moec.ir import Dim, DType
from moec.ir.dims import ceil_div, size

SHORTEST = 64  # queries; fewer are one block
BLOCKS = 4


@dataclass(frozen=True, eq=False)
class Causal:
    """Attention of q [B, H, S, D] to k, v [B, Hkv, T, …], or of q [B, S, H·D] to k, v [B, T, …], query i to keys up to
    i + T − S. `mask`: bool [..., S, T], causal already, or None; `axis`: the sequence's; `sizes`: of q, k, v the
    heads and the width of the last axis; `attrs`: of Attention."""

    q: onnx.Value
    k: onnx.Value
    v: onnx.Value
    mask: onnx.Value | None
    s: int | Dim
    t: int | Dim
    axis: int
    sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    attrs: dict[str, Any]

    def emit(self, e: Emitter, whole: Any) -> onnx.Value:
        """`whole()` emits it as one operator."""
        if isinstance(self.s, int) and self.s <= SHORTEST:
            return whole()
        bounds = self._bounds()
        for n in {n for block in bounds for n in block}:  # outside of the branches
            e.sizes.one(n)
        if isinstance(self.s, int):
            return self._blocks(e, bounds)
        long = ("long", self.s)
        if long not in e.memo:
            e.memo[long] = e.op("Greater", e.sizes.one(self.s), np.array([SHORTEST]))
        return e.either(e.memo[long], lambda: self._blocks(e, bounds), whole, DType.F32)

    def _bounds(self) -> list[tuple[int | Dim, int | Dim, int | Dim]]:
        """Of each block its first query, the one after its last, and how many keys it sees; none is empty where there
        are more than SHORTEST queries."""
        rows, more = ceil_div(self.s, BLOCKS), self.t - self.s
        ends = [*(rows * i for i in range(1, BLOCKS)), self.s]
        starts = [0, *ends[:-1]]
        seen = [end + more if at_least(self.t, self.s) else _positive(end + more) for end in ends[:-1]]
        return list(zip(starts, ends, [*seen, self.t], strict=True))

    def _blocks(self, e: Emitter, bounds: list[tuple[int | Dim, int | Dim, int | Dim]]) -> onnx.Value:
        parts = []
        for start, end, seen in bounds:
            q = self._part(e, self.q, start, end, self.sizes[0])
            k, v = (
                x if seen == self.t else self._part(e, x, 0, seen, sizes)
                for x, sizes in zip((self.k, self.v), self.sizes[1:], strict=True)
            )
            parts.append(e.op("Attention", q, k, v, self._mask(e, start, end, seen), **self.attrs))
        return e.op("Concat", *parts, axis=self.axis)

    def _mask(self, e: Emitter, start: int | Dim, end: int | Dim, seen: int | Dim) -> onnx.Value:
        if self.mask is not None:
            begin, until = e.sizes.vector((start, 0)), e.sizes.vector((end, seen))
            return e.op("Slice", self.mask, begin, until, np.array([-2, -1]))
        more = self.t - self.s
        queries = e.op("Range", e.sizes.scalar(start + more), e.sizes.scalar(end + more), np.int64(1))
        return e.op("LessOrEqual", e.sizes.range(seen), e.op("Unsqueeze", queries, np.array([1])))

    def _part(self, e: Emitter, x: onnx.Value, start: int | Dim, end: int | Dim, sizes: tuple[int, int]) -> onnx.Value:
        part = e.op("Slice", x, e.sizes.one(start), e.sizes.one(end), np.array([self.axis]))
        # shape inference takes what it does not know of them for 0
        heads, width = sizes
        part.type = onnx.TensorType(onnx_type(DType.F32))
        part.shape = onnx.Shape([None, *([heads] if self.axis == 2 else []), None, width])
        return part


def _positive(n: int | Dim) -> int | Dim:
    """At least 1: where no key may be seen, all are masked."""
    return max(n, 1) if isinstance(n, int) else size(sympy.Max(n.expr, 1))
