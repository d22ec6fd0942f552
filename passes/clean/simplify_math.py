"""One form for functions that models write out: means, clamps, GELU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moec.passes.rewrite import Match, Refused, Rewrite
from moec.passes.rewriting.match_values import same_constant


@dataclass(frozen=True)
class MeanOfSum(Rewrite):
    """sum(x, axes) / n or · 1/n, n the number of elements that are added up → mean(x, axes)"""

    def pattern(self, p: Any, x: Any) -> Any:
        total = p.sum(x, axes=p.attr("axes"), keepdim=p.attr("keepdim"))
        return p.either(p.div(total, p.const("n")), p.mul(total, p.const("share")))

    def when(self, m: Match) -> Refused | None:
        sizes = [m.x.shape[a] for a in m.axes]
        if not all(isinstance(s, int) for s in sizes) or 0 in sizes:
            return m.no(f"the sum runs over {sizes}", at=m.x)
        n = math.prod(sizes)
        factor, want = (m.n, n) if m.get("n") is not None else (m.share, 1 / n)
        if not same_constant(factor, want, m.x.dtype):
            return m.no(f"{n} elements are added up, the factor is {factor}", at=m.x)
        return None

    def replace(self, b: Any, m: Match) -> Any:
        return b.mean(m.x, axes=m.axes, keepdim=m.keepdim)


@dataclass(frozen=True)
class MinToClamp(Rewrite):
    """min(x, number) → clamp(x, high)"""

    def pattern(self, p: Any, x: Any) -> Any:
        return p.min(x, p.const("bound"))

    def when(self, m: Match) -> Refused | None:
        return m.no("it broadcasts") if m.x.type != m.root.type else None

    def replace(self, b: Any, m: Match) -> Any:
        return b.clamp(m.x, high=m.bound)


@dataclass(frozen=True)
class MaxToClamp(Rewrite):
    """max(x, number) → clamp(x, low)"""

    def pattern(self, p: Any, x: Any) -> Any:
        return p.max(x, p.const("bound"))

    def when(self, m: Match) -> Refused | None:
        return m.no("it broadcasts") if m.x.type != m.root.type else None

    def replace(self, b: Any, m: Match) -> Any:
        return b.clamp(m.x, low=m.bound)


@dataclass(frozen=True)
class ClampOfClamp(Rewrite):
    """clamp(clamp(x, low), high), in either order → clamp(x, low, high)"""

    def pattern(self, p: Any, x: Any) -> Any:
        inner = p.clamp(x, low=p.attr("inner_low"), high=p.attr("inner_high"))
        return p.clamp(inner, low=p.attr("low"), high=p.attr("high"))

    def when(self, m: Match) -> Refused | None:
        lows, highs = self._bounds(m)
        if len(lows) > 1 or len(highs) > 1:
            return m.no("both bound the same side")
        return m.no("the bounds cross: the order counts") if lows and highs and lows[0] > highs[0] else None

    @staticmethod
    def _bounds(m: Match) -> tuple[list[Any], list[Any]]:
        lows = [v for v in (m.inner_low, m.low) if v is not None]
        return lows, [v for v in (m.inner_high, m.high) if v is not None]

    def replace(self, b: Any, m: Match) -> Any:
        lows, highs = self._bounds(m)
        return b.clamp(m.x, low=lows[0] if lows else None, high=highs[0] if highs else None)


def _halved(p: Any, x: Any, shifted: Any) -> Any:
    """x · 0.5 · shifted in any order, or halved by a division."""

    def half(v: Any) -> Any:
        return p.either(p.mul(v, 0.5), p.div(v, 2.0))

    return p.either(p.mul(half(x), shifted), p.mul(x, half(shifted)), p.mul(p.mul(x, shifted), 0.5))


@dataclass(frozen=True)
class GeluErf(Rewrite):
    """0.5 · x · (1 + erf(x / √2)) → gelu(x)"""

    def pattern(self, p: Any, x: Any) -> Any:
        scaled = p.either(p.div(x, p.approx(math.sqrt(2))), p.mul(x, p.approx(math.sqrt(0.5))))
        return _halved(p, x, p.add(p.erf(scaled), 1.0))

    def replace(self, b: Any, m: Match) -> Any:
        return b.gelu(m.x)


@dataclass(frozen=True)
class GeluTanh(Rewrite):
    """0.5 · x · (1 + tanh(√(2/π) · (x + 0.044715 · x³))) → gelu(x) with approximate="tanh" (Hendrycks & Gimpel 2016)"""

    def pattern(self, p: Any, x: Any) -> Any:
        cube = p.either(p.pow(x, 3.0), p.mul(p.mul(x, x), x))
        c, root = p.approx(0.044715), p.approx(math.sqrt(2 / math.pi))
        whole = p.mul(p.add(x, p.mul(cube, c)), root)
        # x · √(2/π) · (1 + 0.044715 · x · x)
        inside = p.add(p.either(p.mul(p.mul(x, c), x), p.mul(p.mul(x, x), c)), 1.0)
        factored = p.mul(p.mul(x, root), inside)
        return _halved(p, x, p.add(p.tanh(p.either(whole, factored)), 1.0))

    def replace(self, b: Any, m: Match) -> Any:
        return b.gelu(m.x, approximate="tanh")


MATH_RULES: tuple[Rewrite, ...] = (
    MeanOfSum(),
    MinToClamp(),
    MaxToClamp(),
    ClampOfClamp(),
    GeluErf(),
    GeluTanh(),
)
