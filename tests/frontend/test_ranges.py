"""Ranges of sizes out of conditions that a trace assumed, and minima and maxima that they decide."""

from __future__ import annotations

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._sympy.functions import Max, Min

from moec.frontend.ranges import ANY, assumed, extreme

N = sympy.Symbol("n", integer=True, nonnegative=True)
M = sympy.Symbol("m", integer=True, nonnegative=True)


@pytest.mark.parametrize(
    ("condition", "hint", "expected"),
    [
        (sympy.Eq(N, Min(64, N)), 9, (0, 64)),
        (sympy.Eq(N, Min(64, N)), 64, (0, 64)),
        (sympy.Eq(Min(64, 2 * N), 2 * N), 9, (0, 32)),
        (sympy.Eq(Min(5, 2 * N), 2 * N), 2, (0, 2)),
        (sympy.Ne(Min(5, 2 * N), 2 * N), 5, (3, None)),
        (sympy.Eq(Max(0, N - 4), N - 4), 9, (4, None)),
        (sympy.Eq(Max(0, N - 4), 0), 2, (0, 4)),
        (sympy.Le(Min(64, N), 32), 9, (0, 32)),  # turns at 32, not only where the arguments meet
        (sympy.Le(Max(16, N), 64), 4, (0, 64)),
        (sympy.Ne(Min(64, N), 20), 9, None),  # two ranges
        (sympy.Le(N * Min(64, N), 32), 3, None),  # not linear
        (sympy.Eq(N, 9), 9, None),
        (sympy.Eq(M, Min(64, N)), 9, None),
        (sympy.Eq(Min(N, Max(4, N - 1)), N), 9, None),
    ],
)
def test_what_a_condition_says(condition, hint, expected):
    found = assumed([condition], {N: hint, M: hint})
    assert found == ({} if expected is None else {N: expected})


def test_conditions_are_met_together():
    both = assumed([sympy.Eq(N, Min(64, N)), sympy.Eq(Max(0, N - 4), N - 4), sympy.Eq(N, Min(20, N))], {N: 9})
    assert both == {N: (4, 20)}


@given(st.integers(-3, 12), st.integers(-2, 3), st.integers(0, 12), st.booleans())
def test_a_range_holds_throughout(constant, factor, hint, is_max):
    kind = Max if is_max else Min
    condition = sympy.Eq(kind(constant, factor * N), factor * N)
    if condition in (True, False) or not condition.subs(N, hint):
        return
    found = assumed([condition], {N: hint}).get(N)
    if found is not None:
        least, greatest = found
        assert least <= hint
        assert all(condition.subs(N, n) for n in range(least, (40 if greatest is None else greatest) + 1))


FORMS = [N, M, N - 4, N + M, 2 * N, sympy.Integer(0), sympy.Integer(7), N - sympy.Max(0, N - 5), sympy.floor(N / 2)]


@given(st.sampled_from(FORMS), st.sampled_from(FORMS), st.integers(0, 9), st.integers(0, 9), st.booleans())
def test_an_extreme_keeps_its_value(a, b, least, width, is_max):
    kind = sympy.Max if is_max else sympy.Min
    ranges = {N: (least, least + width), M: ANY}
    decided = extreme(kind, (a, b), ranges)
    for n in range(least, least + width + 1):
        for m in (0, 1, 30):
            values = {N: n, M: m}
            assert decided.subs(values) == kind(a.subs(values), b.subs(values))
