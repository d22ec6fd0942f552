"""Order statistics and binary search, by sorting and counting."""

from __future__ import annotations

from typing import Any

from moec.frontend.aten.registry import lowers
from moec.frontend.context import Context
from moec.ir import DType, Value


def _picked(c: Context, x: Value, axis: int, k: Value, keepdim: bool) -> list[Value]:
    """The element of rank `k` (i64, x's shape with 1 along the axis) in ascending order, and its index."""
    values, order = c.b.sort(x, axis=axis)
    found = [c.b.gather_elements(v, k, axis=axis) for v in (values, order)]
    shape = [s for i, s in enumerate(x.shape) if keepdim or i != axis]
    shape = [1 if keepdim and i == axis else s for i, s in enumerate(shape)]
    return [c.reshape(v, shape) for v in found]


def _scalar(c: Context, x: Value) -> list[Value]:
    return [x, c.full((), 0, DType.I64)]


@lowers("kthvalue")
def kthvalue(c: Context, self: Value, k: Any, dim: int, keepdim: bool) -> list[Value]:
    if self.type.rank == 0:
        return _scalar(c, self)
    axis = c.axis(dim, self)
    rank = c.full([1 if i == axis else s for i, s in enumerate(self.shape)], k - 1, DType.I64)
    return _picked(c, self, axis, rank, keepdim)


@lowers("median.dim")
def median_dim(c: Context, self: Value, dim: int, keepdim: bool) -> list[Value]:
    return _median(c, self, dim, keepdim, ignore_nan=False)


@lowers("nanmedian.dim")
def nanmedian_dim(c: Context, self: Value, dim: int, keepdim: bool) -> list[Value]:
    return _median(c, self, dim, keepdim, ignore_nan=True)


@lowers("median")
def median(c: Context, self: Value) -> Value:
    return _median(c, c.reshape(self, (self.type.numel,)), 0, False, ignore_nan=False)[0]


@lowers("nanmedian")
def nanmedian(c: Context, self: Value) -> Value:
    return _median(c, c.reshape(self, (self.type.numel,)), 0, False, ignore_nan=True)[0]


def _median(c: Context, x: Value, dim: int, keepdim: bool, ignore_nan: bool) -> list[Value]:
    """The lower median; a NaN is the median, or the last of all where they are ignored."""
    if x.type.rank == 0:
        return _scalar(c, x)
    axis = c.axis(dim, x)
    n = x.shape[axis]
    if not isinstance(n, int) or n == 0:
        raise c.refuse(f"the size of the axis must be known and not 0, got {n}")
    shape = [1 if i == axis else s for i, s in enumerate(x.shape)]
    rank = c.full(shape, (n - 1) // 2, DType.I64)
    if x.dtype.is_float:
        nans = c.b.sum(c.cast(c.b.isnan(x), DType.I64), axes=(axis,), keepdim=True)
        if ignore_nan:
            rank = c.b.floordiv(c.b.max(c.b.sub(n - 1, nans), c.value(0, DType.I64)), c.value(2, DType.I64))
        else:  # NaNs are sorted last, in the order of their indices
            rank = c.b.where(c.b.gt(nans, 0), c.b.sub(n, nans), rank)
    return _picked(c, x, axis, rank, keepdim)


@lowers("searchsorted.Tensor", "searchsorted.Scalar", "bucketize.Tensor", "bucketize.Scalar")
def searchsorted(c: Context, self: Any, right: bool, side: str | None = None, sorter: Value | None = None,
                 sorted_sequence: Value | None = None, boundaries: Value | None = None) -> Value:  # fmt: skip
    """How many elements of the sorted sequence come before each value."""
    keys = sorted_sequence if sorted_sequence is not None else boundaries
    assert keys is not None
    if sorter is not None:
        keys = c.b.gather_elements(keys, sorter, axis=keys.type.rank - 1)
    values = c.value(self, None if isinstance(self, Value) else keys.dtype)
    dtype = c.promote(keys, values)
    keys, values = c.cast(keys, dtype), c.cast(values, dtype)
    shape = values.shape
    if keys.type.rank == 1:
        keys = c.reshape(keys, [*[1] * len(shape), keys.shape[0]])
    else:
        keys = c.reshape(keys, [*keys.shape[:-1], 1, keys.shape[-1]])
    against = c.reshape(values, [*shape, 1])
    before = c.b.le(keys, against) if right or side == "right" else c.b.lt(keys, against)
    if dtype.is_float:  # NaN comes after every number
        before = c.b.or_(before, c.b.and_(c.b.isnan(against), c.b.not_(c.b.isnan(keys))))
    count = c.b.sum(c.cast(before, DType.I64), axes=(before.type.rank - 1,))
    return c.cast(count, c.out_type.dtype)
