"""Reductions and softmax."""

from __future__ import annotations

import math
from typing import Any

from moec.frontend.aten.registry import lowers
from moec.frontend.context import Context, Number
from moec.ir import DType, Value
from moec.ir.types import TorchDType


def _sum(c: Context, x: Value, dim: Any, keepdim: bool) -> Value:
    return c.b.sum(x, axes=c.axes(dim, x), keepdim=keepdim)


@lowers("sum")
def sum_all(c: Context, self: Value) -> Value:
    return _sum(c, c.cast(self, c.out_type.dtype), None, False)


@lowers("sum.dim_IntList")
def sum_dims(c: Context, self: Value, dim: Any, keepdim: bool) -> Value:
    return _sum(c, c.cast(self, c.out_type.dtype), dim, keepdim)


@lowers("mean")
def mean_all(c: Context, self: Value) -> Value:
    return mean_dims(c, self, None, False)


@lowers("mean.dim")
def mean_dims(c: Context, self: Value, dim: Any, keepdim: bool) -> Value:
    x = c.cast(self, c.out_type.dtype)
    return c.b.mean(x, axes=c.axes(dim, x), keepdim=keepdim)


@lowers("prod")
def prod_all(c: Context, self: Value) -> Value:
    return prod_dim(c, self, None, False)


@lowers("prod.dim_int")
def prod_dim(c: Context, self: Value, dim: Any, keepdim: bool) -> Value:
    x = c.cast(self, c.out_type.dtype)
    return c.b.prod(x, axes=c.axes(dim, x), keepdim=keepdim)


@lowers("amax")
def amax(c: Context, self: Value, dim: Any, keepdim: bool) -> Value:
    return _extreme(c, "amax", self, dim, keepdim)


@lowers("amin")
def amin(c: Context, self: Value, dim: Any, keepdim: bool) -> Value:
    return _extreme(c, "amin", self, dim, keepdim)


def _extreme(c: Context, op: str, x: Value, dim: Any, keepdim: bool) -> Value:
    if x.dtype is DType.BOOL:
        op = "any" if op == "amax" else "all"
    return c.b.op(f"math.{op}", (x,), {"axes": c.axes(dim, x), "keepdim": keepdim})


@lowers("max")
def max_all(c: Context, self: Value) -> Value:
    return _extreme(c, "amax", self, None, False)


@lowers("min")
def min_all(c: Context, self: Value) -> Value:
    return _extreme(c, "amin", self, None, False)


@lowers("max.dim")
def max_dim(c: Context, self: Value, dim: int, keepdim: bool) -> list[Value]:
    return [_extreme(c, "amax", self, dim, keepdim), argmax(c, self, dim, keepdim)]


@lowers("min.dim")
def min_dim(c: Context, self: Value, dim: int, keepdim: bool) -> list[Value]:
    return [_extreme(c, "amin", self, dim, keepdim), argmin(c, self, dim, keepdim)]


@lowers("argmax")
def argmax(c: Context, self: Value, dim: int | None, keepdim: bool) -> Value:
    if dim is None:
        index = c.b.argmax(c.reshape(self, (self.type.numel,)), axis=0)
        return c.reshape(index, [1] * self.type.rank) if keepdim else index
    if self.type.rank == 0:
        return c.full((), 0, DType.I64)
    x = c.cast(self, DType.I64) if self.dtype is DType.BOOL else self
    return c.b.argmax(x, axis=c.axis(dim, self), keepdim=keepdim)


@lowers("argmin")
def argmin(c: Context, self: Value, dim: int | None, keepdim: bool) -> Value:
    """Through a sort: −x would overflow for the smallest integer and lose NaN, which counts as the minimum."""
    x = self if dim is not None and self.type.rank else c.reshape(self, (self.type.numel,))
    axis = c.axis(dim, self) if dim is not None and self.type.rank else 0
    if x.dtype is DType.BOOL:
        x = c.cast(x, DType.I64)
    if x.dtype.is_float:
        x = c.b.where(c.b.isnan(x), c.value(-math.inf, x.dtype), x)
    _, order = c.b.sort(x, axis=axis)
    first = c.slice(order, axis, 0, 1)
    return c.reshape(first, c.out_type.shape if isinstance(c.out, list) is False else c.out[1].shape)


