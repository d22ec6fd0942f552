"""Attention: head sharing, and the eager form to `attention.sdpa`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.ir import Value
from moec.passes.rewrite import Match, Refused, Rewrite, RuleSet


def _repeated(m: Match, x: Value, expanded: tuple, flat: Value) -> str | None:
    """Why expand + reshape is not repeat_interleave over axis 1 of x [B, Hkv, T, D]; None where it is."""
    b, h, t, d = x.shape
    if len(expanded) != 5 or (expanded[0], expanded[1], expanded[3], expanded[4]) != (b, h, t, d):
        return f"expand to {list(expanded)} does not repeat the heads of {x.type}"
    return None if flat.shape == (b, h * expanded[2], t, d) else f"{flat.type} are not the repeated heads"


@dataclass(frozen=True)
class SharedHeads(Rewrite):
    """sdpa(q, repeat(k), repeat(v)) → sdpa(q, k, v): grouped queries share heads by themselves"""

    def pattern(self, p: Any, q: Any, k: Any, v: Any) -> Any:
        k_all = p.reshape(p.expand(p.reshape(k, shape=p.attr("k5")), shape=p.attr("k_rep")), shape=p.attr())
        v_all = p.reshape(p.expand(p.reshape(v, shape=p.attr("v5")), shape=p.attr("v_rep")), shape=p.attr())
        return p.sdpa(
            q, p.bind("k_all", k_all), p.bind("v_all", v_all), p.optional("mask"),
            scale=p.attr("scale"), causal=p.attr("causal"),
        )  # fmt: skip

    def when(self, m: Match) -> Refused | None:
        for x, five, rep, flat in ((m.k, m.k5, m.k_rep, m.k_all), (m.v, m.v5, m.v_rep, m.v_all)):
            if five != (*x.shape[:2], 1, *x.shape[2:]):
                return m.no(f"reshape to {list(five)} adds no repeat axis", at=x)
            reason = _repeated(m, x, rep, flat)
            if reason:
                return m.no(reason, at=x)
        return None

    def replace(self, b: Any, m: Match) -> Any:
        return b.sdpa(m.q, m.k, m.v, m.mask, scale=m.scale, causal=m.causal)


@dataclass(frozen=True)
class EagerAttention(Rewrite):
    """softmax(q kᵀ · scale + mask) v → sdpa(q, k, v, mask)"""

    masked: bool = True

    @property
    def name(self) -> str:
        return "eager_attention" if self.masked else "eager_attention_unmasked"

    def pattern(self, p: Any, q: Any, k: Any, v: Any) -> Any:
        scores = p.mul(p.matmul(q, p.transpose(k, perm=(0, 1, 3, 2))), p.const("scale"))
        if self.masked:
            scores = p.add(scores, p.any("mask"))
        wide = p.maybe(lambda s: p.cast(s, dtype="f32"), scores)
        weights = p.softmax(wide, axis=-1)
        return p.matmul(p.maybe(lambda w: p.cast(w, dtype=p.attr()), weights), v)

    def when(self, m: Match) -> Refused | None:
        if not (m.q.type.rank == m.k.type.rank == m.v.type.rank == 4):
            return m.no(f"q {m.q.type}, k {m.k.type} and v {m.v.type} must have rank 4", at=m.q)
        if m.q.shape[1] != m.k.shape[1] or m.q.shape[0] != m.k.shape[0] or m.v.shape[:2] != m.k.shape[:2]:
            return m.no(f"q {m.q.type}, k {m.k.type} and v {m.v.type} broadcast", at=m.k)
        mask = m.get("mask")
        if mask is not None and (mask.dtype != m.q.dtype or mask.type.rank > 4):
            return m.no(f"mask {mask.type} cannot be added in attention", at=mask)
        return None

    def replace(self, b: Any, m: Match) -> Any:
        return b.sdpa(m.q, m.k, m.v, m.get("mask"), scale=m.scale)


@dataclass(frozen=True)
class FuseAttention(RuleSet):
    """Eager attention and repeated heads to `attention.sdpa`."""

    rules: tuple[Rewrite, ...] = (SharedHeads(), EagerAttention(True), EagerAttention(False))
