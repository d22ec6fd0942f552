"""Matrix products."""

from __future__ import annotations

from moec.frontend.onnx.context import ImportContext, Size
from moec.frontend.onnx.registry import imports
from moec.ir import Value
from moec.ir.dims import product


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
    """Products of two operands; letters of each stand once in it, and those of one only in the result."""
    terms, _, result = equation.replace(" ", "").partition("->")
    letters = terms.split(",")
    if len(operands) != 2 or "->" not in equation or "." in equation or len(letters) != 2:
        raise c.refuse(f"equation {equation!r}")
    a, b = operands
    c.floats(a, b)
    if any(len(set(t)) < len(t) for t in (*letters, result)):
        raise c.refuse(f"equation {equation!r}")
    if (len(letters[0]), len(letters[1])) != (a.type.rank, b.type.rank):
        raise c.refuse(f"equation {equation!r} of {a.type} and {b.type}", code="type")
    sizes = dict(zip(letters[0], a.shape, strict=True)) | dict(zip(letters[1], b.shape, strict=True))
    both = [x for x in letters[0] if x in letters[1]]
    batch, summed = [x for x in both if x in result], [x for x in both if x not in result]
    free = [[x for x in t if x not in both] for t in letters]
    if sorted(result) != sorted([*batch, *free[0], *free[1]]) or not summed:
        raise c.refuse(f"equation {equation!r}")
    if any(x in batch and a.shape[letters[0].index(x)] != b.shape[letters[1].index(x)] for x in batch):
        raise c.refuse("operands that broadcast")

    def size(group: list[str]) -> Size:
        return product([sizes[x] for x in group])

    def arranged(v: Value, term: str, order: list[str], shape: tuple[Size, ...]) -> Value:
        return c.reshape(c.transpose(v, [term.index(x) for x in order]), shape)

    lead = (size(batch),) if batch else ()
    left = arranged(a, letters[0], [*batch, *free[0], *summed], (*lead, size(free[0]), size(summed)))
    right = arranged(b, letters[1], [*batch, *summed, *free[1]], (*lead, size(summed), size(free[1])))
    order = [*batch, *free[0], *free[1]]
    y = c.reshape(c.b.matmul(left, right), [sizes[x] for x in order])
    return c.transpose(y, [order.index(x) for x in result])
