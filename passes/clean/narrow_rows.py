"""Slices before row-wise ops instead of after them: a decoder that returns the last position's logits multiplies one
row by its vocabulary, not all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.passes.rewrite import Match, Refused, Rewrite, RuleSet


def _slice(p: Any, x: Any) -> Any:
    return p.slice(x, axis=p.attr("axis"), start=p.attr("start"), end=p.attr("end"), step=p.attr("step"))


def _sliced(b: Any, m: Match, x: Any) -> Any:
    axis = m.axis % m.root.type.rank
    return b.slice(x, axis=axis, start=m.start, end=m.end, step=m.step)


def _of_rows(m: Match) -> Refused | None:
    if m.axis % m.root.type.rank == m.root.type.rank - 1:
        return m.no("the slice is of columns, not of rows")
    return None


@dataclass(frozen=True)
class NarrowLinear(Rewrite):
    """slice(linear(x, w, bias)) of rows → linear(slice(x), w, bias)"""

    def pattern(self, p: Any, x: Any, w: Any) -> Any:
        return _slice(p, p.linear_linear(x, w, p.optional("bias")))

    def when(self, m: Match) -> Refused | None:
        return _of_rows(m)

    def replace(self, b: Any, m: Match) -> Any:
        return b.linear_linear(_sliced(b, m, m.x), m.w, m.bias)


@dataclass(frozen=True)
class NarrowNorm(Rewrite):
    """slice(rms(x, w)) of rows → rms(slice(x), w)"""

    def pattern(self, p: Any, x: Any) -> Any:
        return _slice(p, p.norm_rms(x, p.optional("w"), eps=p.attr("eps")))

    def when(self, m: Match) -> Refused | None:
        return _of_rows(m)

    def replace(self, b: Any, m: Match) -> Any:
        return b.norm_rms(_sliced(b, m, m.x), m.w, eps=m.eps)


@dataclass(frozen=True)
class NarrowAddNorm(Rewrite):
    """slice(rms(x + residual, w)) of rows, where nothing else reads the sum → rms(slice(x) + slice(residual), w)"""

    def pattern(self, p: Any, x: Any, residual: Any) -> Any:
        y, _ = p.norm_add_rms(x, residual, p.optional("w"), eps=p.attr("eps"))
        return _slice(p, y)

    def when(self, m: Match) -> Refused | None:
        return _of_rows(m)

    def replace(self, b: Any, m: Match) -> Any:
        return b.norm_add_rms(_sliced(b, m, m.x), _sliced(b, m, m.residual), m.w, eps=m.eps)[0]


@dataclass(frozen=True)
class NarrowRows(RuleSet):
    """Linear layers and norms of the rows that are used."""

    rules: tuple[Rewrite, ...] = (NarrowLinear(), NarrowNorm(), NarrowAddNorm())
