"""Comparison with a float64 result, at a tolerance that follows from the dtype under test."""

import pytest
import torch

# Relative to |expected| + rms(expected): one rounding of the result, and the accumulated roundings of its inputs.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def assert_close(actual, expected, roundings=1):
    """`actual` has `expected`'s shape and lies within `roundings` times its dtype's tolerance; NaN meets NaN."""
    assert actual.shape == expected.shape
    a, e = actual.double(), expected.double()
    assert torch.equal(a.isnan(), e.isnan())
    a, e = a.nan_to_num(), e.nan_to_num()
    if e.numel():
        bound = roundings * TOLERANCE[actual.dtype] * (e.abs() + e.square().mean().sqrt())
        worst = ((a - e).abs() - bound).argmax()
        ok = bool(((a - e).abs() <= bound).all())
        assert ok, f"{a.flatten()[worst]} against {e.flatten()[worst]} at {worst} of {tuple(a.shape)}"


@pytest.fixture
def close():
    return assert_close


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(7)
