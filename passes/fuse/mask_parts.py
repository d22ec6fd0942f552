"""Masks in parts: attention is allowed where every part of a mask allows it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moec.ir import Value
from moec.passes.clean.choices import choice_form
from moec.passes.clean.index_forms import Affine, Holds
from moec.passes.moe.structure import producer


@dataclass(frozen=True)
class Part:
    """A truth value that allows attention where it is `allowed`; in an added mask the number `low` stands elsewhere.
    `allowed` None: any numbers, added. `term`: which of the added numbers it is part of."""

    value: Value
    allowed: bool | None
    low: float | None = None
    term: tuple[int, ...] = ()

    @property
    def together(self) -> tuple[float | None, tuple[int, ...]]:
        """What is the same for parts of which several forbid no more than one; finite numbers add up."""
        return self.low, () if self.low in (None, float("-inf")) else self.term


def parts(mask: Value, term: tuple[int, ...] = ()) -> list[Part]:
    """The parts of a mask, bool or added."""
    if mask.dtype == "bool":
        return _conjuncts(mask, True, None)
    total, choice = producer(mask, "math.add"), producer(mask, "math.where")
    if total is not None:
        return [part for i, v in enumerate(total.operands) if v is not None for part in parts(v, (*term, i))]
    if choice is not None:
        condition, a, b = choice.operands
        for allowed, zero, low in ((True, a, b), (False, b, a)):
            numbers = choice_form(zero), choice_form(low)
            if all(n is not None and n.constant for n in numbers) and numbers[0].yes == 0:  # type: ignore[union-attr]  # none is None
                found = _conjuncts(condition, allowed, float(numbers[1].yes))  # type: ignore[union-attr]  # as before
                return [replace(part, term=term) for part in found]
    return [Part(mask, None)]


def _conjuncts(v: Value, wanted: bool, low: float | None) -> list[Part]:
    """What all has to hold for v to be `wanted`."""
    flipped, choice = producer(v, "math.not"), producer(v, "math.where")
    if flipped is not None:
        return _conjuncts(flipped.operands[0], not wanted, low)
    both = producer(v, "math.and" if wanted else "math.or")
    if both is not None:
        return [part for o in both.operands for part in _conjuncts(o, wanted, low)]
    if choice is not None:
        condition, a, b = choice.operands
        sides = [form.yes if form is not None and form.constant else None for form in map(choice_form, (a, b))]
        if sides == [True, False] or sides == [False, True]:
            return _conjuncts(condition, wanted == sides[0], low)
        # where(c, x, no) is c and x
        for side, other, holds in ((sides[1], a, True), (sides[0], b, False)):
            if side is (not wanted):
                return [*_conjuncts(condition, holds, low), *_conjuncts(other, wanted, low)]
    return [Part(v, wanted, low)]


def joined(b: Any, rest: list[Part], mask: Value) -> Value | None:
    """A mask like `mask` of these parts; None of no parts."""
    result: Value | None = None
    for together in dict.fromkeys(part.together for part in rest if part.allowed is not None):
        allowed: Value | None = None
        low, _ = together
        for part in rest:
            if part.allowed is not None and part.together == together:
                holds = part.value if part.allowed else b.not_(part.value)
                allowed = holds if allowed is None else b.and_(allowed, holds)
        if low is not None:
            allowed = b.where(allowed, b.const(0.0, mask.dtype), b.const(low, mask.dtype))
        result = allowed if result is None else b.add(result, allowed)
    for part in rest:
        if part.allowed is None:
            result = part.value if result is None else b.add(result, part.value)
    return result


def in_words(holds: Holds) -> str:
    """Where something holds, of key j and query i."""
    if holds.never:
        return "nothing holds"
    return " and ".join(sorted(f"{_text(c)} ≥ 0" for c in holds.conditions)) or "anything holds"


def _text(c: Affine) -> str:
    names = {-1: "j", -2: "i"}
    terms = [f"{'' if f == 1 else '−' if f == -1 else f'{f}·'}{names.get(a, f'index {a}')}" for a, f in c.terms]
    terms += [str(c.const)] if c.const != 0 or not terms else []
    return " + ".join(terms).replace("+ −", "− ").replace("+ -", "− ")
