"""Rotary embedding: half-rotated, and interleaved input.

Both halves of cos and sin must be provably equal: `concat(c, c)` is moved outward through the
elementwise ops, casts and reshapes that models put between the angles and their use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.passes.rewrite import Match, Refused, Rewrite, RuleSet


@dataclass(frozen=True)
class DoubledUnary(Rewrite):
    """f(concat(a, a)) → concat(f(a), f(a)) for cos, sin"""

    op: str = "math.cos"

    @property
    def name(self) -> str:
        return f"doubled_{self.op.split('.')[1]}"

    def pattern(self, p: Any, a: Any) -> Any:
        return p.op(self.op, [p.shared(p.concat(a, a, axis=-1))])

    def replace(self, b: Any, m: Match) -> Any:
        f = b.op(self.op, [m.a])
        return b.concat(f, f, axis=-1)


@dataclass(frozen=True)
class DoubledScale(Rewrite):
    """concat(a, a) · scalar → concat(a · scalar, a · scalar)"""

    def pattern(self, p: Any, a: Any) -> Any:
        return p.mul(p.shared(p.concat(a, a, axis=-1)), p.const("factor"))

    def when(self, m: Match) -> Refused | None:
        return m.no(f"{m.root.type} broadcasts {m.a.type}") if m.root.type.rank != m.a.type.rank else None

    def replace(self, b: Any, m: Match) -> Any:
        f = b.mul(m.a, m.factor)
        return b.concat(f, f, axis=-1)


@dataclass(frozen=True)
class DoubledCast(Rewrite):
    """cast(concat(a, a)) → concat(cast(a), cast(a))"""

    def pattern(self, p: Any, a: Any) -> Any:
        return p.cast(p.shared(p.concat(a, a, axis=-1)), dtype=p.attr("dtype"))

    def replace(self, b: Any, m: Match) -> Any:
        f = b.cast(m.a, dtype=m.dtype)
        return b.concat(f, f, axis=-1)


@dataclass(frozen=True)
class DoubledReshape(Rewrite):
    """reshape(concat(a, a)) that keeps the last axis → concat(reshape(a), reshape(a))"""

    def pattern(self, p: Any, a: Any) -> Any:
        return p.reshape(p.shared(p.concat(a, a, axis=-1)), shape=p.attr("shape"))

    def when(self, m: Match) -> Refused | None:
        doubled = m.a.shape[-1] * 2
        if not m.shape or m.shape[-1] != doubled:
            return m.no(f"the last axis {doubled} changes")
        return None

    def replace(self, b: Any, m: Match) -> Any:
        f = b.reshape(m.a, shape=(*m.shape[:-1], m.a.shape[-1]))
        return b.concat(f, f, axis=-1)


@dataclass(frozen=True)
class DoubledTranspose(Rewrite):
    """transpose(concat(a, a)) that keeps the last axis → concat(transpose(a), transpose(a))"""

    def pattern(self, p: Any, a: Any) -> Any:
        return p.transpose(p.shared(p.concat(a, a, axis=-1)), perm=p.attr("perm"))

    def when(self, m: Match) -> Refused | None:
        return m.no("the last axis moves") if m.perm[-1] != len(m.perm) - 1 else None

    def replace(self, b: Any, m: Match) -> Any:
        f = b.transpose(m.a, perm=m.perm)
        return b.concat(f, f, axis=-1)


@dataclass(frozen=True)
class HalfRotated(Rewrite):
    """x · [c c] + [−x₂ x₁] · [s s] → rope(x, c, s)"""

    def pattern(self, p: Any, x: Any, c: Any, s: Any) -> Any:
        first = p.slice(x, axis=-1, start=0, end=p.attr("half"))
        second = p.slice(x, axis=-1, start=p.attr("half"), end=p.attr("end"))
        rotated = p.concat(p.neg(second), first, axis=-1)
        cos, sin = p.shared(p.concat(c, c, axis=-1)), p.shared(p.concat(s, s, axis=-1))
        return p.add(p.mul(x, cos), p.mul(rotated, sin))

    def when(self, m: Match) -> Refused | None:
        if m.end != m.x.shape[-1] or m.half * 2 != m.end:
            return m.no(f"slices at {m.half} and {m.end} are not the halves of {m.x.type}", at=m.x)
        return None

    def replace(self, b: Any, m: Match) -> Any:
        return b.rope_apply(m.x, m.c, m.s)


@dataclass(frozen=True)
class HalfRotatedParts(Rewrite):
    """x · [c c] + [−b a] · [s s] with x = [a b] → rope(x, c, s)"""

    def pattern(self, p: Any, a: Any, b: Any, c: Any, s: Any) -> Any:
        x = p.bind("x", p.concat(a, b, axis=-1))
        cos, sin = p.shared(p.concat(c, c, axis=-1)), p.shared(p.concat(s, s, axis=-1))
        return p.add(p.mul(x, cos), p.mul(p.concat(p.neg(b), a, axis=-1), sin))

    def when(self, m: Match) -> Refused | None:
        return m.no(f"parts {m.a.type} and {m.b.type} differ", at=m.a) if m.a.type != m.b.type else None

    def replace(self, b: Any, m: Match) -> Any:
        return b.rope_apply(m.x, m.c, m.s)


@dataclass(frozen=True)
class DeinterleavedInput(Rewrite):
    """rope of pairs laid out side by side, [x₀ x₁ x₂ x₃ …] → [x₀ x₂ … x₁ x₃ …], as DeepSeek-V3 does"""

    def pattern(self, p: Any, x: Any, c: Any, s: Any) -> Any:
        pairs = p.reshape(x, shape=p.attr("pairs"))
        flat = p.reshape(p.transpose(pairs, perm=p.attr("perm")), shape=p.attr())
        return p.rope_apply(flat, c, s)

    def when(self, m: Match) -> Refused | None:
        d, rank = m.x.shape[-1], m.x.type.rank
        if m.pairs != (*m.x.shape[:-1], d // 2, 2) or m.root.type != m.x.type:
            return m.no(f"{m.pairs} are not the pairs of {m.x.type}", at=m.x)
        if m.perm != (*range(rank - 1), rank, rank - 1):
            return m.no(f"perm {m.perm} does not swap the pair axis")
        return None

    def replace(self, b: Any, m: Match) -> Any:
        return b.rope_apply(m.x, m.c, m.s, interleaved=True, deinterleave=True)


@dataclass(frozen=True)
class SlicedInput(Rewrite):
    """rope of concat(x[0::2], x[1::2]) → interleaved rope of x"""

    def pattern(self, p: Any, x: Any, c: Any, s: Any) -> Any:
        even = p.slice(x, axis=-1, start=0, end=p.attr("end"), step=2)
        odd = p.slice(x, axis=-1, start=1, end=p.attr("end"), step=2)
        return p.rope_apply(p.concat(even, odd, axis=-1), c, s)

    def when(self, m: Match) -> Refused | None:
        return m.no(f"the slices end at {m.end} of {m.x.type}", at=m.x) if m.end != m.x.shape[-1] else None

    def replace(self, b: Any, m: Match) -> Any:
        return b.rope_apply(m.x, m.c, m.s, interleaved=True, deinterleave=True)


@dataclass(frozen=True)
class RotatedPairs(Rewrite):
    """concat(a·c − b·s, b·c + a·s), a and b being the halves or the even and odd elements of x → rope(x, c, s)"""

    interleaved: bool = False

    @property
    def name(self) -> str:
        return "rotated_pairs_interleaved" if self.interleaved else "rotated_pairs"

    def pattern(self, p: Any, x: Any, c: Any, s: Any) -> Any:
        if self.interleaved:
            first = p.slice(x, axis=-1, start=0, end=p.attr("end"), step=2)
            second = p.slice(x, axis=-1, start=1, end=p.attr("end"), step=2)
        else:
            first = p.slice(x, axis=-1, start=0, end=p.attr("half"))
            second = p.slice(x, axis=-1, start=p.attr("half"), end=p.attr("end"))
        one = p.sub(p.mul(first, c), p.mul(second, s))
        return p.concat(one, p.add(p.mul(second, c), p.mul(first, s)), axis=-1)

    def when(self, m: Match) -> Refused | None:
        if m.end != m.x.shape[-1] or (not self.interleaved and m.half * 2 != m.end):
            return m.no(f"slices of {m.x.type} that are not its pairs", at=m.x)
        if m.root.type != m.x.type:
            return m.no(f"{m.c.type} broadcasts {m.x.type}", at=m.c)
        return None

    def replace(self, b: Any, m: Match) -> Any:
        return b.rope_apply(m.x, m.c, m.s, interleaved=self.interleaved, deinterleave=self.interleaved)


@dataclass(frozen=True)
class FuseRoPE(RuleSet):
    """Rotary embedding to `rope.apply`."""

    rules: tuple[Rewrite, ...] = (
        DoubledUnary("math.cos"),
        DoubledUnary("math.sin"),
        DoubledScale(),
        DoubledCast(),
        DoubledReshape(),
        DoubledTranspose(),
        HalfRotated(),
        HalfRotatedParts(),
        DeinterleavedInput(),
        SlicedInput(),
        RotatedPairs(False),
        RotatedPairs(True),
    )
