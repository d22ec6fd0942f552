"""Run by test_interpreter.py in a process with TRITON_INTERPRET=1; prints one line for each check that holds."""

import pytest
import torch
import triton
import triton.language as tl

from moec.backends.triton import mode, run
from moec.backends.triton.interpreter import exact_interpreter
from moec.backends.triton.launch import launch

E4M3 = torch.float8_e4m3fn


@triton.jit
def cast_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(y_ptr + i, x.to(y_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + i, tl.dot(tl.load(a_ptr + i), tl.load(b_ptr + i), input_precision="ieee"))


@triton.jit
def bad_add_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i) + tl.load(x_ptr + i))


def cast(x, dtype):
    y = torch.empty(x.shape, dtype=dtype)
    launch(cast_kernel, (1,), x, y, x.numel(), BLOCK=1 << (x.numel() - 1).bit_length())
    return y


def dot(a, b):
    out = torch.empty(a.shape, dtype=torch.float32)
    launch(dot_kernel, (1,), a, b, out, N=a.shape[0])
    return out


def e4m3_value(code):
    """The value of a code by the format's definition (OCP FP8: bias 7, no infinities, S.1111.111 is NaN)."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def same_bits(a, b):
    view = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.view(view), b.view(view))


def check_e4m3_decodes():
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3)
    want = torch.tensor([e4m3_value(c) for c in range(256)])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        got = cast(codes, dtype).float()
        assert torch.equal(got.isnan(), want.isnan()), dtype
        assert torch.equal(got.nan_to_num(), want.nan_to_num()), dtype


def check_e4m3_encodes():
    values = torch.tensor([e4m3_value(c) for c in range(127)])
    middle = (values[:-1] + values[1:]) / 2
    up, down = middle * (1 + 2**-20), middle * (1 - 2**-20)
    even = torch.arange(126) + (torch.arange(126) % 2)  # of the two codes around a midpoint the even one
    for x, want in ((values, torch.arange(127)), (middle, even), (up, torch.arange(1, 127)), (down, torch.arange(126))):
        for sign, bit in ((1, 0), (-1, 128)):
            got = cast(sign * x, E4M3).view(torch.uint8).long()
            assert torch.equal(got, want + bit), (x, got)


def check_e4m3_saturates():
    x = torch.tensor([448.0, 449.0, 464.0, 465.0, 1e9, float("inf"), -500.0, float("-inf"), float("nan")])
    got = cast(x, E4M3)
    assert torch.equal(got.float()[:8], torch.tensor([448.0] * 6 + [-448.0] * 2))
    assert got.float()[8].isnan()
    assert same_bits(got, x.to(E4M3))
    assert torch.equal(cast(x.bfloat16(), E4M3).float()[:8], got.float()[:8])


def check_e5m2_matches_torch():
    x = torch.randn(500) * 10.0 ** torch.randint(-6, 7, (500,))
    assert same_bits(cast(x, torch.float8_e5m2), x.clamp(-57344, 57344).to(torch.float8_e5m2))


def check_bf16_matches_torch():
    x = torch.randn(1000) * 10.0 ** torch.randint(-30, 30, (1000,))
    x = torch.cat([x, torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38])])
    assert same_bits(cast(x, torch.bfloat16), x.bfloat16())
    assert cast(torch.tensor([float("nan")]), torch.bfloat16).isnan().all()
    assert torch.equal(cast(x.bfloat16(), torch.float32), x.bfloat16().float())
    half = x.clamp(-100, 100).half()
    assert same_bits(cast(half, torch.bfloat16), half.bfloat16())
    assert torch.equal(cast(torch.tensor([1.9, -1.9, 7.5]).bfloat16(), torch.int32), torch.tensor([1, -1, 7]).int())
    assert torch.equal(
        cast(torch.tensor([3, -300], dtype=torch.int32), torch.bfloat16).float(), torch.tensor([3.0, -300])
    )


def check_dot_matches_torch():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, E4M3):
        a, b = torch.randn(32, 32).to(dtype), torch.randn(32, 32).to(dtype)
        got, want = dot(a, b).double(), a.double() @ b.double()
        assert (got - want).abs().max() < 1e-4, dtype


def check_narrow_arithmetic_is_refused():
    x = torch.randn(16).bfloat16()
    with pytest.raises(Exception, match="convert to f32 first"):
        launch(bad_add_kernel, (1,), x, torch.empty_like(x), BLOCK=16)


def check_patch_ends_with_the_block():
    """Outside our own launches the interpreter is the stock one, with its faults (if this fails, drop the shim)."""
    a = torch.randn(32, 32).bfloat16()
    stock = torch.empty(32, 32)
    dot_kernel[(1,)](a, a, stock, N=32)
    want = a.double() @ a.double()
    assert (stock.double() - want).abs().max() > 1
    with exact_interpreter(), exact_interpreter():
        pass
    again = torch.empty(32, 32)
    dot_kernel[(1,)](a, a, again, N=32)
    assert torch.equal(stock, again)


def check_runs_in_this_process():
    assert mode() == "interpreter"
    x, w = torch.randn(3, 20).bfloat16(), torch.randn(5, 20).bfloat16()
    got = run("linear", x, w)
    assert (got.double() - x.double() @ w.double().T).abs().max() < 0.1
    assert "moec.backends.triton.kernels.linear" in __import__("sys").modules


if __name__ == "__main__":
    torch.manual_seed(0)
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check()
            print(name)
