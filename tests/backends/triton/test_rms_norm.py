"""RMSNorm, with and without weight and residual."""

import pytest
import torch

from moec.backends.triton import run

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def expected(x, weight, eps):
    y = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight.double()


@pytest.mark.parametrize("shape", [(1, 1), (5, 70), (2, 3, 64), (130, 33), (7,), (0, 16), (3, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(close, shape, dtype):
    x, weight = (3 * torch.randn(shape)).to(dtype), torch.randn(shape[-1]).to(dtype)
    y = run("rms_norm", x, weight, 1e-5)
    assert y.dtype == dtype
    close(y, expected(x, weight, 1e-5), roundings=2)  # once before the weight, once after
    close(run("rms_norm", x), expected(x, None, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual(close, dtype):
    x, residual, weight = torch.randn(6, 50).to(dtype), torch.randn(6, 50).to(dtype), torch.randn(50).to(dtype)
    y, total = run("rms_norm", x, weight, residual=residual)
    assert torch.equal(total, x + residual)
    close(y, expected(x + residual, weight, 1e-6), roundings=2)


def test_rounds_before_the_weight():
    """As the Llama family does: the two roundings are visible in bfloat16."""
    x, weight = torch.randn(64, 64).bfloat16(), torch.randn(64).bfloat16()
    rounded = expected(x, None, 1e-6).bfloat16() * weight
    assert (run("rms_norm", x, weight) != rounded).float().mean() < 0.005
    assert (expected(x, weight, 1e-6).bfloat16() != rounded).float().mean() > 0.05


def test_strided_and_zero_and_nan(close):
    x = torch.randn(40, 12).T
    close(run("rms_norm", x), expected(x, None, 1e-6))
    x = torch.zeros(3, 40)
    x[1, 5] = float("nan")
    y = run("rms_norm", x)
    assert y[0].eq(0).all()
    assert y[1].isnan().all()
    assert y[2].eq(0).all()


def test_refusals():
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"weight must have shape \[8\], got float32\[7\]"):
        run("rms_norm", x, torch.randn(7))
    with pytest.raises(ValueError, match=r"residual must be torch\.float32 as x is"):
        run("rms_norm", x, residual=x.bfloat16())
    with pytest.raises(ValueError, match="x must be float32, bfloat16 or float16, got int64"):
        run("rms_norm", torch.ones(2, 3, dtype=torch.int64))
