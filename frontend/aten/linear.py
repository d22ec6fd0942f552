"""Matrix products."""

from __future__ import annotations

from moec.frontend.aten.registry import lowers
from moec.frontend.context import Context, Number
from moec.frontend.einsum import einsum
from moec.ir import TensorType, Value


@lowers("linear")
def linear(c: Context, input: Value, weight: Value, bias: Value | None) -> Value:
    if weight.type.rank == 2 and (bias is None or bias.type == TensorType(input.dtype, weight.shape[:1])):
        if input.type.rank == 1:
            row = c.b.linear(c.reshape(input, (1, *input.shape)), weight, bias)
            return c.reshape(row, weight.shape[:1])
        return c.b.linear(input, weight, bias)
    y = matmul(c, input, weight if weight.type.rank == 1 else c.b.transpose(weight, perm=(1, 0)))
    return y if bias is None else c.b.add(y, bias)


def matmul(c: Context, a: Value, b: Value) -> Value:
    """torch.matmul: vectors get an axis that is dropped again; integers are refused."""
    if not a.dtype.is_float:
        raise c.refuse(f"matrix products of {a.dtype} are not supported", hint="convert to a float dtype first")
    x = c.reshape(a, (1, *a.shape)) if a.type.rank == 1 else a
    y = c.reshape(b, (*b.shape, 1)) if b.type.rank == 1 else b
    out = c.b.matmul(x, y)
    shape = list(out.shape)
    if b.type.rank == 1:
        shape.pop()
    if a.type.rank == 1:
        shape.pop(-1 if b.type.rank == 1 else -2)
    return c.reshape(out, shape)


@lowers("matmul")
def aten_matmul(c: Context, self: Value, other: Value) -> Value:
    return matmul(c, self, other)


@lowers("mm", "bmm")
def mm(c: Context, self: Value, mat2: Value) -> Value:
    return matmul(c, self, mat2)


@lowers("mv")
def mv(c: Context, self: Value, vec: Value) -> Value:
    return matmul(c, self, vec)


@lowers("dot")
def dot(c: Context, self: Value, tensor: Value) -> Value:
    return matmul(c, self, tensor)


def _add_product(c: Context, bias: Value, product: Value, beta: Number, alpha: Number) -> Value:
    if alpha != 1:
        product = c.binary("mul", product, float(alpha), product.dtype)
    if beta == 0:
        return product
    if beta != 1:
        bias = c.binary("mul", bias, float(beta), bias.dtype)
    return c.b.add(product, c.cast(bias, product.dtype))


@lowers("addmm")
def addmm(c: Context, self: Value, mat1: Value, mat2: Value, beta: Number, alpha: Number) -> Value:
    return c.expand(_add_product(c, self, matmul(c, mat1, mat2), beta, alpha), c.out_type.shape)


@lowers("einsum")
def aten_einsum(c: Context, equation: str, tensors: list[Value], path: list[int] | None) -> Value:
    return einsum(c, equation, tensors, path or (), wide_sums=True)


@lowers("_trilinear")
def trilinear(c: Context, i1: Value, i2: Value, i3: Value, expand1: list[int], expand2: list[int], expand3: list[int],
              sumdim: list[int]) -> Value:  # fmt: skip
    """Σ over `sumdim` of the product of three tensors, each with axes of size 1 put in."""

    def widened(x: Value, places: list[int]) -> Value:
        shape = list(x.shape)
        for at in places:
            shape.insert(at, 1)
        return c.reshape(x, shape)

    x, y, z = (widened(v, e) for v, e in ((i1, expand1), (i2, expand2), (i3, expand3)))
    return c.b.sum(c.b.mul(c.b.mul(x, y), z), axes=tuple(sumdim))


@lowers("addbmm")
def addbmm(c: Context, self: Value, batch1: Value, batch2: Value, beta: Number, alpha: Number) -> Value:
    total = c.b.sum(matmul(c, batch1, batch2), axes=(0,))
    return c.expand(_add_product(c, self, total, beta, alpha), c.out_type.shape)


@lowers("baddbmm")
def baddbmm(c: Context, self: Value, batch1: Value, batch2: Value, beta: Number, alpha: Number) -> Value:
    return c.expand(_add_product(c, self, matmul(c, batch1, batch2), beta, alpha), c.out_type.shape)
