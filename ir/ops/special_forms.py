"""Special functions in terms of `math` ops: what `extern.aten_*` ops decompose to where a backend lacks them.

Computed in float32 (float64 operands in float64, to float32's accuracy: the interpolants are no better).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from moec.ir.ops.chebyshev import evaluated, within
from moec.ir.types import DType

FORMS: dict[str, Callable[[Any, Any], Any]] = {}
_HALF = (DType.F16, DType.BF16)


def of_one(*names: str) -> Any:
    """Register `fn(b, x)` for functions of one operand; half-width floats are computed in f32."""

    def register(fn: Any) -> Any:
        def form(op: Any, b: Any) -> Any:
            return _computed(op, b, getattr(op, "self" if hasattr(op, "self") else "x"), fn)

        FORMS.update(dict.fromkeys(names, form))
        return fn

    return register


def _computed(op: Any, b: Any, x: Any, fn: Any) -> Any:
    dtype = op.types[0].dtype
    wide = DType.F32 if dtype in _HALF else dtype
    y = fn(b, x if x.dtype is wide else b.cast(x, dtype=wide))
    return y if wide is dtype else b.cast(y, dtype=dtype)


def select(b: Any, condition: Any, a: Any, c: Any) -> Any:
    like = next(v for v in (a, c) if not isinstance(v, float))
    a, c = (b.constant_like(v, like) if isinstance(v, float) else v for v in (a, c))
    return b.where(condition, a, c)


def _isinf(b: Any, x: Any) -> Any:
    return b.eq(b.abs(x), math.inf)


# -- gamma --------------------------------------------------------------------------------------------


def _fraction(b: Any, x: Any) -> Any:
    return b.sub(x, b.floor(x))


def _sin_pi(b: Any, x: Any) -> Any:
    """|sin πx|, from the distance to the nearest integer."""
    r = b.abs(b.sub(x, b.round(x)))
    return b.sin(b.mul(r, math.pi))


def _lgamma_positive(b: Any, z: Any) -> Any:
    """Stirling's series at z + 8 below 8, less ln of the product that leads there."""
    small = b.lt(z, 8.0)
    y = select(b, small, b.add(z, 8.0), z)
    r = b.reciprocal(y)
    r2 = b.mul(r, r)
    series = b.mul(r, b.add(b.mul(r2, b.add(b.mul(r2, 1 / 1260), -1 / 360)), 1 / 12))
    main = b.sub(b.mul(b.sub(y, 0.5), b.log(y)), y)
    out = b.add(b.add(main, 0.5 * math.log(2 * math.pi)), series)
    product = inner = select(b, small, z, 1.0)
    for k in range(1, 8):
        product = b.mul(product, b.add(inner, float(k)))
    out = b.sub(out, select(b, small, b.log(product), 0.0))
    return select(b, _isinf(b, z), math.inf, out)


@of_one("lgamma")
def lgamma(b: Any, x: Any) -> Any:
    """Below 1/2 by reflection: ln Γ(x) = ln(π / |sin πx|) − ln Γ(1 − x)."""
    low = b.lt(x, 0.5)
    above = _lgamma_positive(b, select(b, low, b.sub(1.0, x), x))
    mirrored = b.sub(b.sub(math.log(math.pi), b.log(_sin_pi(b, x))), above)
    y = select(b, low, mirrored, above)
    return select(b, _isinf(b, x), math.inf, y)


def _digamma_positive(b: Any, z: Any) -> Any:
    y, total = z, None
    for _ in range(10):
        below = b.lt(y, 10.0)
        term = select(b, below, b.reciprocal(y), 0.0)
        total = term if total is None else b.add(total, term)
        y = select(b, below, b.add(y, 1.0), y)
    r = b.reciprocal(y)
    r2 = b.mul(r, r)
    series = b.mul(r2, b.sub(1 / 12, b.mul(r2, b.sub(1 / 120, b.mul(r2, 1 / 252)))))
    return b.sub(b.sub(b.sub(b.log(y), b.mul(r, 0.5)), series), total)


