"""Rotary embedding to `rope.apply`: half-rotated, interleaved and complex.

Where a model multiplies with cos and sin of full width, their halves (or their neighbours) must be provably equal:
`concat(c, c)`, and `pairs(c)` which repeats each element, are moved outward through the elementwise ops, casts and
reshapes that stand between the angles and their use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.ir import Value
from moec.passes.clean.canonicalise import ReshapeOfReshape
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


def _paired(p: Any, a: Any, tag: str = "") -> Any:
    """[a₀ a₀ a₁ a₁ …], as repeat_interleave(2) and stack + flatten write it."""
    repeated = p.expand(p.reshape(a, shape=p.attr(f"split{tag}")), shape=p.attr(f"repeat{tag}"))
    return p.reshape(repeated, shape=p.attr(f"flat{tag}"))


def _single(m: Match, tag: str = "") -> tuple[Any, ...]:
    """The shape of what `_paired` matched before its elements are repeated."""
    return (*m.get(f"flat{tag}")[:-1], m.get(f"split{tag}")[-2])


def _not_paired(m: Match, a: Value, tag: str = "") -> Refused | None:
    """Refuses where reshape, expand and reshape do not repeat each element of `a` next to itself."""
    split, repeat, flat = m.get(f"split{tag}"), m.get(f"repeat{tag}"), m.get(f"flat{tag}")
    if len(split) < 2 or split[-1] != 1 or repeat != (*split[:-1], 2) or not flat or flat[-1] != 2 * split[-2]:
        return m.no(f"{list(split)} expanded to {list(repeat)} does not repeat the elements of {a.type}", at=a)
    return None


def _pair(b: Any, a: Value) -> Value:
    shape = a.shape
    return b.reshape(b.expand(b.reshape(a, shape=(*shape, 1)), shape=(*shape, 2)), shape=(*shape[:-1], 2 * shape[-1]))


@dataclass(frozen=True)
class PairedUnary(Rewrite):
    """f(pairs(a)) → pairs(f(a)) for cos, sin"""

    op: str = "math.cos"

    @property
    def name(self) -> str:
        return f"paired_{self.op.split('.')[1]}"

    def pattern(self, p: Any, a: Any) -> Any:
        return p.op(self.op, [p.shared(_paired(p, a))])

    def when(self, m: Match) -> Refused | None:
        return _not_paired(m, m.a)

    def replace(self, b: Any, m: Match) -> Any:
        return _pair(b, b.op(self.op, [b.reshape(m.a, shape=_single(m))]))


@dataclass(frozen=True)
class PairedScale(Rewrite):
    """pairs(a) · scalar → pairs(a · scalar)"""

    def pattern(self, p: Any, a: Any) -> Any:
        return p.mul(p.shared(_paired(p, a)), p.const("factor"))

    def when(self, m: Match) -> Refused | None:
        return m.no(f"{m.root.type} broadcasts", at=m.a) if m.root.shape != m.flat else _not_paired(m, m.a)

    def replace(self, b: Any, m: Match) -> Any:
        return _pair(b, b.mul(b.reshape(m.a, shape=_single(m)), m.factor))


@dataclass(frozen=True)
class PairedCast(Rewrite):
    """cast(pairs(a)) → pairs(cast(a))"""

    def pattern(self, p: Any, a: Any) -> Any:
        return p.cast(p.shared(_paired(p, a)), dtype=p.attr("dtype"))

    def when(self, m: Match) -> Refused | None:
        return _not_paired(m, m.a)

    def replace(self, b: Any, m: Match) -> Any:
        return _pair(b, b.cast(b.reshape(m.a, shape=_single(m)), dtype=m.dtype))


def _misfit(m: Match, cos: tuple[Any, ...], sin: tuple[Any, ...]) -> Refused | None:
    """Refuses tables (their shapes here) that are not one row of half of what is rotated, alike for cos and sin."""
    x, shape = m.x, _rotated(m)
    half = (*shape[:-1], shape[-1] // 2) if shape and isinstance(shape[-1], int) and shape[-1] % 2 == 0 else ()
    if not half or cos != sin or len(cos) > len(half) or cos[-1:] != half[-1:]:
        return m.no(f"cos {list(cos)} and sin {list(sin)} are not the tables of {list(shape)}", at=x)
    if any(a not in (1, b) for a, b in zip(reversed(cos), reversed(half), strict=False)):
        return m.no(f"cos {list(cos)} broadcasts {list(shape)}", at=x)
    if m.c.dtype != x.dtype or m.s.dtype != x.dtype:
        return m.no(f"cos is {m.c.dtype}, x {x.dtype}", at=m.c)
    return None


def _halves(p: Any, x: Any) -> tuple[Any, Any]:
    """First and second half of the last axis, by slices or by split; see _bad_halves."""
    one, two = p.split(x, axis=-1, sizes=p.attr("sizes"), results=2)
    first = p.either(p.slice(x, axis=-1, start=0, end=p.attr("half")), one)
    return first, p.either(p.slice(x, axis=-1, start=p.attr("half"), end=p.attr("end")), two)


def _bad_halves(m: Match, x: Value) -> Refused | None:
    d = x.shape[-1]
    cuts = m.get("sizes") or (m.get("half"), m.get("end") - m.half if m.get("end") is not None else None)
    return None if cuts == (d // 2, d // 2) else m.no(f"cuts {cuts} are not the halves of {x.type}", at=x)


def _neighbours(p: Any, x: Any) -> tuple[Any, Any]:
    """Even and odd elements of the last axis: by slices of x, or by splitting x reshaped to [..., D/2, 2]. `_rotated`
    gives the tensor that they are neighbours in."""
    one, two = p.split(p.reshape(x, shape=p.attr("pairs")), axis=-1, sizes=(1, 1))
    even = p.either(p.slice(x, axis=-1, start=0, end=p.attr("end"), step=2), p.reshape(one, shape=p.attr("even")))
    odd = p.either(p.slice(x, axis=-1, start=1, end=p.attr("end"), step=2), p.reshape(two, shape=p.attr("odd")))
    return even, odd


def _rotated(m: Match) -> tuple[Any, ...]:
    """The shape of what is rotated, [..., D]."""
    pairs = m.get("pairs")
    return m.x.shape if pairs is None else (*pairs[:-2], 2 * pairs[-2])


def _bad_neighbours(m: Match) -> Refused | None:
    if m.get("pairs") is not None:
        columns = (*m.pairs[:-2], m.pairs[-2])
        good = m.pairs[-1] == 2 and m.get("even") == m.get("odd") == columns
        return None if good else m.no(f"{list(m.pairs)} are not pairs of {m.x.type}", at=m.x)
    return None if m.end == m.x.shape[-1] else m.no(f"the slices end at {m.end} of {m.x.type}", at=m.x)


def _stacked(p: Any, first: Any, second: Any) -> Any:
    """[[first₀ second₀] [first₁ second₁] …]: two columns joined."""
    one, two = (p.reshape(v, shape=p.attr("column")) for v in (first, second))
    return p.concat(one, two, axis=-1)


def _bad_stack(m: Match) -> Refused | None:
    shape = _rotated(m)
    good = m.column == (*shape[:-1], shape[-1] // 2, 1)
    return None if good else m.no(f"columns {list(m.column)} do not make the pairs of {list(shape)}", at=m.x)


def _rope(b: Any, m: Match, cos: Value, sin: Value, **attrs: Any) -> Value:
    """rope of x, which is given the shape it is rotated in, in the shape of the root."""
    x = m.x if m.x.shape == _rotated(m) else b.reshape(m.x, shape=_rotated(m))
    y = b.rope_apply(x, cos, sin, **attrs)
    return y if y.shape == m.root.shape else b.reshape(y, shape=m.root.shape)


@dataclass(frozen=True)
class HalfRotated(Rewrite):
    """x · [c c] + [−x₂ x₁] · [s s] → rope(x, c, s)"""

    def pattern(self, p: Any, x: Any, c: Any, s: Any) -> Any:
        first, second = _halves(p, x)
        cos, sin = p.shared(p.concat(c, c, axis=-1)), p.shared(p.concat(s, s, axis=-1))
        return p.add(p.mul(x, cos), p.mul(p.concat(p.neg(second), first, axis=-1), sin))

    def when(self, m: Match) -> Refused | None:
        return _bad_halves(m, m.x) or _misfit(m, m.c.shape, m.s.shape)

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
        if m.a.type != m.b.type:
            return m.no(f"parts {m.a.type} and {m.b.type} differ", at=m.a)
        return _misfit(m, m.c.shape, m.s.shape)

    def replace(self, b: Any, m: Match) -> Any:
        return b.rope_apply(m.x, m.c, m.s)


@dataclass(frozen=True)
class InterleavedRotation(Rewrite):
    """x · pairs(c) + [−x₁ x₀ −x₃ x₂ …] · pairs(s) → interleaved rope(x, c, s), as GLM-4, Cohere and Ernie do"""

    def pattern(self, p: Any, x: Any, c: Any, s: Any) -> Any:
        even, odd = _neighbours(p, x)
        rotated = p.reshape(_stacked(p, p.neg(odd), even), shape=p.attr())
        cos, sin = p.shared(_paired(p, c, "_cos")), p.shared(_paired(p, s, "_sin"))
        return p.add(p.mul(x, cos), p.mul(rotated, sin))

    def when(self, m: Match) -> Refused | None:
        wrong = _bad_neighbours(m) or _bad_stack(m)
        wrong = wrong or _not_paired(m, m.c, "_cos") or _not_paired(m, m.s, "_sin")
        return wrong or _misfit(m, _single(m, "_cos"), _single(m, "_sin"))

    def replace(self, b: Any, m: Match) -> Any:
        cos, sin = b.reshape(m.c, shape=_single(m, "_cos")), b.reshape(m.s, shape=_single(m, "_sin"))
        return _rope(b, m, cos, sin, interleaved=True)


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
        even, odd = _neighbours(p, x)
        return p.rope_apply(p.concat(even, odd, axis=-1), c, s)

    def when(self, m: Match) -> Refused | None:
        return _bad_neighbours(m) or _misfit(m, m.c.shape, m.s.shape)

    def replace(self, b: Any, m: Match) -> Any:
        return _rope(b, m, m.c, m.s, interleaved=True, deinterleave=True)


@dataclass(frozen=True)
class RotatedPairs(Rewrite):
    """a·c − b·s beside b·c + a·s → rope(x, c, s), a and b being the halves of x, or (`interleaved`) its even and odd
    elements; the results as halves, or (`stacked`) as pairs. Products of complex numbers are the latter."""

    interleaved: bool = False
    stacked: bool = False

    @property
    def name(self) -> str:
        return f"rotated_pairs{'_interleaved' if self.interleaved else ''}{'_stacked' if self.stacked else ''}"

    def pattern(self, p: Any, x: Any, c: Any, s: Any) -> Any:
        first, second = (_neighbours if self.interleaved else _halves)(p, x)
        one, two = p.sub(p.mul(first, c), p.mul(second, s)), p.add(p.mul(second, c), p.mul(first, s))
        return _stacked(p, one, two) if self.stacked else p.concat(one, two, axis=-1)

    def when(self, m: Match) -> Refused | None:
        wrong = _bad_neighbours(m) if self.interleaved else _bad_halves(m, m.x)
        return wrong or (_bad_stack(m) if self.stacked else None) or _misfit(m, m.c.shape, m.s.shape)

    def replace(self, b: Any, m: Match) -> Any:
        deinterleave = self.interleaved and not self.stacked
        return _rope(b, m, m.c, m.s, interleaved=self.interleaved, deinterleave=deinterleave)


@dataclass(frozen=True)
class FuseRoPE(RuleSet):
    """Rotary embedding to `rope.apply`."""

    rules: tuple[Rewrite, ...] = (
        ReshapeOfReshape(),
        DoubledUnary("math.cos"),
        DoubledUnary("math.sin"),
        DoubledScale(),
        DoubledCast(),
        DoubledReshape(),
        DoubledTranspose(),
        PairedUnary("math.cos"),
        PairedUnary("math.sin"),
        PairedScale(),
        PairedCast(),
        HalfRotated(),
        HalfRotatedParts(),
        InterleavedRotation(),
        DeinterleavedInput(),
        SlicedInput(),
        RotatedPairs(False),
        RotatedPairs(True),
        RotatedPairs(True, stacked=True),
    )
