"""Gated MLPs: activation(gate) · up, from two linears, from halves or from interleaved slices of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.passes.moe.structure import with_number
from moec.passes.rewrite import Match, Refused, Rewrite, RuleSet


def _same_type(m: Match) -> Refused | None:
    if m.gate.type != m.up.type:
        return m.no(f"gate is {m.gate.type}, up is {m.up.type}", at=m.up)
    return None


@dataclass(frozen=True)
class FuseSwiGLU(Rewrite):
    """mul(silu(gate), up) → swiglu(gate, up)"""

    def pattern(self, p: Any, gate: Any, up: Any) -> Any:
        return p.mul(p.silu(gate), up)

    def when(self, m: Match) -> Refused | None:
        return _same_type(m)

    def replace(self, b: Any, m: Match) -> Any:
        return b.swiglu(m.gate, m.up)


@dataclass(frozen=True)
class FuseGeGLU(Rewrite):
    """mul(gelu(gate), up) → glu(gate, up) with activation gelu or gelu_tanh"""

    def pattern(self, p: Any, gate: Any, up: Any) -> Any:
        return p.mul(p.gelu(gate, approximate=p.attr("approximate")), up)

    def when(self, m: Match) -> Refused | None:
        return _same_type(m)

    def replace(self, b: Any, m: Match) -> Any:
        return b.glu(m.gate, m.up, activation="gelu_tanh" if m.approximate == "tanh" else "gelu")


@dataclass(frozen=True)
class FuseReGLU(Rewrite):
    """mul(relu(gate), up) → glu(gate, up) with activation relu"""

    def pattern(self, p: Any, gate: Any, up: Any) -> Any:
        return p.mul(p.relu(gate), up)

    def when(self, m: Match) -> Refused | None:
        if m.up.producer is not None and m.up.producer.op == "math.relu":
            return m.no("relu on both sides is no gate", at=m.up)
        return _same_type(m)

    def replace(self, b: Any, m: Match) -> Any:
        return b.glu(m.gate, m.up, activation="relu")


@dataclass(frozen=True)
class FuseClampedSwiGLU(Rewrite):
    """g · sigmoid(alpha · g) · (u + offset) of g = clamp(gate, high), u = clamp(up, ±high) → glu with limit

    Without alpha: g · sigmoid(g), which is silu(g); without an offset it is 0.
    """

    def pattern(self, p: Any, gate: Any, up: Any) -> Any:
        g = p.clamp(gate, low=None, high=p.attr("limit"))
        u = p.clamp(up, low=p.attr("low"), high=p.attr("high"))
        unit = p.either(p.silu(g), p.mul(g, p.sigmoid(with_number(p, "math.mul", g, "alpha"))))
        return p.mul(unit, p.maybe(lambda v: with_number(p, "math.add", v, "offset"), u))

    def when(self, m: Match) -> Refused | None:
        if m.low is None or m.low != -m.high or m.high != m.limit:
            return m.no(f"gate is clamped at {m.limit}, up from {m.low} to {m.high}: no one limit", at=m.up)
        return _same_type(m)

    def replace(self, b: Any, m: Match) -> Any:
        alpha, offset = float(m.get("alpha", 1.0)), float(m.get("offset", 0.0))
        return b.glu(m.gate, m.up, limit=float(m.limit), alpha=alpha, up_offset=offset)


# the clamped form contains silu(g) · u, so it comes first
GLU_RULES: tuple[Rewrite, ...] = (FuseClampedSwiGLU(), FuseSwiGLU(), FuseGeGLU(), FuseReGLU())


@dataclass(frozen=True)
class FuseMLP(RuleSet):
    """Gated activations."""

    rules: tuple[Rewrite, ...] = GLU_RULES
