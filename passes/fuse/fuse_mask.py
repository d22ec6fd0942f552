"""Masks: what their structure proves about them, to `causal` where that is all they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moec.ir import DType, Value
from moec.ir.types import broadcast
from moec.passes.clean.choices import choice_form, undecided
from moec.passes.clean.index_forms import Affine, Holds, Size
from moec.passes.fuse.mask_parts import Part, in_words, joined, parts
from moec.passes.moe.structure import producer
from moec.passes.rewrite import Match, Refused, Rewrite
from moec.passes.rewriting.match_values import describe


def attention(p: Any, mask: Any, **changed: Any) -> Any:
    """Pattern of sdpa with `mask`, and everything else captured under its name but what is given."""
    q, k, v = (changed.pop(n, None) or p.any(n) for n in ("q", "k", "v"))
    attrs = {n: changed.pop(n, p.attr(n)) for n in ("scale", "causal", "softcap")}
    return p.sdpa(q, k, v, mask, p.optional("sinks"), **attrs)


def attention_again(b: Any, m: Match, **changed: Any) -> Any:
    """The matched sdpa with some operands or attributes changed."""
    operands = [changed.get(n, m.get(n)) for n in ("q", "k", "v", "mask", "sinks")]
    attrs = {n: changed.get(n, m.get(n)) for n in ("scale", "causal", "softcap")}
    return b.sdpa(*operands, **{n: a for n, a in attrs.items() if a is not None})


def lowest(number: float | None, mask: Value) -> bool:
    """Whether a number forbids attention where it is added."""
    return number is not None and number <= 0.99 * torch.finfo(mask.dtype.torch).min


def additive(mask: Value) -> Value | None:
    """The condition of an added mask that is 0 where it holds and the lowest number elsewhere."""
    choice = producer(mask, "math.where")
    if choice is None or not mask.dtype.is_float:
        return None
    condition, allowed, forbidden = choice.operands
    return condition if _number(allowed) == 0 and lowest(_number(forbidden), mask) else None


def _number(v: Value) -> float | None:
    form = choice_form(v)
    return float(form.yes) if form is not None and form.constant else None


def allowed_where(mask: Value) -> Holds | None:
    """Where a mask lets attend, bool or added; None where structure does not tell."""
    form = choice_form(mask)
    if form is None:
        return None
    if mask.dtype != "bool" and not all(n == 0 or lowest(float(n), mask) for n in (form.yes, form.no)):
        return None
    holds = form.where(True if mask.dtype == "bool" else 0)
    if holds is None:
        return None
    # in a slice of a stored mask a condition may no longer forbid anything
    some = {c for c in holds.conditions if not c.never_negative(mask.shape)}
    return Holds(frozenset(some), holds.never)


def is_causal(holds: Holds | None, queries: Size, keys: Size) -> bool:
    """Whether it is exactly: key j ≤ query i + keys − queries, and every query has such a key."""
    return holds is not None and holds.conditions == {_causal(queries, keys)} and _covers(queries, keys)


def _causal(queries: Size, keys: Size) -> Affine:
    """What is ≥ 0 where query i (axis -2) sees key j (axis -1)."""
    return Affine.of(keys - queries, {-1: -1} if queries == 1 else {-2: 1, -1: -1})


def _covers(queries: Size, keys: Size) -> bool:
    return Affine.of(keys - queries).never_negative(())


def keeps_own_key(holds: Holds | None, queries: Size, keys: Size) -> bool:
    """Whether every query may attend to the key at its own position, so that no row is empty."""
    if holds is None or holds.never or not _covers(queries, keys):
        return False
    own = Affine.of(keys - queries, {-2: 1})
    return all(c.substitute(-1, own).never_negative((queries, 1)) for c in holds.conditions)


@dataclass(frozen=True)
class CausalMask(Rewrite):
    """sdpa(q, k, v, mask) → sdpa(q, k, v, causal=True) where the mask is provably causal and nothing else: made of
    positions that count up, or stored, without padding. → sdpa(q, k, v) where it provably allows everything.

    Of a mask that also says other things, a padding mask say, the causal part becomes `causal` and the rest stays.
    """

    def pattern(self, p: Any, mask: Any) -> Any:
        return attention(p, mask)

    def when(self, m: Match) -> Refused | None:
        queries, keys = m.q.shape[2], m.k.shape[2]
        holds = allowed_where(m.mask)
        if holds is not None and (holds.always or is_causal(holds, queries, keys)):
            return None
        if any(self._is_causal(m, part) for part in parts(m.mask)):
            return None
        if m.causal:
            return m.no(f"attention is causal, and {m.mask.type} says more", at=m.mask)
        exactly = Holds(frozenset({_causal(queries, keys)}))
        want = f"causal is: query i of {queries} sees key j of {keys} where {in_words(exactly)}"
        if holds is not None:
            return m.no(f"the mask is not causal: it allows key j where {in_words(holds)}; {want}", at=m.mask)
        form = choice_form(m.mask)
        if form is not None:
            numbers = f"{form.yes} and {form.no}"
            return m.no(f"the mask adds {numbers}, expected 0 and −inf or the lowest {m.mask.dtype}", at=m.mask)
        found = undecided(m.mask)
        name = describe(found) if found.producer is None else f"{describe(found)} ({found.type})"
        return m.no(f"the mask depends on {name}, and no part of it is causal by positions alone; {want}", at=found)

    @staticmethod
    def _is_causal(m: Match, part: Part) -> bool:
        # −∞ forbids whatever is added to it; a finite number only where something else is allowed
        if part.low is not None and part.low != float("-inf"):
            return False
        form = choice_form(part.value)
        if form is None or (part.allowed is None and {form.yes, form.no} != {0, float("-inf")}):
            return False
        holds = form.where(0 if part.allowed is None else part.allowed)
        return is_causal(holds, m.q.shape[2], m.k.shape[2])

    def replace(self, b: Any, m: Match) -> Any:
        holds = allowed_where(m.mask)
        if holds is not None and (holds.always or is_causal(holds, m.q.shape[2], m.k.shape[2])):
            return attention_again(b, m, mask=None, causal=m.causal or not holds.always)
        rest = [part for part in parts(m.mask) if not self._is_causal(m, part)]
        return attention_again(b, m, mask=joined(b, rest, m.mask), causal=True)


@dataclass(frozen=True)
class BooleanMask(Rewrite):
    """sdpa with an added mask where(allowed, 0, lowest) → sdpa with the bool mask `allowed`, where every query provably
    sees its own key (a row that sees nothing would be uniform with the one and zero with the other)"""

    def pattern(self, p: Any, mask: Any) -> Any:
        return attention(p, p.typed(mask, ("f64", "f32", "bf16", "f16")))

    def when(self, m: Match) -> Refused | None:
        condition = additive(m.mask)
        if condition is None:
            return m.no(f"{m.mask.type} is not 0 or the lowest number", at=m.mask)
        if not keeps_own_key(allowed_where(m.mask), m.q.shape[2], m.k.shape[2]):
            return m.no("a query may be allowed no key at all", at=m.mask)
        return None

    def replace(self, b: Any, m: Match) -> Any:
        return attention_again(b, m, mask=additive(m.mask))


@dataclass(frozen=True)
class BroadcastMask(Rewrite):
    """sdpa with mask expand(x) → sdpa with mask x, which broadcasts by itself"""

    def pattern(self, p: Any, x: Any) -> Any:
        return attention(p, p.shared(p.expand(x, shape=p.attr("shape"))))

    def when(self, m: Match) -> Refused | None:
        full = (*m.q.shape[:3], m.k.shape[2])
        return m.no(f"{m.x.type} does not broadcast to {full}") if not fits(m.x, full) else None

    def replace(self, b: Any, m: Match) -> Any:
        return attention_again(b, m, mask=m.x)


def fits(mask: Value, full: tuple[Size, ...]) -> bool:
    return (
        mask.type.rank <= 4
        and (mask.dtype.is_float or mask.dtype is DType.BOOL)
        and broadcast(mask.shape, full) == full
    )


MASK_RULES: tuple[Rewrite, ...] = (BroadcastMask(), CausalMask(), BooleanMask())
