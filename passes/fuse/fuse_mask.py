"""Masks: what their structure proves about them, to `causal` where that is all they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moec.ir import DType, Value
from moec.ir.types import broadcast
from moec.passes.clean.index_forms import Affine, Holds, Size, index_form
from moec.passes.moe.structure import producer
from moec.passes.rewrite import Match, Refused, Rewrite
from moec.passes.rewriting.matcher import scalar_constant


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


def additive(mask: Value) -> Value | None:
    """The condition of an added mask that is 0 where it holds and the lowest number elsewhere."""
    choice = producer(mask, "math.where")
    if choice is None or not mask.dtype.is_float:
        return None
    condition, allowed, forbidden = choice.operands
    lowest = _number(forbidden)
    if _number(allowed) != 0 or lowest is None or lowest > 0.99 * torch.finfo(mask.dtype.torch).min:
        return None
    return condition


def _number(v: Value) -> float | None:
    full = producer(v, "tensor.full")
    number = full.attrs["value"] if full is not None else scalar_constant(v)
    return float(number) if number is not None else None


def allowed_where(mask: Value) -> Holds | None:
    """Where a mask lets attend, bool or added; None where structure does not tell."""
    condition = mask if mask.dtype == "bool" else additive(mask)
    holds = index_form(condition) if condition is not None else None
    return holds if isinstance(holds, Holds) else None


def is_causal(holds: Holds | None, queries: Size, keys: Size) -> bool:
    """Whether it is exactly: key j ≤ query i + keys − queries, and every query has such a key."""
    exactly = Affine.of(keys - queries, {-2: 1, -1: -1})
    if queries == 1:
        exactly = Affine.of(keys - 1, {-1: -1})
    return holds is not None and holds.conditions == {exactly} and _covers(queries, keys)


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
    positions that count up, without padding. → sdpa(q, k, v) where it provably allows everything."""

    def pattern(self, p: Any, mask: Any) -> Any:
        return attention(p, mask, causal=False)

    def when(self, m: Match) -> Refused | None:
        holds, queries, keys = allowed_where(m.mask), m.q.shape[2], m.k.shape[2]
        if holds is None:
            return m.no("the mask is not made of positions alone", at=m.mask)
        if holds.always or is_causal(holds, queries, keys):
            return None
        return m.no("the mask is not exactly causal (a window, or other positions)", at=m.mask)

    def replace(self, b: Any, m: Match) -> Any:
        holds = allowed_where(m.mask)
        return attention_again(b, m, mask=None, causal=holds is not None and not holds.always)


@dataclass(frozen=True)
class CausalConjunct(Rewrite):
    """sdpa(q, k, v, causal and other) → sdpa(q, k, v, other, causal=True), other being a padding mask, say"""

    def pattern(self, p: Any, one: Any, other: Any) -> Any:
        return attention(p, p.shared(p.and_(one, other)))

    def when(self, m: Match) -> Refused | None:
        if not is_causal(allowed_where(m.one), m.q.shape[2], m.k.shape[2]):
            return m.no("neither part of the mask is causal", at=m.one)
        return None

    def replace(self, b: Any, m: Match) -> Any:
        return attention_again(b, m, mask=m.other, causal=True)


@dataclass(frozen=True)
class BooleanMask(Rewrite):
    """sdpa with an added mask where(allowed, 0, lowest) → sdpa with the bool mask `allowed`, where every query provably
    sees its own key (a row that sees nothing would be uniform with the one and zero with the other)"""

    def pattern(self, p: Any, mask: Any) -> Any:
        return attention(p, mask)

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
        return m.no(f"{m.x.type} does not broadcast to {full}") if not _fits(m.x, full) else None

    def replace(self, b: Any, m: Match) -> Any:
        return attention_again(b, m, mask=m.x)


def _fits(mask: Value, full: tuple[Size, ...]) -> bool:
    return (
        mask.type.rank <= 4
        and (mask.dtype.is_float or mask.dtype is DType.BOOL)
        and broadcast(mask.shape, full) == full
    )


MASK_RULES: tuple[Rewrite, ...] = (BroadcastMask(), CausalMask(), CausalConjunct(), BooleanMask())
