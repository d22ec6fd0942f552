"""Gated MLPs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.passes.rewrite import Match, Refused, Rewrite, RuleSet


@dataclass(frozen=True)
class FuseSwiGLU(Rewrite):
    """mul(silu(gate), up) → swiglu(gate, up)"""

    def pattern(self, p: Any, gate: Any, up: Any) -> Any:
        return p.mul(p.silu(gate), up)

    def when(self, m: Match) -> Refused | None:
        if m.gate.type != m.up.type:
            return m.no(f"gate is {m.gate.type}, up is {m.up.type}", at=m.up)
        return None

    def replace(self, b: Any, m: Match) -> Any:
        return b.swiglu(m.gate, m.up)


@dataclass(frozen=True)
class FuseMLP(RuleSet):
    """Gated activations."""

    rules: tuple[Rewrite, ...] = (FuseSwiGLU(),)
