"""Constant factors combined: with each other, and with the scale of attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moec.ir import DType
from moec.passes.rewrite import Match, Refused, Rewrite, RuleSet


@dataclass(frozen=True)
class ScaleOfScale(Rewrite):
    """(x · a) · b, with / for either · → x · ab"""

    def pattern(self, p: Any, x: Any) -> Any:
        inner = p.either(p.mul(x, p.const("inner_factor")), p.div(x, p.const("inner_divisor")))
        return p.either(p.mul(inner, p.const("factor")), p.div(inner, p.const("divisor")))

    @staticmethod
    def _factor(m: Match) -> float:
        factor = 1.0
        for name in ("inner_", ""):
            times, over = m.get(f"{name}factor"), m.get(f"{name}divisor")
            factor = factor * float(times) if times is not None else factor / float(over) if over else math.nan
        return factor

    def when(self, m: Match) -> Refused | None:
        if m.x.dtype not in (DType.F32, DType.F64):
            return m.no(f"{m.x.dtype} would round the product of the constants", at=m.x)
        if not 1e-30 < abs(self._factor(m)) < 1e30:
            return m.no(f"the constants multiply to {self._factor(m)}", at=m.x)
        return None

    def replace(self, b: Any, m: Match) -> Any:
        return b.mul(m.x, self._factor(m))


@dataclass(frozen=True)
class ScaledScores(Rewrite):
    """sdpa(q · c, k, v) or sdpa(q, k · c, v) → sdpa(q, k, v) with scale · c (c > 0)"""

    def pattern(self, p: Any, q: Any, k: Any, v: Any) -> Any:
        attrs = {a: p.attr(a) for a in ("scale", "causal", "softcap")}
        rest = (v, p.optional("mask"), p.optional("sinks"))
        factor = p.const("factor")
        return p.either(p.sdpa(p.mul(q, factor), k, *rest, **attrs), p.sdpa(q, p.mul(k, factor), *rest, **attrs))

    def when(self, m: Match) -> Refused | None:
        if m.q.dtype not in (DType.F32, DType.F64):
            return m.no(f"the product is rounded to {m.q.dtype} before the scores", at=m.q)
        return None if 0 < m.factor < math.inf else m.no(f"the factor is {m.factor}")

    def replace(self, b: Any, m: Match) -> Any:
        attrs = {"scale": m.scale * float(m.factor), "causal": m.causal, "softcap": m.softcap}
        return b.sdpa(m.q, m.k, m.v, m.mask, m.sinks, **attrs)


@dataclass(frozen=True)
class FoldScalars(RuleSet):
    """Constant factors that meet become one."""

    rules: tuple[Rewrite, ...] = (ScaleOfScale(), ScaledScores())
