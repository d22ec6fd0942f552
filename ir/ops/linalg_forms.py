"""Factorisations and solvers of small matrices in terms of `linear`, `math` and `tensor` ops (see extern_aten).

The algorithms are LAPACK's unblocked ones (Golub and Van Loan, Matrix Computations, ch. 3–5), unrolled over the columns
of a size that is known. Where torch raises (a singular matrix, one that is not positive definite) they give infinities
or NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.errors import CompileError
from moec.ir.types import DType

MATRIX_FORMS: dict[str, Callable[[Any, Any], Any]] = {}
LIMIT = 16  # columns


def form(*names: str) -> Any:
    """Register `fn(op, b)`, which builds the results of an op, for matrices of up to LIMIT columns."""

    def register(fn: Any) -> Any:
        MATRIX_FORMS.update(dict.fromkeys(names, fn))
        return fn

    return register


class Matrices:
    """Shorthands over a builder for tensors [..., rows, columns]."""

    def __init__(self, b: Any, *given: Any):
        self.b = b
        for x in given:
            if not x.type.is_static or min(x.shape[-2:]) > LIMIT or x.dtype not in (DType.F32, DType.F64):
                raise CompileError(f"{x.type}: unrolled for f32 and f64 up to {LIMIT} known columns", code="type")

    def rows(self, x: Any, start: int, end: int) -> Any:
        return x if (start, end) == (0, x.shape[-2]) else self.b.slice(x, axis=x.type.rank - 2, start=start, end=end)

    def columns(self, x: Any, start: int, end: int) -> Any:
        return x if (start, end) == (0, x.shape[-1]) else self.b.slice(x, axis=x.type.rank - 1, start=start, end=end)

    def below(self, *xs: Any) -> Any:
        parts = [x for x in xs if x.shape[-2]]
        return parts[0] if len(parts) == 1 else self.b.concat(*parts, axis=parts[0].type.rank - 2)

    def beside(self, *xs: Any) -> Any:
        parts = [x for x in xs if x.shape[-1]]
        return parts[0] if len(parts) == 1 else self.b.concat(*parts, axis=parts[0].type.rank - 1)

    def t(self, x: Any) -> Any:
        rank = x.type.rank
        return self.b.transpose(x, perm=(*range(rank - 2), rank - 1, rank - 2))

    def zeros(self, like: Any, rows: int, columns: int, value: float = 0.0) -> Any:
        return self.b.full(shape=(*like.shape[:-2], rows, columns), value=value, dtype=like.dtype)

    def eye(self, like: Any, rows: int, columns: int) -> Any:
        b = self.b
        hit = b.eq(b.reshape(b.arange(end=rows), shape=(rows, 1)), b.arange(end=columns))
        return b.expand(b.cast(hit, dtype=like.dtype), shape=(*like.shape[:-2], rows, columns))

    def triangle(self, x: Any, kind: str, diagonal: int = 0) -> Any:
        """x with zeros off the triangle where column − row `kind` ("le", "ge") the diagonal."""
        b, (m, n) = self.b, x.shape[-2:]
        offset = b.sub(b.arange(end=n), b.reshape(b.arange(end=m), shape=(m, 1)))
        keep = b.op(f"math.{kind}", (offset, diagonal))
        return b.where(keep, x, b.constant_like(0.0, x))

    def with_batch(self, x: Any, batch: Sequence[int]) -> Any:
        shape = (*batch, *x.shape[-2:])
        return x if x.shape == shape else self.b.expand(x, shape=shape)

    def diagonal(self, x: Any) -> list[Any]:
        """The elements of the diagonal, [..., 1, 1] each."""
        return [self.columns(self.rows(x, i, i + 1), i, i + 1) for i in range(min(x.shape[-2:]))]

    def flat(self, x: Any, shape: Sequence[int]) -> Any:
        return x if x.shape == tuple(shape) else self.b.reshape(x, shape=tuple(shape))


def broadcast_batch(a: Any, c: Any) -> tuple[int, ...]:
    from moec.ir.types import broadcast

    result: Any = broadcast(a.shape[:-2], c.shape[:-2])
    return result


# -- triangular systems -------------------------------------------------------------------------------


def solve_lower(m: Matrices, a: Any, rhs: Any, unit: bool = False) -> Any:
    """X of A X = B for a lower triangular A (what is above its diagonal is not read)."""
    b, n = m.b, a.shape[-1]
    batch = broadcast_batch(a, rhs)
    a, rhs = m.with_batch(a, batch), m.with_batch(rhs, batch)
    if not n or 0 in rhs.shape:
        return rhs
    x: Any = None
    for i in range(n):
        y = m.rows(rhs, i, i + 1)
        row = m.rows(a, i, i + 1)
        if x is not None:
            y = b.sub(y, b.matmul(m.columns(row, 0, i), x))
        y = y if unit else b.div(y, m.columns(row, i, i + 1))
        x = y if x is None else m.below(x, y)
    return x


def solve_upper(m: Matrices, a: Any, rhs: Any, unit: bool = False) -> Any:
    b, n = m.b, a.shape[-1]
    batch = broadcast_batch(a, rhs)
    a, rhs = m.with_batch(a, batch), m.with_batch(rhs, batch)
    if not n or 0 in rhs.shape:
        return rhs
    x: Any = None
    for i in reversed(range(n)):
        y = m.rows(rhs, i, i + 1)
        row = m.rows(a, i, i + 1)
        if x is not None:
            y = b.sub(y, b.matmul(m.columns(row, i + 1, n), x))
        y = y if unit else b.div(y, m.columns(row, i, i + 1))
        x = y if x is None else m.below(y, x)
    return x


def _triangular(m: Matrices, a: Any, rhs: Any, upper: bool, unit: bool) -> Any:
    return (solve_upper if upper else solve_lower)(m, a, rhs, unit)


@form("linalg_solve_triangular")
def _solve_triangular(op: Any, b: Any) -> Any:
    a, rhs = op.self, op.B
    m = Matrices(b, a)
    if op.left:
        return _triangular(m, a, rhs, op.upper, op.unitriangular)
    return m.t(_triangular(m, m.t(a), m.t(rhs), not op.upper, op.unitriangular))


@form("triangular_solve")
def _triangular_solve(op: Any, b: Any) -> Any:
    m = Matrices(b, op.A)
    a = m.t(op.A) if op.transpose else op.A
    x = _triangular(m, a, op.self, op.upper != op.transpose, op.unitriangular)
    return x, m.with_batch(op.A, x.shape[:-2])


# -- Cholesky -----------------------------------------------------------------------------------------


def cholesky_lower(m: Matrices, a: Any) -> tuple[Any, list[Any]]:
    """L of A = L Lᵀ, and the pivots before their roots; only the lower triangle is read."""
    b, n = m.b, a.shape[-1]
    factor: Any = None
    pivots = []
    for j in range(n):
        column = m.columns(m.rows(a, j, n), j, j + 1)
        if factor is not None:
            done = m.rows(factor, j, n)
            column = b.sub(column, b.matmul(done, m.t(m.rows(factor, j, j + 1))))
        pivot = m.rows(column, 0, 1)
        pivots.append(pivot)
        root = b.sqrt(pivot)
        column = m.below(m.zeros(a, j, 1), root, b.div(m.rows(column, 1, n - j), root))
        factor = column if factor is None else m.beside(factor, column)
    return (a if factor is None else factor), pivots


def _info(m: Matrices, like: Any, bad: Sequence[Any]) -> Any:
    """i32: 1 + the first of the conditions [..., 1, 1] that holds, else 0."""
    b = m.b
    out = b.full(shape=(*like.shape[:-2], 1, 1), value=0, dtype=DType.I32)
    for i, condition in reversed(list(enumerate(bad, 1))):
        out = b.where(condition, b.const(i, DType.I32), out)
    return m.flat(out, like.shape[:-2])


@form("linalg_cholesky", "cholesky")
def _cholesky(op: Any, b: Any) -> Any:
    a = op.self
    m = Matrices(b, a)
    factor, _ = cholesky_lower(m, m.t(a) if op.upper else a)
    return m.t(factor) if op.upper else factor


@form("linalg_cholesky_ex")
def _cholesky_ex(op: Any, b: Any) -> Any:
    a = op.self
    m = Matrices(b, a)
    factor, pivots = cholesky_lower(m, m.t(a) if op.upper else a)
    info = _info(m, a, [b.not_(b.gt(p, 0.0)) for p in pivots])
    return (m.t(factor) if op.upper else factor), info


@form("cholesky_solve")
def _cholesky_solve(op: Any, b: Any) -> Any:
    m = Matrices(b, op.input2)
    lower = m.t(op.input2) if op.upper else op.input2
    y = solve_lower(m, lower, op.self)
    return solve_upper(m, m.t(lower), y)


@form("cholesky_inverse")
def _cholesky_inverse(op: Any, b: Any) -> Any:
    a = op.self
    m = Matrices(b, a)
    lower = m.t(a) if op.upper else a
    n = a.shape[-1]
    return solve_upper(m, m.t(lower), solve_lower(m, lower, m.eye(a, n, n)))


# -- LU -----------------------------------------------------------------------------------------------


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
    return packed, _pivots(m, op.A, exchanged), _info(m, op.A, _zero_pivots(m, packed))


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
    return inverse, _info(m, op.A, _zero_pivots(m, packed))


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
    return out, _info(m, op.A, _zero_pivots(m, packed))


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


# -- reflections --------------------------------------------------------------------------------------


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


@form("linalg_matrix_exp")
def _matrix_exp(op: Any, b: Any) -> Any:
    """Taylor's series of A / 2ˢ, squared s times; s ≤ 12 by the norm of each matrix."""
    a = op.self
    m = Matrices(b, a)
    n = a.shape[-1]
    if not n or 0 in a.shape:
        return a
    rank = a.type.rank
    norm = b.amax(b.sum(b.abs(a), axes=(rank - 2,), keepdim=True), axes=(rank - 1,), keepdim=True)
    steps, scale = b.constant_like(0.0, a), b.constant_like(1.0, a)
    for k in range(12):  # halve until the norm is below 1
        large = b.gt(b.mul(norm, scale), 1.0)
        steps = b.where(large, b.constant_like(k + 1.0, a), steps)
        scale = b.where(large, b.mul(scale, 0.5), scale)
    x = b.mul(a, scale)
    one = m.eye(a, n, n)
    out = one
    for k in reversed(range(1, 13)):
        out = b.add(one, b.mul(b.matmul(x, out), 1 / k))
    for k in range(12):
        out = b.where(b.gt(steps, float(k)), b.matmul(out, out), out)
    return out
