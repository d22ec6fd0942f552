"""Ranges of sizes that a trace holds for, and what they decide about minima and maxima."""

from __future__ import annotations

import itertools
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


def interval(condition: sympy.Basic) -> Range | None:
    """The sizes for which a condition over one size holds, where that is one range; None where it is not, or where it
    compares other terms than linear ones with minima and maxima of such."""
    pieces = _pieces(condition)
    held = [p for p in pieces or [] if _at(condition, p[0])]
    if not held or any(b[0] != (a[1] or 0) + 1 for a, b in itertools.pairwise(held)):
        return None
    return held[0][0], held[-1][1]


def turns(condition: sympy.Basic) -> list[int] | None:
    """The last sizes before a condition over one size may change, see `interval`."""
    lines = _lines(condition)
    if lines is None:
        return None
    floors = [int(sympy.floor(root)) for root in lines if root >= 0]
    return sorted({*floors, *(f - 1 for f in floors if f > 0)})


def _around(condition: sympy.Basic, symbol: sympy.Symbol, hint: int) -> Range | None:
    """The range in which a condition holds, with `hint` in it and not alone."""
    found = interval(condition)
    if found is None or found == (hint, hint) or not _at(condition, hint):
        return None
    return found


def _pieces(condition: sympy.Basic) -> list[Range] | None:
    """Ranges of sizes in each of which a condition is true throughout, or false."""
    last = turns(condition)
    if last is None:
        return None
    edges = [-1, *last]
    return [(a + 1, b) for a, b in zip(edges, [*last, None], strict=True)]


def _at(condition: sympy.Basic, n: int) -> bool:
    (symbol,) = condition.free_symbols
    return bool(condition.subs(symbol, n) == True)  # noqa: E712  # sympy's own truth


def _lines(condition: sympy.Basic) -> set[sympy.Rational] | None:
    """Where the two sides of a condition meet, or two arguments of a minimum or maximum in it do."""
    if not isinstance(condition, sympy.core.relational.Relational) or len(condition.free_symbols) != 1:
        return None
    (symbol,) = condition.free_symbols
    forms, extremes = [condition.lhs - condition.rhs], _extremes(condition)
    if len(extremes) > _MOST_EXTREMES or any(_extremes_inside(e) for e in extremes):
        return None
    for e in dict.fromkeys(extremes):  # it is one of its arguments
        forms = [f.xreplace({e: a}) for f in forms for a in e.args]
    forms += [a - b for e in extremes for a, b in itertools.combinations(e.args, 2)]
    roots = set()
    for form in map(sympy.expand, forms):
        if not form.has(symbol):
            continue
        slope, rest = form.coeff(symbol, 1), form.coeff(symbol, 0)
        if not (slope.is_Rational and rest.is_Rational and form == slope * symbol + rest):
            return None
        roots.add(-rest / slope)
    return roots


def _extremes_inside(e: sympy.Basic) -> bool:
    return any(_extremes(a) for a in e.args)
