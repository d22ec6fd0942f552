"""Sorting, selection and running sums."""

from __future__ import annotations

from typing import Any

from moec.frontend.aten.registry import lowers
from moec.frontend.context import Context
from moec.ir import DType, Value


@lowers("cumsum")
def cumsum(c: Context, self: Value, dim: int) -> Value:
    x = c.cast(self, c.out_type.dtype)
    return c.b.cumsum(x, axis=c.axis(dim, x)) if x.type.rank else x


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
