"""Ranges of sizes that a trace holds for, and what they decide about minima and maxima."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import sympy

Range = tuple[int, int | None]
Ranges = dict[sympy.Symbol, Range]
ANY: Range = (0, None)
_EXTREMES = ("Min", "Max")  # sympy's and torch's
_MOST_EXTREMES = 4  # whose cases are gone through


def assumed(conditions: Iterable[sympy.Basic], hints: Mapping[sympy.Symbol, int]) -> Ranges:
    """What conditions over one size each, with a minimum or maximum in them, say about that size: the whole range
    around the example's size in which they hold. A table that is cut to T rows and added to T rows has
    Eq(T, Min(64, T)), so T ≤ 64."""
    ranges: Ranges = {}
    for condition in conditions:
        symbols = condition.free_symbols
        if len(symbols) != 1 or not _extremes(condition):
            continue
        (symbol,) = symbols
        hint = hints.get(symbol)
        found = None if hint is None else _around(condition, symbol, hint)
        if found is not None:
            ranges[symbol] = narrowed(ranges.get(symbol, ANY), found)
    return ranges


def narrowed(a: Range, b: Range) -> Range:
    """The sizes in both."""
    return max(a[0], b[0]), min((h for h in (a[1], b[1]) if h is not None), default=None)


def extreme(
    kind: type[sympy.Min | sympy.Max], args: Iterable[sympy.Expr], ranges: Mapping[sympy.Symbol, Range]
) -> sympy.Expr:
    """Min or Max of sizes without the arguments that the ranges of their symbols rule out."""
    rest = list(dict.fromkeys(args))
    for a in list(rest):
        others = [b for b in rest if b is not a]
        if any(_at_most(a, b, ranges) if kind is sympy.Max else _at_most(b, a, ranges) for b in others):
            rest.remove(a)
    return rest[0] if len(rest) == 1 else kind(*rest)


def _at_most(a: sympy.Expr, b: sympy.Expr, ranges: Mapping[sympy.Symbol, Range]) -> bool:
    """Whether a ≤ b throughout the ranges, as far as that is easily seen."""
    return _never_negative(sympy.expand(b - a), ranges)


def _never_negative(e: sympy.Expr, ranges: Mapping[sympy.Symbol, Range]) -> bool:
    extremes = _extremes(e)
    if extremes:  # it is one of its arguments
        if len(extremes) > _MOST_EXTREMES:
            return False
        inner = next(x for x in extremes if not _extremes_inside(x))
        return all(_never_negative(sympy.expand(e.xreplace({inner: a})), ranges) for a in inner.args)
    least = sympy.Integer(0)
    for term, factor in e.as_coefficients_dict().items():
        if term == 1:
            least += factor
            continue
        low, high = ranges.get(term, ANY) if term.is_Symbol else (None, None)
        end = low if factor > 0 else high
        if end is None:
            return False
        least += factor * end
    return bool(least >= 0)


def _extremes(e: sympy.Basic) -> list[sympy.Basic]:
    return [x for x in sympy.preorder_traversal(e) if type(x).__name__ in _EXTREMES]


def _around(condition: sympy.Basic, symbol: sympy.Symbol, hint: int) -> Range | None:
    """The sizes around `hint` in which a condition holds whose minima and maxima are of linear terms; None where it
    is of another kind, or holds for `hint` alone."""
    turns = set()
    for e in _extremes(condition):
        if _extremes_inside(e):
            return None
        for a in e.args:
            for b in e.args:
                line = sympy.Poly(a - b, symbol) if (a - b).is_polynomial(symbol) and (a - b).has(symbol) else None
                if line is not None and line.degree() == 1:
                    turns.add(-line.coeffs()[-1] / line.coeffs()[0] if len(line.coeffs()) == 2 else sympy.Integer(0))
    # between two turns the condition is one of linear terms: true at two places, true at all
    floors = [math.floor(t) for t in turns if t >= 0]
    edges = sorted({-1, *floors, *(f - 1 for f in floors)} - {-2})
    pieces = [(a + 1, b) for a, b in zip(edges, [*edges[1:], None], strict=True)]
    held = [_holds_throughout(condition, symbol, p) for p in pieces]
    at = next(i for i, (_, last) in enumerate(pieces) if last is None or hint <= last)
    if not held[at]:
        return None
    first = last = at
    while first > 0 and held[first - 1]:
        first -= 1
    while last + 1 < len(pieces) and held[last + 1]:
        last += 1
    return pieces[first][0], pieces[last][1]


def _extremes_inside(e: sympy.Basic) -> bool:
    return any(_extremes(a) for a in e.args)


def _holds_throughout(condition: sympy.Basic, symbol: sympy.Symbol, piece: Range) -> bool:
    first, last = piece
    places = {first, first + 1, first + 1000} if last is None else {first, min(first + 1, last), last}
    return all(condition.subs(symbol, n) == True for n in places)  # noqa: E712  # sympy's own truth
