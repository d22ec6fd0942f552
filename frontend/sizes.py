"""Sizes at which a program is compared with its model: others than it was traced at, and such as break a guard."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import sympy

from moec.frontend.guards import Guard
from moec.frontend.ranges import turns
from moec.ir import Dim, Graph

Sizes = dict[str, int]
Bounds = dict[str, tuple[int, int | None]]

_NEAR = 257  # sizes up to this are tried just beyond a guard
_FAR = 2 * _NEAR + 3  # and up to this well beyond
_LADDER = (*range(1, 67), 80, 96, 100, 127, 128, 129, 160, 200, 255, 256, 257, 320, 400, 511, 512, 513)
_GRID = (1, 2, 3, 4, 5, 7, 8, 16, 17, 32, 33, 64, 65, 128, 129)
_EMPTIES = 4  # sizes with nothing on some axis, for a guard
_MOST = 24  # sets of sizes that break guards


def size_sets(traced: Mapping[str, int], bounds: Bounds, declared: Bounds) -> dict[str, Sizes]:
    """Small odd sizes, longer ones than traced, 1 and 0."""
    odd, longer = {}, {}
    for i, (s, n) in enumerate(traced.items()):
        least, greatest = bounds.get(s, (0, None))
        size, more = max(3 + 2 * i + (n == 3 + 2 * i), least), n + 2 + i
        odd[s], longer[s] = (size, more) if greatest is None else (min(size, greatest), min(more, greatest))
    sets = {"odd": odd, "longer": longer, "one": dict.fromkeys(traced, 1), "zero": dict.fromkeys(traced, 0)}
    if longer == odd:
        del sets["longer"]
    if any(b[0] > 1 for b in bounds.values()):
        del sets["zero"]
    return {k: v for k, v in sets.items() if within(v, declared)}


def long(graph: Graph, traced: Mapping[str, int], length: int) -> dict[str, Sizes]:
    """Sizes with which a sequence that goes through a state is longer than `length`, the others 1."""
    sequences = [q.shape[1] for n in graph.find("attention.linear_attention") if (q := n.operand("q")) is not None]
    symbols = sorted({s for n in sequences if isinstance(n, Dim) for s in n.symbols})
    return {f"long {s}": dict.fromkeys(traced, 1) | {s: length + 3} for s in symbols if s in traced}


def within(sizes: Mapping[str, int], bounds: Mapping[str, tuple[int, int | None]]) -> bool:
    """Whether sizes are inside the bounds, as far as they are there."""
    return all(inside(n, bounds[s]) for s, n in sizes.items() if s in bounds)


def inside(n: int, bound: tuple[int, int | None]) -> bool:
    return n >= bound[0] and (bound[1] is None or n <= bound[1])


def breaking(guards: Sequence[Guard], bases: Sequence[Sizes], declared: Bounds) -> dict[str, Sizes]:
    """For each guard a few sizes that break it, and no other guard where possible: the nearest to a base, the least,
    and well beyond."""
    sets: dict[str, Sizes] = {}
    for g in guards:
        for i, sizes in enumerate(_breaking(g, guards, bases, declared)):
            if sizes not in sets.values() and len(sets) < _MOST:
                sets[f"beyond {g} {i}"] = sizes
    return sets


def breaks_beyond_one(guard: Guard, example: Mapping[str, int]) -> bool:
    """Whether a guard is false for some sizes of 2 or more, as far as that is easily seen."""
    base = {s: max(n, 2) for s, n in example.items()}
    moves = _moves(guard, base, guard.symbols & base.keys())
    return any(min(sizes.values()) >= 2 and not guard.holds(sizes) for sizes in moves)


def _breaking(guard: Guard, guards: Sequence[Guard], bases: Sequence[Sizes], declared: Bounds) -> list[Sizes]:
    found: list[tuple[int, Sizes, Sizes]] = []  # how many guards it breaks, sizes, base
    for ladder in (True, False):  # nothing at all only where nothing else breaks it
        for base in bases:
            moves = _moves(guard, base, guard.symbols & base.keys()) if ladder else _empty(base, guard.symbols)
            for sizes in moves:
                if not guard.holds(sizes) and within(sizes, declared):
                    found.append((sum(not g.holds(sizes) for g in guards), sizes, base))
            if any(broken == 1 for broken, _, _ in found):
                break
        if found:
            break
    if not found:
        return []
    if not ladder:  # a model need not take each: it may have no result for no tokens
        empty = sorted(found, key=lambda x: x[0])
        return [s for i, (_, s, _) in enumerate(empty) if s not in (t for _, t, _ in empty[:i])][:_EMPTIES]
    least = min(broken for broken, _, _ in found)
    best = [(sizes, base) for broken, sizes, base in found if broken == least]
    near = [(sizes, base) for sizes, base in best if max(sizes.values()) <= max(_NEAR, *base.values())]
    if not near:
        return []
    nearest = min(near, key=lambda x: sum(abs(n - x[1][s]) for s, n in x[0].items()))[0]
    chosen = [nearest, min((s for s, _ in near), key=lambda s: sum(s.values()))]
    moved = [s for s in nearest if all(nearest[s] != base[s] for base in bases)] or list(nearest)
    far = [s for s, _ in best if any(s[m] >= 2 * nearest[m] + 3 for m in moved)]
    if far:
        chosen.append(min(far, key=lambda s: math.prod(s.values())))
    return [s for i, s in enumerate(chosen) if s not in chosen[:i]]


def _moves(guard: Guard, base: Sizes, symbols: frozenset[str]) -> Iterator[Sizes]:
    """Sizes around a base with one symbol of a guard changed, then all of them."""
    values = sorted({*_LADDER, *_constants(guard)})
    for s in sorted(symbols):
        yield from ({**base, s: n} for n in (*values, *_flips(guard, base, s, values)))
    if len(symbols) > 1:
        yield from ({**base, **dict.fromkeys(symbols, n)} for n in values)
        first, second, *_ = sorted(symbols)
        yield from ({**base, first: a, second: b} for a in _GRID for b in _GRID)


def _empty(base: Sizes, symbols: frozenset[str]) -> Iterator[Sizes]:
    named = sorted(symbols & base.keys())
    for s in named:
        yield {**base, s: 0}
        yield from ({**base, s: 0, other: 1} for other in named if other != s)


def _constants(guard: Guard) -> set[int]:
    """Sizes that the numbers in a condition point at."""
    expr = guard.condition if guard.stated is None else guard.stated.expr
    numbers = {abs(int(x)) for x in expr.atoms(sympy.Integer)} - {0}
    places = {a // b for a in numbers for b in numbers | {1}}
    if guard.stated is not None:
        places |= set(turns(expr) or ())
    return {n + d for n in places for d in (-1, 0, 1) if 0 < n + d <= _FAR}


def _flips(guard: Guard, base: Sizes, symbol: str, values: Sequence[int]) -> Iterator[int]:
    """The sizes between two of `values` at which a guard changes, where it changes once."""
    held = [guard.holds({**base, symbol: n}) for n in values]
    for i in range(len(values) - 1):
        if held[i] != held[i + 1]:
            low, high = values[i], values[i + 1]
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if guard.holds({**base, symbol: middle}) == held[i] else (low, middle)
            yield from (low, high)
