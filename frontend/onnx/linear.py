"""Matrix products."""

from __future__ import annotations

from moec.frontend.einsum import einsum as contract
from moec.frontend.onnx.context import ImportContext
from moec.frontend.onnx.registry import imports
from moec.ir import Value


@imports("MatMul")
def matmul(c: ImportContext, a: Value, b: Value) -> Value:
    c.floats(a, b)
    if not a.type.rank or not b.type.rank:
        raise c.refuse(f"of {a.type} and {b.type}", code="type")
    left, right = a, b
    if a.type.rank == 1:
        left = c.reshape(a, (1, *a.shape))
    if b.type.rank == 1:
        right = c.reshape(b, (*b.shape, 1))
    y = c.b.matmul(left, right)
    kept = [s for i, s in enumerate(y.shape) if not (i == y.type.rank - 2 and a.type.rank == 1)]
    return c.reshape(y, kept[:-1] if b.type.rank == 1 else kept)


@imports("Gemm")
def gemm_1(c: ImportContext, a: Value, b: Value, bias: Value, *, alpha: float, beta: float, transA: int, transB: int,
           broadcast: int) -> Value:  # fmt: skip
    return gemm(c, a, b, bias, alpha=alpha, beta=beta, transA=transA, transB=transB)


@imports("Gemm", since=7)
def gemm(c: ImportContext, a: Value, b: Value, bias: Value | None = None, *, alpha: float, beta: float, transA: int,
         transB: int) -> Value:  # fmt: skip
    c.floats(a, b)
    if transA:
        a = c.transpose(a, (1, 0))
    whole = alpha == 1.0 and (bias is None or beta == 1.0)
    if transB and whole and b.weight is not None and (bias is None or bias.shape == (b.shape[0],)):
        return c.b.op("linear.linear", (a, b, bias))
    y = c.b.matmul(a, c.transpose(b, (1, 0)) if transB else b)
    if alpha != 1.0:
        y = c.b.mul(y, alpha)
    if bias is None:
        return y
    return c.b.add(y, bias if beta == 1.0 else c.b.mul(bias, beta))


@imports("Einsum", since=12)
def einsum(c: ImportContext, *operands: Value, equation: str) -> Value:
    return contract(c, equation, operands)