@of_one("digamma")
def digamma(b: Any, x: Any) -> Any:
    """Below 0 by reflection: ψ(x) = ψ(1 − x) − π / tan πx; NaN at negative integers, ∓∞ at ±0."""
    low = b.lt(x, 0.0)
    above = _digamma_positive(b, select(b, low, b.sub(1.0, x), x))
    r = b.mul(b.sub(x, b.round(x)), math.pi)
    mirrored = b.sub(above, b.div(b.mul(b.cos(r), math.pi), b.sin(r)))
    y = select(b, low, mirrored, above)
    pole = b.and_(low, b.eq(_fraction(b, x), 0.0))
    y = select(b, pole, math.nan, y)
    return select(b, b.eq(x, 0.0), b.neg(b.reciprocal(x)), y)


_BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66)  # B₂ₖ


def _zeta_positive(b: Any, s: Any, q: Any) -> Any:
    """Hurwitz ζ(s, q) for q > 0: ten terms, and Euler and Maclaurin's rest."""
    minus = b.neg(s)
    total = b.pow(q, minus)
    for k in range(1, 10):
        total = b.add(total, b.pow(b.add(q, float(k)), minus))
    a = b.add(q, 10.0)
    power = b.pow(a, minus)
    total = b.add(b.add(total, b.div(b.mul(power, a), b.sub(s, 1.0))), b.mul(power, 0.5))
    factor, scale = s, b.div(power, a)
    for k, bernoulli in enumerate(_BERNOULLI, 1):
        total = b.add(total, b.mul(b.mul(factor, scale), bernoulli / math.factorial(2 * k)))
        factor = b.mul(factor, b.mul(b.add(s, 2.0 * k - 1), b.add(s, 2.0 * k)))
        scale = b.div(scale, b.mul(a, a))
    return total


def _zeta(b: Any, s: Any, q: Any) -> Any:
    """For q < 0 and whole s, the terms below 0 mirrored: (−1)ˢ (ζ(s, r) − ζ(s, 1 − q)) + ζ(s, q + m), m = ⌈−q⌉."""
    negative = b.lt(q, 0.0)
    m = select(b, negative, b.ceil(b.neg(q)), 0.0)
    up = b.add(q, m)
    main = _zeta_positive(b, s, select(b, b.eq(up, 0.0), 1.0, up))
    r = select(b, negative, b.sub(b.neg(q), b.sub(m, 1.0)), 1.0)
    mirrored = b.sub(_zeta_positive(b, s, r), _zeta_positive(b, s, select(b, negative, b.sub(1.0, q), 1.0)))
    odd = b.ne(b.mod(s, 2.0), 0.0)
    y = b.add(main, select(b, negative, select(b, odd, b.neg(mirrored), mirrored), 0.0))
    whole = b.eq(b.floor(s), s)
    y = select(b, b.and_(negative, b.not_(whole)), math.nan, y)
    pole = b.and_(b.le(q, 0.0), b.eq(_fraction(b, q), 0.0))
    y = select(b, pole, math.inf, y)
    y = select(b, b.eq(s, 1.0), math.inf, y)
    return select(b, b.lt(s, 1.0), math.nan, y)


def _polygamma(op: Any, b: Any) -> Any:
    """(−1)ⁿ⁺¹ n! ζ(n + 1, x)"""

    def form(b: Any, x: Any) -> Any:
        if op.n == 0:
            return digamma(b, x)
        sign = 1.0 if op.n % 2 else -1.0
        return b.mul(_zeta(b, b.constant_like(op.n + 1.0, x), x), sign * math.factorial(op.n))

    return _computed(op, b, op.self, form)


def _special_zeta(op: Any, b: Any) -> Any:
    return _computed(op, b, op.self, lambda b, s: _zeta(b, s, b.cast(op.other, dtype=s.dtype)))


FORMS |= {"polygamma": _polygamma, "special_zeta": _special_zeta}


# -- error functions ----------------------------------------------------------------------------------


