"""LU with partial pivoting: factors, solutions, inverses and determinants of small matrices (see linalg_forms)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moec.ir.errors import CompileError
from moec.ir.ops.linalg_forms import Matrices, broadcast_batch, form, info_of, solve_lower, solve_upper
from moec.ir.types import DType


def _swapped(m: Matrices, x: Any, k: int, p: Any) -> Any:
    """x with rows k and p (i64[..., 1, 1]) exchanged."""
    b, rows = m.b, x.shape[-2]
    r = b.reshape(b.arange(end=rows), shape=(rows, 1))
    here = b.constant_like(k, r)
    order = b.where(b.eq(r, here), p, b.where(b.eq(r, p), here, r))
    return b.gather_elements(x, b.expand(order, shape=x.shape), axis=x.type.rank - 2)


def lu(m: Matrices, a: Any) -> tuple[Any, list[Any]]:
    """L and U in one matrix, and the row exchanged with each, i64[..., 1, 1]: partial pivoting."""
    b, (rows, columns) = m.b, a.shape[-2:]
    exchanged = []
    for k in range(min(rows, columns)):
        if k < rows - 1:
            column = b.abs(m.columns(m.rows(a, k, rows), k, k + 1))
            p = b.add(b.argmax(column, axis=a.type.rank - 2, keepdim=True), k)
            a = _swapped(m, a, k, p)
        else:
            p = b.full(shape=(*a.shape[:-2], 1, 1), value=k, dtype=DType.I64)
        exchanged.append(p)
        if k == rows - 1:
            break
        low = m.rows(a, k + 1, rows)
        pivot = m.columns(m.rows(a, k, k + 1), k, k + 1)
        pivot = b.where(b.eq(pivot, 0.0), b.constant_like(1.0, pivot), pivot)  # a column of zeros stays
        factor = b.div(m.columns(low, k, k + 1), pivot)
        rest = m.columns(low, k + 1, columns)
        if k + 1 < columns:
            rest = b.sub(rest, b.matmul(factor, m.columns(m.rows(a, k, k + 1), k + 1, columns)))
        a = m.below(m.rows(a, 0, k + 1), m.beside(m.columns(low, 0, k), factor, rest))
    return a, exchanged


def _pivots(m: Matrices, a: Any, exchanged: Sequence[Any]) -> Any:
    """i32[..., k], counted from 1."""
    b, shape = m.b, (*a.shape[:-2], len(exchanged))
    if not exchanged:
        return b.full(shape=shape, value=0, dtype=DType.I32)
    return b.cast(b.add(m.flat(m.beside(*exchanged), shape), 1), dtype=DType.I32)


def _permuted(m: Matrices, x: Any, exchanged: Sequence[Any], back: bool = False) -> Any:
    steps = list(enumerate(exchanged))
    for k, p in reversed(steps) if back else steps:
        x = _swapped(m, x, k, p)
    return x


def _zero_pivots(m: Matrices, packed: Any) -> list[Any]:
    return [m.b.eq(d, 0.0) for d in m.diagonal(packed)]


def _unpacked(m: Matrices, packed: Any) -> tuple[Any, Any]:
    rows, columns = packed.shape[-2:]
    k = min(rows, columns)
    lower = m.triangle(m.columns(packed, 0, k), "le", -1)
    return m.b.add(lower, m.eye(packed, rows, k)), m.triangle(m.rows(packed, 0, k), "ge")


def _solve_packed(m: Matrices, packed: Any, exchanged: Sequence[Any], rhs: Any) -> Any:
    rhs = m.with_batch(rhs, broadcast_batch(packed, rhs))
    y = solve_lower(m, packed, _permuted(m, rhs, exchanged), unit=True)
    return solve_upper(m, packed, y)


@form("linalg_lu_factor")
def _lu_factor(op: Any, b: Any) -> Any:
    return _lu_factor_ex(op, b)[:2]


@form("linalg_lu_factor_ex")
def _lu_factor_ex(op: Any, b: Any) -> Any:
    m = Matrices(b, op.A)
    packed, exchanged = lu(m, op.A)
    return packed, _pivots(m, op.A, exchanged), info_of(m, op.A, _zero_pivots(m, packed))


@form("linalg_lu")
def _lu(op: Any, b: Any) -> Any:
    m = Matrices(b, op.A)
    packed, exchanged = lu(m, op.A)
    n = op.A.shape[-2]
    return (_permuted(m, m.eye(op.A, n, n), exchanged, back=True), *_unpacked(m, packed))


def _exchanges(m: Matrices, pivots: Any) -> list[Any]:
    """i64[..., 1, 1] each, from 0, of torch's i32[..., k]."""
    b, k = m.b, pivots.shape[-1]
    wide = b.sub(b.cast(pivots, dtype=DType.I64), 1)
    row = m.flat(wide, (*pivots.shape[:-1], 1, k))
    return [m.columns(row, i, i + 1) for i in range(k)]


