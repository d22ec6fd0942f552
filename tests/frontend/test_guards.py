"""What a trace took as true of sizes is compared with the model, and asked of every call where it matters."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import nn
from torch.export import Dim

import moec
from moec.frontend import trace
from moec.frontend.guards import always
from moec.ir import ArgumentValueError, CompileError

AUTO = Dim.AUTO


class Branch(nn.Module):
    """x·2 where a condition on rows n and columns m holds, else x·3."""

    def __init__(self, condition):
        super().__init__()
        self.condition = condition

    def forward(self, x):
        n, m = x.shape
        return x * 2 if self.condition(n, m) else x * 3


def steps(*branches):
    """relu, and for each (condition on the rows, change) the change where it holds."""

    class Steps(nn.Module):
        def forward(self, x):
            y = x.relu()
            for condition, change in branches:
                if condition(x.shape[0]):
                    y = change(y)
            return y

    return Steps()


def compiled(model):
    return moec.compile(model, (torch.randn(4, 3),), backend="reference", dynamic_shapes={"x": {0: AUTO, 1: AUTO}})


def check(program, model, taken, refused, words):
    for shape in taken:
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), model(x))
    for shape in refused:
        with pytest.raises(ArgumentValueError, match=words):
            program(torch.randn(shape))


CASES = [
    (lambda n, m: n % 7 != 0, [(6, 3), (15, 1)], [(14, 3), (7, 2)], r"sizes with Mod\(B, 7\) != 0, got B = (14|7)"),
    (lambda n, m: max(n, 16) <= 64, [(1, 3), (64, 3)], [(65, 3), (101, 3)], "at most 64"),
    (lambda n, m: n * m <= 1000, [(50, 20), (1000, 1)], [(50, 50)], r"B\*S <= 1000, got B = 50, S = 50"),
    (lambda n, m: max(n, m) <= 64, [(64, 64)], [(5, 100), (65, 5)], r"Max\(B, S\) <= 64"),
    (lambda n, m: min(n, 64) != 20, [(19, 3), (21, 3), (300, 3)], [(20, 3)], r"Min\(64, B\) != 20"),
    (lambda n, m: n + m != 12, [(4, 7), (30, 12)], [(4, 8), (11, 1)], r"B \+ S != 12, got B = \d+, S = \d"),
    (lambda n, m: n > m, [(5, 4), (100, 99)], [(4, 4), (4, 9)], "S < B|B > S"),
]


@pytest.mark.parametrize(("condition", "taken", "refused", "words"), CASES)
def test_a_condition_that_matters_is_asked_of_calls(condition, taken, refused, words):
    model = Branch(condition)
    check(compiled(model), model, taken, refused, words)


def test_conditions_are_saved(tmp_path):
    program = compiled(Branch(lambda n, m: n % 7 != 0 and m <= 5))
    program.save(tmp_path / "saved")
    loaded = moec.load(tmp_path / "saved")
    assert loaded.signature == program.signature
    assert loaded.signature.conditions == ("Mod(B, 7) != 0",)
    with pytest.raises(ArgumentValueError, match=r"Mod\(B, 7\) != 0, got B = 14"):
        loaded(torch.randn(14, 3))


@pytest.mark.parametrize(
    "branches",
    [
        [(lambda n: n <= 8, torch.clone), (lambda n: n > 100, lambda y: y * 2)],
        [(lambda n: n > 100, lambda y: y * 2), (lambda n: n <= 8, torch.clone)],
        # the second asks nothing new of a trace at 4 rows
        [(lambda n: n <= 8, torch.clone), (lambda n: n <= 100, lambda y: y * 2)],
        [(lambda n: n <= 8, torch.clone), (lambda n: n <= 30, torch.clone), (lambda n: n > 100, lambda y: y * 2)],
    ],
)
def test_a_bound_that_makes_no_difference_is_dropped_alone(branches):
    model = steps(*branches)
    program = compiled(model)
    assert program.signature.bounds == {"B": (0, 100)}
    check(program, model, [(1, 3), (9, 3), (31, 3), (100, 3)], [(101, 3), (200, 3)], "at most 100")


def test_conditions_that_make_no_difference_are_dropped():
    model = steps((lambda n: n % 3 != 0, torch.clone), (lambda n: n != 17, torch.clone))
    signature = trace(model, (torch.randn(4, 3),), dynamic_shapes={"x": {0: "n"}}).signature
    assert (signature.bounds, signature.conditions) == ({}, ())


def test_what_cannot_be_asked_of_a_call_is_refused():
    with pytest.raises(CompileError, match=r"holds only where .*cannot be asked of a call: at n=\d+") as caught:
        trace(Branch(lambda n, m: n / 3 < 7.5), (torch.randn(4, 3),), dynamic_shapes={"x": {0: "n"}})
    assert caught.value.code == "dynamic-shape"


def test_guards_of_an_exported_program_are_asked():
    program = torch.export.export(
        Branch(lambda n, m: n % 7 != 0), (torch.randn(4, 3),), dynamic_shapes={"x": {0: AUTO}}, strict=False
    )
    program = moec.compile(program, backend="reference")
    assert program(torch.ones(1, 3)).shape == (1, 3)
    with pytest.raises(ArgumentValueError, match=r"Mod\(B, 7\) != 0"):
        program(torch.ones(14, 3))


N, M = (sympy.Symbol(s, integer=True, nonnegative=True) for s in "nm")


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (sympy.Ne(3 * N * M, 1), True),
        (sympy.Ne(3 * N * M, 6), False),
        (sympy.Ne(3 * N + 2 * M, 1), False),
        (sympy.Le(8 * N * (M - 1) + 8 * N, 8 * N * M), True),
        (sympy.Lt(8 * N * (M - 1) + 8 * N, 8 * N * M), False),
        (sympy.Lt(N, N * M + N + 1), True),
        (sympy.Ge(N, 1), False),
        (sympy.Gt(sympy.Max(N, 4), 3), False),
    ],
)
def test_what_is_always_true(condition, expected):
    assert always(condition) is expected
    if expected:
        assert all(condition.subs({N: n, M: m}) == True for n in range(5) for m in range(5))  # noqa: E712
