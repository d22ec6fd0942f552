"""Slices, gathers, scatters and what else is chosen by index."""

from __future__ import annotations

from typing import Any

import sympy

from moec.frontend.onnx import grouped
from moec.frontend.onnx.context import ImportContext, Size
from moec.frontend.onnx.ranges import never_negative
from moec.frontend.onnx.registry import imports
from moec.ir import DType, Value
from moec.ir.dims import product
from moec.ir.dims import size as as_size


@imports("Slice", since=10)
def slice_(c: ImportContext, x: Value, starts: Value, ends: Value, axes: Value | None = None,
           steps: Value | None = None) -> Value:  # fmt: skip
    bounds = c.elements(starts), c.elements(ends)
    if bounds[0] is None or bounds[1] is None:
        raise c.refuse("the bounds are known only at run time")
    return _slices(c, x, bounds[0], bounds[1], c.ints(axes, "axes"), c.ints(steps, "steps"))


@imports("Slice")
def slice_1(c: ImportContext, x: Value, *, starts: Any, ends: Any, axes: Any) -> Value:
    return _slices(c, x, tuple(starts), tuple(ends), axes, None)


def _slices(
    c: ImportContext, x: Value, starts: tuple[Size, ...], ends: tuple[Size, ...], axes: Any, steps: Any
) -> Value:
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    if len({len(starts), len(ends), len(axes), len(steps)}) > 1:
        raise c.refuse(f"{len(starts)} starts, {len(ends)} ends, {len(axes)} axes, {len(steps)} steps", code="type")
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        axis = c.norm_axis(axis, x.type.rank)
        if step < 1:
            raise c.refuse(f"step {step}")
        extent = x.shape[axis]
        # the last element: as many as min(1, size), an expression that says so
        low = extent - _at_most_one(extent) if start == -1 else _bound(c, start, extent)
        high = _bound(c, end, extent)
        if not ascends(low, high):
            high = low if isinstance(low, int) and isinstance(high, int) else low + _positive(high - low)
        x = c.slice(x, axis, low, high, step)
    return x


def _bound(c: ImportContext, bound: Size, extent: Size) -> Size:
    """A bound within the axis, counted from its start."""
    if isinstance(bound, int) and isinstance(extent, int):
        return min(max(bound + extent if bound < 0 else bound, 0), extent)
    if bound == extent or (isinstance(bound, int) and bound >= 2**31 - 1):
        return extent
    if isinstance(bound, int) and bound <= -(2**31 - 1):
        return 0
    if bound - extent == -1:  # of an empty axis it is its end, which is its start
        return extent - _at_most_one(extent)
    if isinstance(bound, int):
        # sizes of x[:, 1:] and x[:, :-1] come out as the same expression
        return _positive(extent + bound) if bound < 0 else extent - _positive(extent - bound)
    if ascends(0, bound):
        return bound if ascends(bound, extent) else extent - _positive(extent - bound)
    raise c.refuse(f"bound {bound} of an axis of size {extent}")


def _at_most_one(s: Size) -> Size:
    return min(s, 1) if isinstance(s, int) else as_size(sympy.Min(s.expr, 1))


def _positive(s: Size) -> Size:
    """max(s, 0)"""
    return max(s, 0) if isinstance(s, int) else s if ascends(0, s) else as_size(sympy.Max(s.expr, 0))


def ascends(low: Size, high: Size) -> bool:
    """Whether low ≤ high whatever the symbols are."""
    span = high - low
    return span >= 0 if isinstance(span, int) else bool(span.expr.is_nonnegative)


@imports("Gather")
def gather(c: ImportContext, x: Value, index: Value, *, axis: int) -> Value:
    axis = c.norm_axis(axis, x.type.rank)
    known = c.array(index)
    if known is not None and known.ndim == 0 and x.shape[axis] == 1 and int(known) in (0, -1):
        return c.reshape(x, (*x.shape[:axis], *x.shape[axis + 1 :]))
    return c.b.gather(x, index, axis=axis)


@imports("GatherND", since=11)
def gather_nd(c: ImportContext, x: Value, index: Value, *, batch_dims: int | None) -> Value:
    """The last axis of `index` holds positions along the first axes of x."""
    depth = index.shape[-1]
    if batch_dims or not isinstance(depth, int):
        raise c.refuse("with batch axes, or to an unknown depth")
    if depth == 1:
        return c.b.gather(x, c.reshape(index, index.shape[:-1]), axis=0)
    return c.b.gather(*_rows(c, x, index, depth), axis=0)