def _erfinv_ratio(t: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """erfinv(x) / x over √w, w = −ln(1 − x²), on [low, high]; at the far end from its asymptotic equation."""
    w = ((t + 1) / 2 * (high - low) + low).square()
    rest = torch.exp(-w)  # 1 − x²
    x = torch.sqrt(-torch.expm1(-w))
    y = torch.special.erfinv(x.clamp(max=1 - 1e-14))
    tail = rest / (1 + x)  # erfc(y), exact where 1 − x is lost
    far = torch.sqrt((w - 0.5 * torch.log(math.pi * w.clamp(min=1.0))).clamp(min=0.1))
    y = torch.where(w > 25, far, y)
    for _ in range(6):  # Newton on ln erfc(y) = ln tail
        f = torch.log(torch.special.erfcx(y)) - y * y - torch.log(tail)
        y = torch.where(w > 1, y + f * torch.special.erfcx(y) * math.sqrt(math.pi) / 2, y)
    return torch.where(x > 0, y / x, math.sqrt(math.pi) / 2)


def _near(t: torch.Tensor) -> torch.Tensor:
    return _erfinv_ratio(t, 0.0, 3.0)


def _far(t: torch.Tensor) -> torch.Tensor:
    return _erfinv_ratio(t, 3.0, 13.5)


def _inverse(b: Any, x: Any, rest: Any) -> Any:
    """erfinv(x), given 1 − x²."""
    root = b.sqrt(b.neg(b.log(b.min(rest, b.constant_like(1.0, rest)))))
    near, far = evaluated(b, _near, within(b, root, 0.0, 3.0)), evaluated(b, _far, within(b, root, 3.0, 13.5))
    y = b.mul(x, select(b, b.lt(root, 3.0), near, far))
    y = select(b, b.eq(rest, 0.0), b.mul(b.sign(x), math.inf), y)
    return select(b, b.lt(rest, 0.0), math.nan, y)


@of_one("erfinv")
def erfinv(b: Any, x: Any) -> Any:
    return _inverse(b, x, b.mul(b.sub(1.0, x), b.add(x, 1.0)))


@of_one("special_ndtri")
def ndtri(b: Any, p: Any) -> Any:
    """√2 erfinv(2p − 1)"""
    rest = b.mul(b.mul(p, b.sub(1.0, p)), 4.0)
    return b.mul(_inverse(b, b.sub(b.mul(p, 2.0), 1.0), rest), math.sqrt(2))


def _erfcx_of(t: torch.Tensor) -> torch.Tensor:
    x = _CUT * (1 + t) / (1 - t).clamp(min=1e-12)
    return torch.special.erfcx(x) * (1 + 2 * x)


_CUT = 3.75


@of_one("special_erfcx")
def erfcx(b: Any, x: Any) -> Any:
    """e^(x²) erfc(x), as (1 + 2x) erfcx(x) over (x − c) / (x + c) for x ≥ 0 (Shepherd and Laframboise 1981)."""
    z = b.abs(x)
    t = b.sub(1.0, b.div(2 * _CUT, b.add(z, _CUT)))
    y = b.div(evaluated(b, _erfcx_of, t), b.add(b.mul(z, 2.0), 1.0))
    return select(b, b.lt(x, 0.0), b.sub(b.mul(b.exp(b.mul(x, x)), 2.0), y), y)


@of_one("erfc")
def erfc(b: Any, x: Any) -> Any:
    """e^(−x²) erfcx(x) where 1 − erf(x) would lose it."""
    z = b.abs(x)
    small = b.mul(b.exp(b.neg(b.mul(z, z))), erfcx(b, b.clamp(z, high=1e18)))
    y = select(b, b.lt(z, 0.5), b.sub(1.0, b.erf(z)), small)
    return select(b, b.lt(x, 0.0), b.sub(2.0, y), y)


@of_one("special_log_ndtr")
def log_ndtr(b: Any, x: Any) -> Any:
    """ln of the normal distribution function."""
    h = b.mul(x, math.sqrt(0.5))
    low = b.sub(b.log(b.mul(erfcx(b, b.neg(h)), 0.5)), b.mul(h, h))
    return select(b, b.lt(x, -1.0), low, b.log1p(b.mul(erfc(b, h), -0.5)))
