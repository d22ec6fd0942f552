"""What a model asks about sizes beyond a branch that seems to make no difference.

A trace at n = 4 of `if n <= 7 or m != 12` sees only `n <= 7`. That program and model agree at n = 8, m = 5 does not say
that they agree for all m: the model is traced there too, and what it asked, `m != 12`, is tried in turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import sympy

from moec.frontend.conditions import Condition
from moec.frontend.guards import Guard, always
from moec.frontend.ranges import Range, interval
from moec.frontend.sizes import Sizes, inside
from moec.ir import CompileError

# The conditions that a trace at other sizes takes as true; None where the model cannot be traced there
AskedAt = Callable[[Sizes], list[Guard] | None]


class Weaker(NamedTuple):
    """A condition that is enough as far as is known: that `than` holds, or what the model asked at `sizes`, where it
    does not."""

    guard: Guard
    sizes: Sizes
    than: Guard


def beyond(
    dropped: Sequence[Guard], guards: Sequence[Guard], agreed: Sequence[Sizes], asked_at: AskedAt
) -> tuple[list[Weaker], list[Guard]]:
    """What is to be tried before these guards are dropped, and those of them to keep since nothing can be said of the
    sizes beyond."""
    known = {str(g) for g in guards}
    found: dict[str, Weaker] = {}
    needed: list[Guard] = []
    for guard in (g for g in dropped if g.branched and not _all_tried(g, agreed)):
        places = [sizes for sizes in agreed if not guard.holds(sizes)]
        place = max(places, key=lambda s: (0 not in s.values(), -_broken(guards, s), math.prod(s.values())))
        asked = asked_at(place)
        if asked is None:
            needed += [guard] if 0 not in place.values() else []
            continue
        either = {str(e): (e, other) for other in asked if other.branched and (e := _either(guard, other)) is not None}
        more = {text: pair for text, pair in either.items() if text not in known}
        if any(_pins(*pair) for pair in more.values()):
            needed.append(guard)
            continue
        for text, (e, _) in more.items():
            found.setdefault(text, Weaker(e, place, guard))
    return list(found.values()), needed


def _all_tried(guard: Guard, agreed: Sequence[Sizes]) -> bool:
    """Whether a guard is false for one choice of sizes only, among those of 1 or more, and that one was tried."""
    if guard.stated is None:
        return False
    only: dict[str, int] = {}
    for part in sympy.Or.make_args(guard.stated.expr):
        span = interval(part)
        if span is not None and span[0] == 2 and span[1] is None:
            only[str(next(iter(part.free_symbols)))] = 1
        elif isinstance(part, sympy.Ne) and part.lhs.is_Symbol and part.rhs.is_Integer:
            only[part.lhs.name] = int(part.rhs)
    return only in agreed


def _pins(either: Guard, asked: Guard) -> bool:
    """Whether what was asked fixes a size that is no neighbour of those known: there is no end to the others."""
    expr = asked.condition if asked.stated is None else asked.stated.expr
    if not isinstance(expr, sympy.Eq) or len(expr.free_symbols) != 1 or either.stated is None:
        return False
    spans = [interval(p) for p in sympy.Or.make_args(either.stated.expr) if p.free_symbols == expr.free_symbols]
    return any(r is None or r[0] == r[1] for r in spans)


def _broken(guards: Sequence[Guard], sizes: Sizes) -> int:
    return sum(not g.holds(sizes) for g in guards)


def _either(a: Guard, b: Guard) -> Guard | None:
    """The condition that one of two holds; None where that is always so, as far as is easily seen."""
    joined = sympy.Or(a.condition, b.condition)
    names = {**b.names, **a.names}
    if joined == sympy.true:
        return None
    if a.stated is None or b.stated is None:
        return Guard(joined, b.location, names, branched=True)
    rest: list[sympy.Basic] = []
    spans: dict[str, list[Range]] = {}
    for part in (*sympy.Or.make_args(a.stated.expr), *sympy.Or.make_args(b.stated.expr)):
        r = interval(part)
        if r is None:
            rest.append(part)
            continue
        symbol = str(next(iter(part.free_symbols)))
        spans[symbol] = _with(spans.get(symbol, []), r)
    # whether something is there at all is tried by itself
    if any(r[0] <= 1 and r[1] is None for ranges in spans.values() for r in ranges) or any(map(always, rest)):
        return None
    for part in rest:  # n != 5, or what holds for 5
        if isinstance(part, sympy.Ne) and part.lhs.is_Symbol and part.rhs.is_Integer:
            n = int(part.rhs)
            others = (other.subs(part.lhs, n) for other in rest if other is not part)
            if any(inside(n, r) for r in spans.get(part.lhs.name, [])) or sympy.true in others:
                return None
    parts = [Condition(_between(symbol, r)).expr for symbol, ranges in spans.items() for r in ranges]
    expr = sympy.Or(*rest, *parts)
    if expr == sympy.true:
        return None
    try:
        return Guard(joined, b.location, names, Condition.of(expr), True)
    except CompileError:
        return Guard(joined, b.location, names, branched=True)


def _with(ranges: list[Range], more: Range) -> list[Range]:
    """Ranges and one more, those that touch as one."""
    for r in ranges:
        both = _union(r, more)
        if both is not None:
            return _with([x for x in ranges if x is not r], both)
    return [*ranges, more]


def _union(a: Range, b: Range) -> Range | None:
    """The sizes in one of two ranges, where they are one range."""
    (low, high), (other, top) = sorted((a, b), key=lambda r: r[0])
    if high is not None and other > high + 1:
        return None
    return low, None if high is None or top is None else max(high, top)


def _between(symbol: str, r: Range) -> str:
    low, high = r
    parts = [f"{symbol} >= {low}"] if low > 0 else []
    parts += [f"{symbol} <= {high}"] if high is not None else []
    return " and ".join(f"({p})" for p in parts) if len(parts) > 1 else parts[0]
