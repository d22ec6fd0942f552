"""Linear attention: every form, strided operands, narrow floats, empty sequences."""

import itertools

import pytest
import torch

from moec.backends.triton import run
from moec.ir import lookup


def operands(decay, beta, state, batch=2, length=5, shared=2, heads=4, rows=3, columns=5, dtype=torch.float32):
    q, k, v = (torch.randn(batch, length, *s) for s in ((shared, rows), (shared, rows), (heads, columns)))
    each = (batch, length, heads)
    given = [q, k / rows**0.5, v]
    given.append(-torch.rand(*each, *([rows] if decay == "row" else [])) if decay else None)
    given.append(torch.rand(each) if beta else None)
    given.append(torch.randn(batch, heads, rows, columns) if state else None)
    return [None if x is None else x.to(dtype) for x in given]


def expected(given, scale):
    wide = [None if x is None else x.double() for x in given]
    return lookup("attention.linear_attention").instance(wide, {"scale": scale}).reference()


@pytest.mark.parametrize(
    ("decay", "beta", "state"), itertools.product((None, "head", "row"), (False, True), (False, True))
)
def test_forms(close, decay, beta, state):
    given = operands(decay, beta, state)
    for got, want in zip(run("linear_attention", *given, scale=0.3), expected(given, 0.3), strict=True):
        close(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_floats(close, dtype):
    given = operands("head", True, True, dtype=dtype)
    for got, want in zip(run("linear_attention", *given), expected(given, 1.0), strict=True):
        assert got.dtype == dtype
        close(got, want)


SIZES = [
    {"length": 0}, {"batch": 0}, {"columns": 1, "heads": 6, "shared": 1, "rows": 16}, {"rows": 1, "columns": 70},
    {"rows": 300, "columns": 40, "length": 2},
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(close, sizes):
    """No token, no row, Mamba's layout, and states in several programs."""
    given = operands("row", False, True, **sizes)
    for got, want in zip(run("linear_attention", *given), expected(given, 1.0), strict=True):
        close(got, want)


def test_strides(close):
    given = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in operands("head", True, True)]
    for got, want in zip(run("linear_attention", *given), expected(given, 1.0), strict=True):
        close(got, want)


def test_refusals():
    q, k, v, decay, *_ = operands("head", True, False)
    with pytest.raises(ValueError, match=r"decay must have shape \[2, 5, 4\], got float32\[2, 5, 3\]"):
        run("linear_attention", q, k, v, decay[..., :3])
    with pytest.raises(ValueError, match="3 heads are no multiple of 2 key heads"):
        run("linear_attention", q, k, v[:, :, :3])
    with pytest.raises(ValueError, match="keys may be at most 1024 wide"):
        run("linear_attention", *(torch.zeros(1, 1, 1, 1025),) * 2, torch.zeros(1, 1, 1, 2))
