"""Tensors made from nothing: constants, ranges, filled tensors."""

from __future__ import annotations

from typing import Any

from moec.frontend.aten.registry import lowers
from moec.frontend.context import Context
from moec.ir import Dim, DType, Value
from moec.ir.ops.tensor import INLINE_LIMIT


@lowers("arange.start_step")
def arange_step(c: Context, start: Any, end: Any, step: Any) -> Value:
    return _arange(c, start, end, step)


@lowers("arange.start")
def arange_start(c: Context, start: Any, end: Any) -> Value:
    return _arange(c, start, end, 1)


@lowers("arange")
def arange(c: Context, end: Any) -> Value:
    return _arange(c, 0, end, 1)


def _arange(c: Context, start: Any, end: Any, step: Any) -> Value:
    dtype = c.out_type.dtype
    whole = all(isinstance(v, Dim) or float(v).is_integer() for v in (start, end, step))
    if whole and step > 0:
        integers = {k: v if isinstance(v, Dim) else int(v) for k, v in (("start", start), ("end", end))}
        return c.b.arange(**integers, step=int(step), dtype=dtype)
    count = c.out_type.shape[0]
    x = c.b.arange(end=count, dtype=DType.I64)
    compute = DType.F64 if dtype.is_float else DType.I64  # torch steps in double precision
    scaled = c.b.mul(c.cast(x, compute), c.value(step, compute))
    return c.cast(c.b.add(scaled, c.value(start, compute)), dtype)


@lowers("full", "full_like", "new_full")
def full(c: Context, fill_value: Any) -> Value:
    t = c.out_type
    if isinstance(fill_value, Value | Dim):
        return c.expand(c.value(fill_value, t.dtype), t.shape)
    return c.full(t.shape, fill_value, t.dtype)


@lowers("scalar_tensor")
def scalar_tensor(c: Context, s: Any) -> Value:
    return c.value(s, c.out_type.dtype)


@lowers("ones", "ones_like", "new_ones")
def ones(c: Context) -> Value:
    return c.full(c.out_type.shape, 1, c.out_type.dtype)


# memory that is about to be overwritten reads as zeros here, so that results never depend on garbage
@lowers(
    "zeros", "zeros_like", "new_zeros", "empty.memory_format", "empty_like", "new_empty", "empty_permuted",
    "empty_strided", "new_empty_strided", "zero",
)  # fmt: skip
def zeros(c: Context) -> Value:
    return c.full(c.out_type.shape, 0, c.out_type.dtype)


@lowers("fill.Scalar", "fill.Tensor")
def fill(c: Context, self: Value, value: Any) -> Value:
    return c.expand(c.value(value, self.dtype), self.shape)


@lowers("eye", "eye.m")
def eye(c: Context) -> Value:
    n, m = c.out_type.shape
    rows = c.b.reshape(c.b.arange(end=n), shape=(n, 1))
    return c.cast(c.b.eq(rows, c.b.arange(end=m)), c.out_type.dtype)


@lowers("linspace")
def linspace(c: Context, start: Any, end: Any, steps: Any) -> Value:
    if not isinstance(steps, int) or not isinstance(start, int | float) or not isinstance(end, int | float):
        raise c.refuse("the bounds and the number of steps must be constants")
    if steps > INLINE_LIMIT or steps < 2:
        x = c.b.arange(end=steps, dtype=DType.F64)
        values = c.b.add(c.b.mul(x, (end - start) / max(steps - 1, 1)), float(start))
        return c.cast(values, c.out_type.dtype)
    points = [start + (end - start) * i / (steps - 1) for i in range(steps)]
    return c.cast(c.b.const(points, DType.F64, (steps,)), c.out_type.dtype)


_RANDOM = (
    "rand", "randn", "randint", "randint.low", "randperm", "rand_like", "randn_like", "bernoulli.p", "bernoulli",
    "multinomial", "normal.Tensor_Tensor", "uniform",
)  # fmt: skip


@lowers(*_RANDOM)
def random(c: Context) -> Value:
    raise c.refuse("random numbers cannot be compiled", hint="draw them outside and pass them as an argument")


_DATA_DEPENDENT = (
    "unique_consecutive", "_unique2", "unique_dim", "bincount",
    "repeat_interleave.Tensor", "repeat_interleave.self_Tensor", "_local_scalar_dense", "item",
)  # fmt: skip


@lowers(*_DATA_DEPENDENT)
def data_dependent(c: Context) -> Value:
    raise c.refuse(
        "the result's shape (or a Python number) depends on the values of a tensor",
        code="data-dependent",
        hint="keep shapes fixed: use torch.where, a mask and a weighted sum, or one_hot(..., num_classes=N)",
    )
