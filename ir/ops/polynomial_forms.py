"""Chebyshev polynomials of any degree by their trigonometric and hyperbolic forms (see special_forms)."""

from __future__ import annotations

import math
from typing import Any

from moec.ir.ops.special_forms import FORMS, select

_T = "special_chebyshev_polynomial_"
_S = "special_shifted_chebyshev_polynomial_"


def _trunc(b: Any, n: Any) -> Any:
    return b.where(b.lt(n, 0.0), b.ceil(n), b.floor(n))


def _angle(b: Any, x: Any) -> Any:
    """arccos of |x| ≤ 1, without losing what is near 1."""
    half = b.sqrt(b.div(b.clamp(b.sub(1.0, x), low=0.0), b.clamp(b.add(x, 1.0), low=1e-30)))  # tan(θ / 2)
    return b.mul(_arctan(b, half), 2.0)


def _arctan(b: Any, y: Any) -> Any:
    """For y ≥ 0: halved twice by arctan y = 2 arctan(y / (1 + √(1 + y²))), then its series."""
    large = b.gt(y, 1.0)
    z = select(b, large, b.reciprocal(b.max(y, b.constant_like(1.0, y))), y)
    for _ in range(2):
        z = b.div(z, b.add(b.sqrt(b.add(b.mul(z, z), 1.0)), 1.0))
    z2 = b.mul(z, z)
    series = b.constant_like(1 / 13, z)
    for k in (11, 9, 7, 5, 3, 1):
        series = b.sub(1 / k, b.mul(z2, series))
    y = b.mul(b.mul(z, series), 4.0)
    return select(b, large, b.sub(math.pi / 2, y), y)


def _hyperbolic(b: Any, y: Any, odd: bool) -> Any:
    up, down = b.exp(y), b.exp(b.neg(y))
    return b.mul(b.sub(up, down) if odd else b.add(up, down), 0.5)


def _chebyshev(b: Any, x: Any, n: Any, kind: str) -> Any:
    """T, U, V or W of degree n at x; 0 for n < 0."""
    n = _trunc(b, n)
    even = b.eq(b.mod(n, 2.0), 0.0)
    one = b.constant_like(1.0, x)
    y = b.abs(x)
    outside = b.gt(y, 1.0)
    # |x| ≤ 1
    theta = _angle(b, select(b, outside, 0.5, x))
    half = b.mul(theta, 0.5)
    within = {
        "t": lambda: b.cos(b.mul(n, theta)),
        "u": lambda: b.div(b.sin(b.mul(b.add(n, 1.0), theta)), b.sin(theta)),
        "v": lambda: b.div(b.cos(b.mul(b.add(n, 0.5), theta)), b.cos(half)),
        "w": lambda: b.div(b.sin(b.mul(b.add(n, 0.5), theta)), b.sin(half)),
    }[kind]()
    # |x| > 1: with θ = arcosh |x|; V and W change places at −x
    excess = b.sub(select(b, outside, y, 2.0), 1.0)
    arc = b.log1p(b.add(excess, b.sqrt(b.mul(excess, b.add(excess, 2.0)))))
    arc_half = b.mul(arc, 0.5)
    if kind == "t":
        beyond = _hyperbolic(b, b.mul(n, arc), False)
    elif kind == "u":
        beyond = b.div(_hyperbolic(b, b.mul(b.add(n, 1.0), arc), True), _hyperbolic(b, arc, True))
    else:
        v = b.div(_hyperbolic(b, b.mul(b.add(n, 0.5), arc), False), _hyperbolic(b, arc_half, False))
        w = b.div(_hyperbolic(b, b.mul(b.add(n, 0.5), arc), True), _hyperbolic(b, arc_half, True))
        beyond = b.where(b.eq(b.gt(x, 0.0), b.constant_like(kind == "v", b.gt(x, 0.0))), v, w)
    beyond = b.where(b.or_(b.gt(x, 0.0), even), beyond, b.neg(beyond))
    out = b.where(outside, beyond, within)
    # x = ±1
    top = {"t": one, "u": b.add(n, 1.0), "v": one, "w": b.add(b.mul(n, 2.0), 1.0)}[kind]
    bottom = {"t": one, "u": b.add(n, 1.0), "v": b.add(b.mul(n, 2.0), 1.0), "w": one}[kind]
    bottom = b.where(even, bottom, b.neg(bottom))
    out = b.where(b.eq(x, 1.0), top, b.where(b.eq(x, -1.0), bottom, out))
    return b.where(b.lt(n, 0.0), b.constant_like(0.0, x), out)


def _register(kind: str, shifted: bool) -> None:
    def form(op: Any, b: Any) -> Any:
        dtype = op.types[0].dtype
        x, n = b.cast(op.x, dtype=dtype), b.cast(op.n, dtype=dtype)
        return _chebyshev(b, b.sub(b.mul(x, 2.0), 1.0) if shifted else x, n, kind)

    FORMS[(_S if shifted else _T) + kind] = form


for _kind in "tuvw":
    _register(_kind, False)
    _register(_kind, True)