@form("lu_unpack")
def _lu_unpack(op: Any, b: Any) -> Any:
    if not (op.unpack_data and op.unpack_pivots):
        raise CompileError("lu_unpack of a part only", code="type")
    m = Matrices(b, op.LU_data)
    n = op.LU_data.shape[-2]
    p = _permuted(m, m.eye(op.LU_data, n, n), _exchanges(m, op.LU_pivots), back=True)
    return (p, *_unpacked(m, op.LU_data))


@form("linalg_lu_solve")
def _lu_solve(op: Any, b: Any) -> Any:
    m = Matrices(b, op.LU)
    exchanged = _exchanges(m, op.pivots)
    rhs = op.B if op.left else m.t(op.B)
    rhs = m.with_batch(rhs, broadcast_batch(op.LU, rhs))
    if op.left != op.adjoint:
        x = _solve_packed(m, op.LU, exchanged, rhs)
    else:  # Aᵀ = Uᵀ Lᵀ Pᵀ
        y = solve_upper(m, m.t(op.LU), solve_lower(m, m.t(op.LU), rhs), unit=True)
        x = _permuted(m, y, exchanged, back=True)
    return x if op.left else m.t(x)


@form("linalg_inv_ex")
def _inv_ex(op: Any, b: Any) -> Any:
    m = Matrices(b, op.A)
    n = op.A.shape[-1]
    packed, exchanged = lu(m, op.A)
    inverse = _solve_packed(m, packed, exchanged, m.eye(op.A, n, n)) if n else op.A
    return inverse, info_of(m, op.A, _zero_pivots(m, packed))


@form("linalg_inv")
def _inv(op: Any, b: Any) -> Any:
    return _inv_ex(op, b)[0]


@form("linalg_tensorinv")
def _tensorinv(op: Any, b: Any) -> Any:
    a = op.self
    n = 1
    for size in a.shape[: op.ind]:
        n *= size
    square = b.reshape(a, shape=(n, n))
    m = Matrices(b, square)
    packed, exchanged = lu(m, square)
    inverse = _solve_packed(m, packed, exchanged, m.eye(square, n, n)) if n else square
    return b.reshape(inverse, shape=op.types[0].shape)


@form("linalg_solve_ex")
def _solve_ex(op: Any, b: Any) -> Any:
    m = Matrices(b, op.A)
    n = op.A.shape[-1]
    vector = op.B.type.rank == 1 or (op.A.type.rank - 1 == op.B.type.rank and op.B.shape == op.A.shape[:-1])
    packed, exchanged = lu(m, op.A if op.left else m.t(op.A))
    rhs = b.reshape(op.B, shape=(*op.B.shape, 1)) if vector else op.B if op.left else m.t(op.B)
    x = _solve_packed(m, packed, exchanged, rhs) if n else rhs
    out = m.flat(x, op.types[0].shape) if vector else x if op.left else m.t(x)
    return out, info_of(m, op.A, _zero_pivots(m, packed))


@form("linalg_solve")
def _solve(op: Any, b: Any) -> Any:
    return _solve_ex(op, b)[0]


def _determinant_parts(m: Matrices, a: Any) -> tuple[list[Any], Any]:
    """The diagonal of U, and the sign of the permutation as a number [..., 1, 1]."""
    b = m.b
    packed, exchanged = lu(m, a)
    sign = m.zeros(a, 1, 1, 1.0)
    for k, p in enumerate(exchanged):
        sign = b.where(b.eq(p, k), sign, b.neg(sign))
    return m.diagonal(packed), sign


@form("linalg_det")
def _det(op: Any, b: Any) -> Any:
    m = Matrices(b, op.A)
    diagonal, out = _determinant_parts(m, op.A)
    for d in diagonal:
        out = b.mul(out, d)
    return m.flat(out, op.A.shape[:-2])


@form("linalg_slogdet")
def _slogdet(op: Any, b: Any) -> Any:
    m = Matrices(b, op.A)
    diagonal, sign = _determinant_parts(m, op.A)
    log = m.zeros(op.A, 1, 1)
    for d in diagonal:
        sign, log = b.mul(sign, b.sign(d)), b.add(log, b.log(b.abs(d)))
    return m.flat(sign, op.A.shape[:-2]), m.flat(log, op.A.shape[:-2])
