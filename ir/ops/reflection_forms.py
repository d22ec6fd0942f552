"""Householder reflections: QR of small matrices, and products with its Q (see linalg_forms)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moec.ir.ops.linalg_forms import Matrices, form


def _reflector(m: Matrices, x: Any) -> tuple[Any, Any, Any]:
    """(v, tau, beta) with (I − tau v vᵀ) x = beta e₁ and v₁ = 1, for a column [..., n, 1]."""
    b, n = m.b, x.shape[-2]
    alpha, rest = m.rows(x, 0, 1), m.rows(x, 1, n)
    one = m.zeros(x, 1, 1, 1.0)
    if n == 1:
        return one, m.zeros(x, 1, 1), alpha
    axis = x.type.rank - 2
    norm = b.sqrt(b.sum(b.mul(x, x), axes=(axis,), keepdim=True))
    nothing = b.eq(b.sum(b.abs(rest), axes=(axis,), keepdim=True), 0.0)
    beta = b.where(b.lt(alpha, 0.0), norm, b.neg(norm))
    beta = b.where(nothing, alpha, beta)
    safe = b.where(nothing, one, beta)
    tau = b.where(nothing, b.constant_like(0.0, alpha), b.div(b.sub(safe, alpha), safe))
    scale = b.where(nothing, one, b.sub(alpha, safe))
    return m.below(one, b.div(rest, scale)), tau, beta


def _reflected(m: Matrices, x: Any, v: Any, tau: Any) -> Any:
    """(I − tau v vᵀ) x"""
    b = m.b
    return b.sub(x, b.mul(b.matmul(v, b.matmul(m.t(v), x)), tau))


def qr_packed(m: Matrices, a: Any) -> tuple[Any, list[Any]]:
    """R above, the reflectors below the diagonal; their factors [..., 1, 1]."""
    rows, columns = a.shape[-2:]
    factors = []
    for j in range(min(rows, columns)):
        active = m.rows(a, j, rows)
        v, tau, beta = _reflector(m, m.columns(active, j, j + 1))
        factors.append(tau)
        packed = m.below(beta, m.rows(v, 1, rows - j))
        parts = [m.columns(active, 0, j), packed]
        if j + 1 < columns:
            parts.append(_reflected(m, m.columns(active, j + 1, columns), v, tau))
        a = m.below(m.rows(a, 0, j), m.beside(*parts))
    return a, factors


def _vector(m: Matrices, packed: Any, j: int) -> Any:
    rows = packed.shape[-2]
    below = m.rows(m.columns(packed, j, j + 1), j + 1, rows)
    return m.below(m.zeros(packed, j, 1), m.zeros(packed, 1, 1, 1.0), below)


def _times_q(m: Matrices, packed: Any, factors: Sequence[Any], x: Any, transposed: bool = False) -> Any:
    """Q x, or Qᵀ x, of Q = H₁ H₂ …"""
    order = range(len(factors)) if transposed else reversed(range(len(factors)))
    for j in order:
        x = _reflected(m, x, _vector(m, packed, j), factors[j])
    return x


def _factors(m: Matrices, tau: Any) -> list[Any]:
    row = m.flat(tau, (*tau.shape[:-1], 1, tau.shape[-1]))
    return [m.columns(row, i, i + 1) for i in range(tau.shape[-1])]


@form("geqrf")
def _geqrf(op: Any, b: Any) -> Any:
    a = op.self
    m = Matrices(b, a)
    packed, factors = qr_packed(m, a)
    tau = m.beside(*factors) if factors else m.zeros(a, 1, 0)
    return packed, m.flat(tau, op.types[1].shape)


@form("linalg_qr")
def _qr(op: Any, b: Any) -> Any:
    m = Matrices(b, op.A)
    packed, factors = qr_packed(m, op.A)
    rows, columns = op.A.shape[-2:]
    width = rows if op.mode == "complete" else min(rows, columns)
    r = m.triangle(m.rows(packed, 0, width), "ge")
    if op.mode == "r":
        return b.full(shape=op.types[0].shape, value=0.0, dtype=op.A.dtype), r
    return _times_q(m, packed, factors, m.eye(op.A, rows, width)), r


@form("linalg_householder_product")
def _householder_product(op: Any, b: Any) -> Any:
    m = Matrices(b, op.input)
    return _times_q(m, op.input, _factors(m, op.tau), m.eye(op.input, *op.input.shape[-2:]))


@form("ormqr")
def _ormqr(op: Any, b: Any) -> Any:
    m = Matrices(b, op.self)
    packed, factors = op.self, _factors(m, op.input2)
    if op.left:
        return _times_q(m, packed, factors, op.input3, op.transpose)
    return m.t(_times_q(m, packed, factors, m.t(op.input3), not op.transpose))
