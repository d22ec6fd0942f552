"""Sorting, selection and running sums."""

from __future__ import annotations

import math
from typing import Any

from moec.frontend.aten.registry import lowers
from moec.frontend.context import Context
from moec.ir import DType, Value


@lowers("cumsum")
def cumsum(c: Context, self: Value, dim: int) -> Value:
    x = c.cast(self, c.out_type.dtype)
    return c.b.cumsum(x, axis=c.axis(dim, x)) if x.type.rank else x


def _scanned(c: Context, parts: list[Value], axis: int, first: list[Any], combine: Any) -> list[Value]:
    """Inclusive scan of tuples of tensors along an axis, by doubling: log₂ n steps of `combine(before, here)`, where
    `first` stands before the first element."""
    n = parts[0].shape[axis]
    if not isinstance(n, int):
        raise c.refuse("the size of the axis must be known")
    shift = 1
    while shift < n:
        before = []
        for x, start in zip(parts, first, strict=True):
            head = c.full([shift if i == axis else s for i, s in enumerate(x.shape)], start, x.dtype)
            before.append(c.concat([head, c.slice(x, axis, 0, n - shift)], axis))
        parts = combine(before, parts)
        shift *= 2
    return parts


@lowers("cumprod")
def cumprod(c: Context, self: Value, dim: int) -> Value:
    x = c.cast(self, c.out_type.dtype)
    if x.type.rank == 0:
        return x
    wide = c.widen(x)
    (out,) = _scanned(c, [wide], c.axis(dim, x), [1], lambda before, here: [c.b.mul(before[0], here[0])])
    return c.cast(out, x.dtype)


@lowers("logcumsumexp")
def logcumsumexp(c: Context, self: Value, dim: int) -> Value:
    if self.type.rank == 0:
        return self

    def combine(before: list[Value], here: list[Value]) -> list[Value]:
        """ln(e^a + e^b) without overflow; equal infinities are themselves."""
        a, b = before[0], here[0]
        top, low = c.b.max(a, b), c.b.min(a, b)
        joined = c.b.add(top, c.b.log1p(c.b.exp(c.b.sub(low, top))))
        infinite = c.b.eq(c.b.abs(top), math.inf)
        return [c.b.where(infinite, top, joined)]

    (out,) = _scanned(c, [c.widen(self)], c.axis(dim, self), [-math.inf], combine)
    return c.cast(out, self.dtype)


@lowers("cummax")
def cummax(c: Context, self: Value, dim: int) -> list[Value]:
    return _running_extreme(c, self, dim, "ge")


@lowers("cummin")
def cummin(c: Context, self: Value, dim: int) -> list[Value]:
    return _running_extreme(c, self, dim, "le")


def _running_extreme(c: Context, x: Value, dim: int, better: str) -> list[Value]:
    """The best so far and its last index; NaN is better than any number."""
    if x.type.rank == 0:
        return [x, c.full((), 0, DType.I64)]
    axis = c.axis(dim, x)
    keys = c.cast(x, DType.I64) if x.dtype is DType.BOOL else x
    n = x.shape[axis]
    index = c.expand(c.reshape(c.b.arange(end=n), [n if i == axis else 1 for i in range(x.type.rank)]), x.shape)

    def combine(before: list[Value], here: list[Value]) -> list[Value]:
        (a, i), (b, j) = before, here
        keep_here = c.b.op(f"math.{better}", (b, a))
        if keys.dtype.is_float:
            keep_here = c.b.or_(c.b.isnan(b), c.b.and_(keep_here, c.b.not_(c.b.isnan(a))))
        keep_here = c.b.or_(keep_here, c.b.lt(i, 0))  # nothing stands before
        return [c.b.where(keep_here, b, a), c.b.where(keep_here, j, i)]

    best, at = _scanned(c, [keys, index], axis, [0, -1], combine)
    return [c.cast(best, x.dtype), at]


def _sort(c: Context, x: Value, dim: int, descending: bool) -> list[Value]:
    if x.type.rank == 0:
        return [x, c.full((), 0, DType.I64)]
    keys = c.cast(x, DType.U8) if x.dtype is DType.BOOL else x
    values, order = c.b.sort(keys, axis=c.axis(dim, x), descending=bool(descending))
    return [c.cast(values, x.dtype), order]


# math.sort is stable, which an unstable sort may be too
@lowers("sort", "sort.stable")
def sort(c: Context, self: Value, dim: int, descending: bool) -> list[Value]:
    return _sort(c, self, dim, descending)


@lowers("argsort", "argsort.stable")
def argsort(c: Context, self: Value, dim: int, descending: bool) -> Value:
    return _sort(c, self, dim, descending)[1]


@lowers("topk")
def topk(c: Context, self: Value, k: Any, dim: int, largest: bool) -> list[Value]:
    """Sorted, whatever the `sorted` flag: any order satisfies an unsorted call."""
    if not isinstance(k, int):
        raise c.refuse(f"k = {k} depends on an input size; it must be a constant")
    if self.type.rank == 0:
        return [self, c.full((), 0, DType.I64)]
    values, indices = c.b.topk(self, k=k, axis=c.axis(dim, self), largest=largest)
    return [values, indices]
