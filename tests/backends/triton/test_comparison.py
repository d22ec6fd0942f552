"""The comparison helper itself: it accepts rounding and rejects a 1% error."""

import pytest
import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accepts_rounding(close, dtype):
    expected = torch.randn(40, 30, dtype=torch.float64)
    close(expected.to(dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rejects_one_percent(close, dtype):
    expected = torch.randn(40, 30, dtype=torch.float64)
    with pytest.raises(AssertionError):
        close((expected * 1.01).to(dtype), expected)


def test_rejects_shape_and_nan(close):
    expected = torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(AssertionError):
        close(expected.float()[:2], expected)
    broken = expected.float()
    broken[1, 1] = float("nan")
    with pytest.raises(AssertionError):
        close(broken, expected)