def _rows(c: ImportContext, x: Value, index: Value, depth: int) -> tuple[Value, Value]:
    """x with its first `depth` axes as one, and the row of each entry of `index` [..., depth]."""
    flat = None
    for i, extent in enumerate(x.shape[:depth]):
        at = c.reshape(c.slice(index, index.type.rank - 1, i, i + 1), index.shape[:-1])
        at = _non_negative(c, at, extent)
        flat = at if flat is None else c.b.add(c.b.mul(flat, c.value(extent, DType.I64)), at)
    if flat is None:
        raise c.refuse("no positions")
    return c.reshape(x, (product(x.shape[:depth]), *x.shape[depth:])), flat


@imports("ScatterND", since=11)
def scatter_nd(c: ImportContext, x: Value, index: Value, source: Value, *, reduction: str | None) -> Value:
    depth = index.shape[-1]
    if reduction not in (None, "none", "add") or not isinstance(depth, int) or x.dtype is DType.BOOL:
        raise c.refuse(f"reduction {reduction!r} of {x.dtype}, to depth {depth}")
    if index.type.rank < 2:
        raise c.refuse(f"indices {index.type}")
    rows, flat = _rows(c, x, index, depth)
    return c.reshape(c.b.index_put(rows, flat, source, accumulate=reduction == "add"), x.shape)


@imports("Compress", since=9)
def compress(c: ImportContext, x: Value, condition: Value, *, axis: int | None) -> Value:
    x = c.reshape(x, (x.type.numel,)) if axis is None else x
    axis = 0 if axis is None else c.norm_axis(axis, x.type.rank)
    if condition.shape[0] != x.shape[axis] and not (
        isinstance(condition.shape[0], int) and isinstance(x.shape[axis], int)
    ):
        raise c.refuse(f"a condition {condition.type} for {x.type}")
    kept = c.b.nonzero(condition, count=c.fresh())
    return c.b.gather(x, c.reshape(kept, kept.shape[:1]), axis=axis)


@imports("OneHot", since=9)
def one_hot(c: ImportContext, index: Value, depth: Value, values: Value, *, axis: int) -> Value:
    count = int(c.scalar(depth, "the depth"))
    if not index.dtype.is_integer:
        raise c.refuse(f"of {index.dtype}")
    at = c.norm_axis(axis, index.type.rank + 1)
    wide = _non_negative(c, index, count)
    wide = c.reshape(wide, (*index.shape[:at], 1, *index.shape[at:]))
    places = c.reshape(c.b.arange(end=count), (count, *[1] * (index.type.rank - at)))
    off, on = (c.reshape(c.slice(values, 0, i, i + 1), ()) for i in (0, 1))
    return c.b.where(c.b.eq(wide, places), on, off)


@imports("GatherElements", since=11)
def gather_elements(c: ImportContext, x: Value, index: Value, *, axis: int) -> Value:
    axis = c.norm_axis(axis, x.type.rank)
    return c.b.gather_elements(x, _non_negative(c, index, x.shape[axis]), axis=axis)


@imports("ScatterElements", since=11)
def scatter_elements(
    c: ImportContext, x: Value, index: Value, source: Value, *, axis: int, reduction: str | None
) -> Value:
    if reduction not in (None, "none", "add"):
        raise c.refuse(f"reduction {reduction!r}")
    if x.dtype is DType.BOOL and reduction == "add":
        raise c.refuse("adding booleans")
    axis = c.norm_axis(axis, x.type.rank)
    counted = grouped.counts(c, x, index, source, axis) if reduction == "add" else None
    if counted is not None:
        return counted
    index = _non_negative(c, index, x.shape[axis])
    return c.b.scatter_elements(x, index, source, axis=axis, reduce=reduction or "none")


@imports("Scatter", since=9)
def scatter(c: ImportContext, x: Value, index: Value, source: Value, *, axis: int) -> Value:
    return scatter_elements(c, x, index, source, axis=axis, reduction=None)


def _non_negative(c: ImportContext, index: Value, extent: Size) -> Value:
    """Indices from the end counted from the start, as i64."""
    index = c.cast(index, DType.I64)
    known = c.array(index)
    if never_negative(c, index) or (known is not None and (known >= 0).all()):
        return index
    return c.b.where(c.b.lt(index, 0), c.b.add(index, c.value(extent, DType.I64)), index)


@imports("NonZero", since=9)
def nonzero(c: ImportContext, x: Value) -> Value:
    if not x.type.rank:
        raise c.refuse("of a scalar")
    return c.transpose(c.b.nonzero(x, count=c.fresh()), (1, 0))
