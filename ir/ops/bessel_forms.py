"""Bessel functions in terms of `math` ops, from interpolants of torch's float64 functions (see special_forms).

Below 8 (modified ones of the second kind: 2) a function is smooth in z², above it is e^±z/√z or an oscillation of
slowly changing modulus and phase times a smooth function of 1/z (Abramowitz and Stegun, 9.2 and 9.7).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from moec.ir.ops.chebyshev import evaluated, within
from moec.ir.ops.special_forms import of_one, select

_S = torch.special


# -- modified, first kind -----------------------------------------------------------------------------


def _i0e_near(t: torch.Tensor) -> torch.Tensor:
    return _S.i0e(4 * (t + 1))


def _i1e_near(t: torch.Tensor) -> torch.Tensor:
    z = 4 * (t + 1)
    return torch.where(z > 0, _S.i1e(z) / z, 0.5)


def _far_of(fn: Any) -> Any:
    def f(t: torch.Tensor) -> torch.Tensor:
        z = 8 / ((t + 1) / 2).clamp(min=1e-9)
        return fn(z) * torch.sqrt(z)

    return f


_i0e_far, _i1e_far = _far_of(_S.i0e), _far_of(_S.i1e)


def _scaled_i(b: Any, z: Any, near: Any, far: Any, odd: bool) -> Any:
    """e^−z I(z) for z ≥ 0."""
    low = evaluated(b, near, within(b, z, 0.0, 8.0))
    low = b.mul(low, z) if odd else low
    inverse = b.div(8.0, b.max(z, b.constant_like(8.0, z)))
    high = b.mul(evaluated(b, far, within(b, inverse, 0.0, 1.0)), b.rsqrt(b.max(z, b.constant_like(8.0, z))))
    return select(b, b.le(z, 8.0), low, high)


@of_one("special_i0e")
def i0e(b: Any, x: Any) -> Any:
    return _scaled_i(b, b.abs(x), _i0e_near, _i0e_far, odd=False)


@of_one("special_i1e")
def i1e(b: Any, x: Any) -> Any:
    return b.mul(b.sign(x), _scaled_i(b, b.abs(x), _i1e_near, _i1e_far, odd=True))


@of_one("i0", "special_modified_bessel_i0")
def i0(b: Any, x: Any) -> Any:
    return b.mul(b.exp(b.abs(x)), i0e(b, x))


@of_one("special_i1", "special_modified_bessel_i1")
def i1(b: Any, x: Any) -> Any:
    return b.mul(b.exp(b.abs(x)), i1e(b, x))


# -- modified, second kind ----------------------------------------------------------------------------


def _k0_near(t: torch.Tensor) -> torch.Tensor:
    z = torch.sqrt(2 * (t + 1)).clamp(min=1e-6)
    return _S.modified_bessel_k0(z) + torch.log(z / 2) * _S.i0(z)


def _k1_near(t: torch.Tensor) -> torch.Tensor:
    z = torch.sqrt(2 * (t + 1)).clamp(min=1e-3)
    return z * (_S.modified_bessel_k1(z) - torch.log(z / 2) * _S.i1(z))


def _k_far(fn: Any) -> Any:
    def f(t: torch.Tensor) -> torch.Tensor:
        z = 2 / ((t + 1) / 2).clamp(min=1e-9)
        return fn(z) * torch.sqrt(z)

    return f


_k0_far, _k1_far = _k_far(_S.scaled_modified_bessel_k0), _k_far(_S.scaled_modified_bessel_k1)


def _k(b: Any, x: Any, order: int, scaled: bool) -> Any:
    """K(x), or e^x K(x): ∞ at 0, NaN below."""
    z = b.clamp(x, low=1e-30, high=2.0)
    smooth = evaluated(b, _k1_near if order else _k0_near, within(b, b.mul(z, z), 0.0, 4.0))
    log = b.log(b.mul(z, 0.5))
    if order:
        low = b.add(b.div(smooth, z), b.mul(log, i1(b, z)))
    else:
        low = b.sub(smooth, b.mul(log, i0(b, z)))
    low = b.mul(low, b.exp(z)) if scaled else low
    y = b.clamp(x, low=2.0)
    high = evaluated(b, _k1_far if order else _k0_far, within(b, b.div(2.0, y), 0.0, 1.0))
    high = b.mul(high, b.rsqrt(y))
    high = high if scaled else b.mul(high, b.exp(b.neg(y)))
    out = select(b, b.le(x, 2.0), low, high)
    out = select(b, b.eq(x, 0.0), math.inf, out)
    out = select(b, b.lt(x, 0.0), math.nan, out)
    return select(b, b.isnan(x), x, out)


@of_one("special_modified_bessel_k0")
def k0(b: Any, x: Any) -> Any:
    return _k(b, x, 0, False)


@of_one("special_modified_bessel_k1")
def k1(b: Any, x: Any) -> Any:
    return _k(b, x, 1, False)


@of_one("special_scaled_modified_bessel_k0")
def k0e(b: Any, x: Any) -> Any:
    return _k(b, x, 0, True)


@of_one("special_scaled_modified_bessel_k1")
def k1e(b: Any, x: Any) -> Any:
    return _k(b, x, 1, True)


# -- oscillating --------------------------------------------------------------------------------------

_J, _Y = (_S.bessel_j0, _S.bessel_j1), (_S.bessel_y0, _S.bessel_y1)


def _near_of(order: int, second: bool) -> Any:
    def f(t: torch.Tensor) -> torch.Tensor:
        z = torch.sqrt(32 * (t + 1)).clamp(min=1e-4)
        j = _J[order](z)
        if not second:
            return j / z if order else j
        rest = _Y[order](z) - 2 / math.pi * torch.log(z) * j
        return (rest + 2 / (math.pi * z)) / z if order else rest

    return f


def _phase_of(order: int, quadrature: bool) -> Any:
    """P or Q of J = √(2/πz) (P cos χ − Q sin χ), Y = √(2/πz) (P sin χ + Q cos χ), χ = z − (order/2 + 1/4) π."""

    def f(t: torch.Tensor) -> torch.Tensor:
        z = 8 / ((t + 1) / 2).clamp(min=1e-4)
        chi = z - (order / 2 + 0.25) * math.pi
        j, y = _J[order](z), _Y[order](z)
        if quadrature:
            return torch.sqrt(math.pi * z / 2) * (y * torch.cos(chi) - j * torch.sin(chi)) * z
        return torch.sqrt(math.pi * z / 2) * (j * torch.cos(chi) + y * torch.sin(chi))

    return f


_NEAR = {(n, s): _near_of(n, s) for n in (0, 1) for s in (False, True)}
_PHASE = {(n, q): _phase_of(n, q) for n in (0, 1) for q in (False, True)}


def _near(b: Any, z: Any, order: int, second: bool) -> Any:
    y = evaluated(b, _NEAR[order, second], within(b, b.mul(z, z), 0.0, 64.0))
    return b.mul(y, z) if order else y


def _far(b: Any, z: Any, order: int, second: bool) -> Any:
    z = b.clamp(z, low=8.0)
    t = within(b, b.div(8.0, z), 0.0, 1.0)
    p, q = evaluated(b, _PHASE[order, False], t), b.div(evaluated(b, _PHASE[order, True], t), z)
    chi = b.sub(z, (order / 2 + 0.25) * math.pi)
    sin, cos = b.sin(chi), b.cos(chi)
    y = b.add(b.mul(p, sin), b.mul(q, cos)) if second else b.sub(b.mul(p, cos), b.mul(q, sin))
    return b.mul(y, b.rsqrt(b.mul(z, math.pi / 2)))


def _j(b: Any, x: Any, order: int) -> Any:
    z = b.abs(x)
    y = select(b, b.le(z, 8.0), _near(b, b.clamp(z, high=8.0), order, False), _far(b, z, order, False))
    y = b.mul(y, b.sign(x)) if order else y
    return select(b, b.isnan(x), x, y)


def _y(b: Any, x: Any, order: int) -> Any:
    """−∞ at 0, NaN below."""
    z = b.clamp(x, low=1e-30, high=8.0)
    low = b.add(_near(b, z, order, True), b.mul(b.mul(b.log(z), 2 / math.pi), _near(b, z, order, False)))
    low = b.sub(low, b.div(2 / math.pi, z)) if order else low
    y = select(b, b.le(x, 8.0), low, _far(b, x, order, True))
    y = select(b, b.eq(x, 0.0), -math.inf, y)
    y = select(b, b.lt(x, 0.0), math.nan, y)
    return select(b, b.isnan(x), x, y)


@of_one("special_bessel_j0")
def j0(b: Any, x: Any) -> Any:
    return _j(b, x, 0)


@of_one("special_bessel_j1")
def j1(b: Any, x: Any) -> Any:
    return _j(b, x, 1)


@of_one("special_bessel_y0")
def y0(b: Any, x: Any) -> Any:
    return _y(b, x, 0)


@of_one("special_bessel_y1")
def y1(b: Any, x: Any) -> Any:
    return _y(b, x, 1)


@of_one("special_spherical_bessel_j0")
def spherical_j0(b: Any, x: Any) -> Any:
    """sin x / x, 1 at 0 and 0 at infinity."""
    y = b.div(b.sin(x), select(b, b.eq(x, 0.0), 1.0, x))
    y = select(b, b.eq(x, 0.0), 1.0, y)
    return select(b, b.eq(b.abs(x), math.inf), 0.0, y)
