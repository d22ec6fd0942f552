"""Functions of single elements that generated kernels call, on float32, float64 or integer blocks.

Each gives what torch gives: NaN, infinities, signs and the direction of rounding included. Functions that Triton has
only through CUDA's libdevice are composed here, so that the interpreter computes the very same.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def divide(a, b):
    """a / b, correctly rounded."""
    if a.dtype == tl.float32:
        q = tl.div_rn(a, b)
    else:
        q = a / b
    return q


@triton.jit
def square_root(x):
    """√x, correctly rounded."""
    if x.dtype == tl.float32:
        y = tl.sqrt_rn(x)
    else:
        y = tl.sqrt(x)
    return y


@triton.jit
def reciprocal(x):
    return divide(tl.full(x.shape, 1.0, x.dtype), x)


@triton.jit
def sign(x):
    """−1, 0 or 1; 0 for NaN."""
    return tl.where(x > 0, 1, 0).to(x.dtype) - tl.where(x < 0, 1, 0).to(x.dtype)


@triton.jit
def relu(x):
    return tl.where(x < 0, tl.zeros(x.shape, x.dtype), x)


@triton.jit
def log1p(x):
    """ln(1 + x) without cancellation near 0 (W. Kahan; Goldberg 1991, theorem 4)."""
    u = 1.0 + x
    inexact = (u != 1.0) & (x != float("inf"))
    y = tl.log(tl.where(inexact, u, 2.0)) * divide(x, tl.where(inexact, u - 1.0, 1.0))
    return tl.where(inexact, y, x)


@triton.jit
def sigmoid(x):
    return reciprocal(1.0 + tl.exp(-x))


@triton.jit
def silu(x):
    return divide(x, 1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """ln(1 + e^x), x itself above 40, where the rest is less than half a unit of float64."""
    return tl.where(x > 40.0, x, log1p(tl.exp(tl.where(x > 40.0, 0.0, x))))


@triton.jit
def tanh(x):
    """1 − 2 / (e^2|x| + 1); near 0, where that cancels, the odd series of tanh to x¹³, for float64 (e^2|x| − 1) /
    (e^2|x| + 1) with Kahan's e^y − 1 = (u − 1) y / ln u, u = e^y rounded."""
    size = tl.abs(x)
    far = 1.0 - divide(tl.full(x.shape, 2.0, x.dtype), tl.exp(2.0 * size) + 1.0)
    z = x * x
    c13 = tl.full(x.shape, 21844.0 / 6081075.0, x.dtype)
    c11 = tl.full(x.shape, -1382.0 / 155925.0, x.dtype)
    c9 = tl.full(x.shape, 62.0 / 2835.0, x.dtype)
    c7 = tl.full(x.shape, -17.0 / 315.0, x.dtype)
    c5 = tl.full(x.shape, 2.0 / 15.0, x.dtype)
    c3 = tl.full(x.shape, -1.0 / 3.0, x.dtype)
    if x.dtype == tl.float64:
        u = tl.exp(2.0 * x)
        inexact = (u != 1.0) & (size < 0.25)
        less = divide((u - 1.0) * (2.0 * x), tl.log(tl.where(inexact, u, 2.0)))
        series = tl.where(inexact, divide(less, less + 2.0), x)
    else:
        series = x + x * z * (c3 + z * (c5 + z * (c7 + z * (c9 + z * (c11 + z * c13)))))
    return tl.where(size < 0.25, series, tl.where(x < 0, -far, far))


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * tl.full(x.shape, 0.7071067811865476, x.dtype)))


@triton.jit
def gelu_tanh(x):
    inner = tl.full(x.shape, 0.7978845608028654, x.dtype) * (x + tl.full(x.shape, 0.044715, x.dtype) * x * x * x)
    return 0.5 * x * (1.0 + tanh(inner))


@triton.jit
def round_even(x):
    """To the nearest integer, ties to even."""
    low = tl.floor(x)
    rest = x - low
    odd = tl.floor(low * 0.5) * 2.0 != low
    return tl.where((rest > 0.5) | ((rest == 0.5) & odd), low + 1.0, low)


@triton.jit
def larger(a, b):
    """max(a, b); NaN wins."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def smaller(a, b):
    """min(a, b); NaN wins."""
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def floor_divide_int(a, b):
    q = a // b  # rounds towards zero
    r = a - q * b
    return tl.where((r != 0) & ((r < 0) != (b < 0)), q - 1, q).to(a.dtype)


@triton.jit
def modulo_int(a, b):
    r = a - (a // b) * b
    return tl.where((r != 0) & ((r < 0) != (b < 0)), r + b, r).to(a.dtype)


@triton.jit
def modulo(a, b):
    """Remainder with the sign of b."""
    r = a % b  # has the sign of a
    return tl.where((r != 0.0) & ((r < 0.0) != (b < 0.0)), r + b, r)


@triton.jit
def floor_divide(a, b):
    """⌊a / b⌋ of the exact quotient, as Python and torch define it: (a − a mod b) / b, then to the nearest integer.
    The remainder that has the sign of a is taken off, so that ±∞ as b gives 0 or −1."""
    r = a % b
    q = divide(a - r, b)
    q = tl.where((r != 0.0) & ((r < 0.0) != (b < 0.0)), q - 1.0, q)
    low = tl.floor(q)
    return tl.where(b == 0.0, divide(a, b), tl.where(q - low > 0.5, low + 1.0, low))


@triton.jit
def power(a, b):
    """a^b through float64, with the special cases of IEEE 754 pow; relative error |b ln a| · 2⁻⁵³."""
    x, y = a.to(tl.float64), b.to(tl.float64)
    size = tl.exp(y * tl.log(tl.abs(x)))
    size = tl.where((tl.abs(x) == 1.0) & (y == y), 1.0, size)
    whole = (tl.floor(y) == y) | (tl.abs(y) == float("inf"))
    odd = whole & (tl.abs(y) < 9007199254740992.0) & (tl.floor(y * 0.5) * 2.0 != y)
    nan = tl.full(x.shape, float("nan"), tl.float64)
    negative = (x < 0.0) | (reciprocal(x) < 0.0)  # −0 as well
    result = tl.where(negative & odd, -size, size)
    result = tl.where((x < 0.0) & (x != float("-inf")) & (whole == 0), nan, result)
    result = tl.where((x == 1.0) | (y == 0.0), 1.0, result)
    return result.to(a.dtype)
