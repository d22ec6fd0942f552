"""Conditions on sizes as text."""

from __future__ import annotations

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from moec.frontend.conditions import Condition, simplest
from moec.frontend.signature import Signature, positional
from moec.ir import ArtifactError, CompileError, parse

N, M = (sympy.Symbol(s, integer=True, nonnegative=True) for s in "nm")
SIDES = [N, M, N * M, 2 * N - 3, sympy.Mod(N, 5), sympy.floor(N / 4), sympy.ceiling(M / 3), sympy.Min(N, M, 7),
         sympy.Max(N, 4), N**2, sympy.Integer(12), N / 2,
         -3 * N, 4 * N * M, 6 - 2 * M]  # fmt: skip
KINDS = [sympy.Eq, sympy.Ne, sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt]
relations = st.builds(lambda k, a, b: k(a, b), st.sampled_from(KINDS), st.sampled_from(SIDES), st.sampled_from(SIDES))
conditions = st.one_of(
    relations,
    st.builds(lambda a, b, c: sympy.Or(sympy.And(a, b), sympy.Not(c)), relations, relations, relations),
)


@given(conditions, st.integers(0, 40), st.integers(0, 40))
def test_text_means_the_same(expr, n, m):
    if expr in (sympy.true, sympy.false):
        return
    condition = Condition.of(expr)
    assert Condition.of(condition.expr).holds({"n": n, "m": m}) == condition.holds({"n": n, "m": m})
    assert condition.holds({"n": n, "m": m}) == bool(expr.subs({N: n, M: m}))


@given(relations, st.integers(0, 40), st.integers(0, 40))
def test_without_common_factors_it_means_the_same(expr, n, m):
    if expr in (sympy.true, sympy.false):
        return
    assert bool(simplest(expr).subs({N: n, M: m})) == bool(expr.subs({N: n, M: m}))


@pytest.mark.parametrize(
    ("expr", "simple"),
    [
        (sympy.Le(4, 12 * N * M), "m*n >= 1"),
        (sympy.Ne(32 * N, 32), "n != 1"),
        (sympy.Gt(7, 2 * N), "n <= 3"),
        (sympy.Le(6 * N, 2 * M), "3*n <= m"),
        (sympy.Ne(3 * N, 4), "3*n != 4"),
    ],
)
def test_a_comparison_without_common_factors(expr, simple):
    assert str(Condition.of(simplest(expr))) == simple


def test_what_it_says_nothing_about_holds():
    assert Condition("n <= 3").holds({"m": 9})
    assert Condition("Mod(m, n) == 1").holds({"n": 0, "m": 2})
    assert Condition("n*m <= 4611686018427387904").holds({"n": 2**31, "m": 2**31})
    assert not Condition("n*m <= 4611686018427387904").holds({"n": 2**31, "m": 2**31 + 1})


@pytest.mark.parametrize(
    "text",
    [
        "n", "n <", "1 < n < 3", "f(n) <= 3", "n <= 'a'", "n is m", "n <= 3 if m else 4",
        "not (" * 30 + "n < 1" + ")" * 30, "n <= " + "1" * 3000, "n <= n.real", "__import__('os') == 1",
    ],
)  # fmt: skip
def test_other_text_is_refused(text):
    with pytest.raises(CompileError):
        _ = Condition(text).symbols
    graph = parse("graph(%x: f32[n]) -> (%x: f32[n]) {\n  return %x\n}")
    data = positional(graph).to_dict() | {"conditions": [text]}
    with pytest.raises(ArtifactError, match="'conditions' is missing or malformed"):
        Signature.from_dict(data)
