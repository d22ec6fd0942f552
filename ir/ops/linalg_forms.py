"""Small matrices in terms of `linear`, `math` and `tensor` ops: triangular systems, Cholesky, the exponential.

LU is in lu_forms, QR in reflection_forms; all are forms of `extern.aten_*` ops (see extern_aten). The algorithms are
LAPACK's unblocked ones (Golub and Van Loan, Matrix Computations, ch. 3–5), unrolled over the columns of a size that is
known. Where torch raises (a singular matrix, one that is not positive definite) they give infinities or NaN.
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


def info_of(m: Matrices, like: Any, bad: Sequence[Any]) -> Any:
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
    info = info_of(m, a, [b.not_(b.gt(p, 0.0)) for p in pivots])
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


# -- the exponential ----------------------------------------------------------------------------------


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