@lowers("all", "all.dim", "all.dims")
def all_(c: Context, self: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return c.b.all(c.truth(self), axes=c.axes(dim, self), keepdim=keepdim)


@lowers("any", "any.dim", "any.dims")
def any_(c: Context, self: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return c.b.any(c.truth(self), axes=c.axes(dim, self), keepdim=keepdim)


def _variance(c: Context, x: Value, dim: Any, correction: Number | None, keepdim: bool) -> tuple[Value, Value]:
    axes = c.axes(dim, x)
    wide = c.widen(x)
    mean = c.b.mean(wide, axes=axes, keepdim=True)
    centred = c.b.sub(wide, mean)
    total = c.b.sum(c.b.mul(centred, centred), axes=axes, keepdim=keepdim)
    count = x.type.with_shape([x.shape[a] for a in axes]).numel
    correction = 1 if correction is None else correction
    if isinstance(count, int):
        degrees = c.value(float(max(count - correction, 0)), wide.dtype)  # of freedom
    else:
        degrees = c.b.max(c.b.sub(c.value(count, wide.dtype), float(correction)), c.value(0.0, wide.dtype))
    variance = c.b.div(total, degrees)
    if not keepdim:
        mean = c.reshape(mean, variance.shape)
    return c.cast(variance, x.dtype), c.cast(mean, x.dtype)


@lowers("var.correction")
def var(c: Context, self: Value, dim: Any, correction: Number | None, keepdim: bool) -> Value:
    return _variance(c, self, dim, correction, keepdim)[0]


@lowers("var_mean.correction")
def var_mean(c: Context, self: Value, dim: Any, correction: Number | None, keepdim: bool) -> list[Value]:
    return list(_variance(c, self, dim, correction, keepdim))


@lowers("std.correction")
def std(c: Context, self: Value, dim: Any, correction: Number | None, keepdim: bool) -> Value:
    return c.cast(c.b.sqrt(_variance(c, c.widen(self), dim, correction, keepdim)[0]), self.dtype)


@lowers("linalg_vector_norm")
def vector_norm(c: Context, self: Value, ord: Number, dim: Any, keepdim: bool, dtype: TorchDType | None) -> Value:
    x = c.widen(c.cast(self, DType.of(dtype) if dtype else c.out_type.dtype))
    axes = c.axes(dim, x)
    if ord == 2:
        y = c.b.sqrt(c.b.sum(c.b.mul(x, x), axes=axes, keepdim=keepdim))
    elif ord == 1:
        y = c.b.sum(c.b.abs(x), axes=axes, keepdim=keepdim)
    elif ord in (math.inf, -math.inf):
        y = c.b.op("math.amax" if ord > 0 else "math.amin", (c.b.abs(x),), {"axes": axes, "keepdim": keepdim})
    elif ord == 0:
        y = c.b.sum(c.cast(c.b.ne(x, 0.0), x.dtype), axes=axes, keepdim=keepdim)
    else:
        powers = c.b.pow(c.b.abs(x), c.value(float(ord), x.dtype))
        y = c.b.pow(c.b.sum(powers, axes=axes, keepdim=keepdim), c.value(1 / ord, x.dtype))
    return c.cast(y, c.out_type.dtype)


@lowers("norm.Scalar", "norm.ScalarOpt_dim")
def norm(c: Context, self: Value, p: Number, dim: Any = None, keepdim: bool = False) -> Value:
    return vector_norm(c, self, p, dim, keepdim, None)


@lowers("softmax.int", "special_softmax")
def softmax(c: Context, self: Value, dim: int) -> Value:
    return _along(c, "softmax", c.cast(self, c.out_type.dtype), dim)


@lowers("log_softmax.int", "special_log_softmax")
def log_softmax(c: Context, self: Value, dim: int) -> Value:
    return _along(c, "log_softmax", c.cast(self, c.out_type.dtype), dim)


@lowers("_softmax")
def core_softmax(c: Context, self: Value, dim: int) -> Value:
    return _along(c, "softmax", c.cast(self, c.out_type.dtype), dim)


@lowers("_log_softmax")
def core_log_softmax(c: Context, self: Value, dim: int) -> Value:
    return _along(c, "log_softmax", c.cast(self, c.out_type.dtype), dim)


@lowers("_safe_softmax")
def safe_softmax(c: Context, self: Value, dim: int) -> Value:
    """Rows of −inf give zeros instead of NaN."""
    x = c.cast(self, c.out_type.dtype)
    axis = c.axis(dim, x)
    dead = c.b.all(c.b.eq(x, -math.inf), axes=(axis,), keepdim=True)
    return c.b.where(dead, c.value(0.0, x.dtype), _along(c, "softmax", x, dim))


def _along(c: Context, op: str, x: Value, dim: int) -> Value:
    if x.type.rank == 0:
        return c.reshape(_along(c, op, c.reshape(x, (1,)), 0), ())
    return c.b.op(f"math.{op}", (x,), {"axis": c.axis(dim, x)})


@lowers("logsumexp")
def logsumexp(c: Context, self: Value, dim: Any, keepdim: bool) -> Value:
    x = c.widen(c.cast(self, c.out_type.dtype))
    axes = c.axes(dim, x)
    top = c.b.amax(x, axes=axes, keepdim=True)
    finite = c.b.where(c.b.eq(c.b.abs(top), math.inf), c.value(0.0, x.dtype), top)
    total = c.b.log(c.b.sum(c.b.exp(c.b.sub(x, finite)), axes=axes, keepdim=True))
    return c.cast(c.reshape(c.b.add(total, finite), c.out_type.shape), c.out_type.dtype)
