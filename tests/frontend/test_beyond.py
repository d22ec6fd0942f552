"""Branches on sizes behind branches that make no difference where they are tried first."""

import math
from collections.abc import Callable

import pytest
import torch

import moec
from moec.frontend import trace


class Branching(torch.nn.Module):
    """+ or −, by sizes."""

    def __init__(self, adds: Callable[[int, int], bool]):
        super().__init__()
        self.adds = adds

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.sum() + y.sum() if self.adds(x.shape[0], y.shape[0]) else x.sum() - y.sum()


def one_of(n: int, m: int) -> bool:
    return n <= 7 or m != 12


def a_product(n: int, m: int) -> bool:
    return n <= 7 or m <= 40 or n * m != 1000


def ladder(n: int, m: int) -> bool:
    if n <= 6:
        return True
    if n <= 20:
        return m >= 1
    return n <= 48


def equal(n: int, m: int) -> bool:
    return n <= 7 or n != m


def three_deep(n: int, m: int) -> bool:
    if n <= 6 or m <= 6:
        return True
    return n <= 10 or m % 5 != 0


def not_a_size(n: int, m: int) -> bool:
    return n <= 7 or math.sqrt(m) != 4.0


MODELS = [one_of, a_product, ladder, equal, three_deep]
SIZES = [
    (4, 5),
    (1, 1),
    (8, 11),
    (8, 12),
    (7, 12),
    (20, 50),
    (20, 40),
    (21, 3),
    (49, 3),
    (80, 7),
    (11, 10),
    (12, 25),
    (9, 9),
]


@pytest.mark.parametrize("adds", MODELS)
def test_a_call_is_right_or_refused(adds: Callable[[int, int], bool]) -> None:
    model = Branching(adds)
    program = moec.compile(model, (torch.randn(4), torch.randn(5)), backend="reference", dynamic_shapes="auto")
    refused = []
    for n, m in SIZES:
        x, y = torch.randn(n), torch.randn(m)
        try:
            got = program(x, y)
        except moec.ArgumentValueError:
            refused.append((n, m))
        else:
            torch.testing.assert_close(got, model(x, y))
    assert (4, 5) not in refused
    assert (8, 11) not in refused
    assert [s for s in SIZES if not adds(*s)] == refused


def test_what_makes_no_difference_at_all_restricts_nothing() -> None:
    def anyway(n: int, m: int) -> bool:
        if n > 6:
            return True
        return m > 9 or n != 5 or m >= 0

    traced = trace(Branching(anyway), (torch.randn(4), torch.randn(5)), dynamic_shapes="auto")
    assert not traced.signature.bounds
    assert not traced.signature.conditions


def test_where_the_model_cannot_be_traced_beyond_the_branch_stays() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            if y.shape[0] > 6:
                y = y * 1
            if x.shape[0] > 7 and float(x.sum()) > 1e9:  # eager code may ask for values, a trace may not
                return x.sum() - y.sum()
            return x.sum() + y.sum()

    traced = trace(Model(), (torch.randn(4), torch.randn(5)), dynamic_shapes="auto")
    assert traced.signature.bounds == {"B": (0, 7)}
    assert not traced.signature.conditions


def test_a_size_that_is_fixed_beyond_a_branch() -> None:
    model = Branching(not_a_size)  # math.sqrt takes the size as a number
    program = moec.compile(model, (torch.randn(4), torch.randn(5)), backend="reference", dynamic_shapes="auto")
    x, y = torch.randn(6), torch.randn(16)
    torch.testing.assert_close(program(x, y), model(x, y))
    with pytest.raises(moec.ArgumentValueError, match="dimension B is 8; the program holds for at most 7"):
        program(torch.randn(8), y)
