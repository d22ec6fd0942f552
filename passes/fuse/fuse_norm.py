"""RMSNorm, residual add + RMSNorm, and the pass over all norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.passes.fuse.fuse_layer_norm import LAYER_NORM_RULES
from moec.passes.rewrite import Match, Refused, Rewrite, RuleSet


@dataclass(frozen=True)
class RMSNormCore(Rewrite):
    """x · rsqrt(mean(x²) + eps) → rms(x)"""

    def pattern(self, p: Any, x: Any) -> Any:
        mean = p.mean(p.mul(x, x), axes=(-1,), keepdim=True)
        return p.mul(x, p.rsqrt(p.add(mean, p.const("eps"))))

    def replace(self, b: Any, m: Match) -> Any:
        return b.rms(m.x, eps=m.eps)


@dataclass(frozen=True)
class RMSNormCast(Rewrite):
    """cast(rms(cast(x, f32)), dtype of x) → rms(x), which computes in f32 itself"""

    def pattern(self, p: Any, x: Any) -> Any:
        return p.cast(p.rms(p.cast(x, dtype="f32"), None, eps=p.attr("eps")), dtype=p.attr("dtype"))

    def when(self, m: Match) -> Refused | None:
        if m.dtype != m.x.dtype or m.x.dtype not in ("bf16", "f16"):
            return m.no(f"x is {m.x.dtype}, the result {m.dtype}", at=m.x)
        return None

    def replace(self, b: Any, m: Match) -> Any:
        return b.rms(m.x, eps=m.eps)


@dataclass(frozen=True)
class RMSNormWeight(Rewrite):
    """rms(x) · weight → rms(x, weight)"""

    def pattern(self, p: Any, x: Any, weight: Any) -> Any:
        return p.mul(weight, p.rms(x, None, eps=p.attr("eps")))

    def when(self, m: Match) -> Refused | None:
        w, x = m.weight, m.x
        if w.shape[-1:] != x.shape[-1:] or any(s != 1 for s in w.shape[:-1]) or w.type.rank > x.type.rank:
            return m.no(f"weight {w.type} is not one number per channel", at=w)
        return None

    def replace(self, b: Any, m: Match) -> Any:
        weight = m.weight if m.weight.type.rank == 1 else b.reshape(m.weight, shape=m.weight.shape[-1:])
        return b.rms(m.x, weight, eps=m.eps)


@dataclass(frozen=True)
class AddRMSNorm(Rewrite):
    """s = x + residual; rms(s) → add_rms(x, residual), which returns both"""

    def pattern(self, p: Any, x: Any, residual: Any) -> Any:
        total = p.add(x, residual)
        return p.rms(total, p.optional("weight"), eps=p.attr("eps")), total

    def when(self, m: Match) -> Refused | None:
        if m.x.type != m.residual.type:
            return m.no(f"x is {m.x.type}, residual {m.residual.type}", at=m.residual)
        return None

    def replace(self, b: Any, m: Match) -> Any:
        return b.add_rms(m.x, m.residual, m.weight, eps=m.eps)


@dataclass(frozen=True)
class FuseNorm(RuleSet):
    """RMSNorm and LayerNorm in f32 or with casts, their weights and biases, and the residual add before an RMSNorm."""

    # a LayerNorm is also the RMSNorm of the centred value, so its rules come first
    rules: tuple[Rewrite, ...] = (*LAYER_NORM_RULES, RMSNormCore(), RMSNormCast(), RMSNormWeight(), AddRMSNorm())
