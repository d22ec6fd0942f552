"""Views and writes that torch describes by strides or by a diagonal, as gathers and scatters of flat elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moec.frontend.aten.registry import lowers
from moec.frontend.context import Context
from moec.ir import DType, Value


def _stored(c: Context, x: Value) -> tuple[Value, list[int]]:
    """The elements in the order in which torch has them in memory, and the order of the axes there.

    Raises CompileError where the tensor is only a part of its memory."""
    tensor = c.node.args[0].meta["val"]
    order = sorted(range(tensor.dim()), key=lambda i: (-tensor.stride(i), i))
    dense = tensor.permute(order).is_contiguous() and tensor.storage_offset() == 0
    if not x.type.is_static or not dense or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.itemsize:
        raise c.refuse("it depends on how the tensor lies in memory", hint="use reshape, indexing or .to(dtype)")
    return c.reshape(c.transpose(x, order), (x.type.numel,)), order


def _places(c: Context, size: Sequence[int], stride: Sequence[int], offset: int) -> Value:
    """offset + Σ index · stride of every element: i64[size]."""
    places = c.value(offset, DType.I64)
    for axis, (n, step) in enumerate(zip(size, stride, strict=True)):
        along = c.b.mul(c.b.arange(end=n), c.value(step, DType.I64))
        places = c.b.add(places, c.reshape(along, [n if i == axis else 1 for i in range(len(size))]))
    return c.expand(places, size)


@lowers("as_strided", "as_strided_copy")
def as_strided(
    c: Context, self: Value, size: Sequence[int], stride: Sequence[int], storage_offset: int | None
) -> Value:
    flat, _ = _stored(c, self)
    return c.b.gather(flat, _places(c, size, stride, storage_offset or 0), axis=0)


@lowers("as_strided_scatter")
def as_strided_scatter(
    c: Context, self: Value, src: Value, size: Sequence[int], stride: Sequence[int], storage_offset: int | None
) -> Value:
    flat, order = _stored(c, self)
    put = c.b.index_put(flat, _places(c, size, stride, storage_offset or 0), c.cast(src, self.dtype))
    back = c.reshape(put, [self.shape[i] for i in order])
    return c.transpose(back, [order.index(i) for i in range(len(order))])


@lowers("unfold", "unfold_copy")
def unfold(c: Context, self: Value, dimension: int, size: int, step: int) -> Value:
    """Windows of `size` along an axis, every `step`; the window is the last axis."""
    if self.type.rank == 0:
        return c.reshape(self, c.out_type.shape)
    axis, rank = c.axis(dimension, self), self.type.rank
    starts = c.b.mul(c.b.arange(end=c.out_type.shape[axis]), c.value(step, DType.I64))
    index = c.b.add(c.reshape(starts, (c.out_type.shape[axis], 1)), c.b.arange(end=size))
    windows = c.b.gather(self, index, axis=axis)
    return c.transpose(windows, [*range(axis + 1), *range(axis + 2, rank + 1), axis + 1])


@lowers("diagonal_scatter")
def diagonal_scatter(c: Context, self: Value, src: Value, offset: int, dim1: int, dim2: int) -> Value:
    i, j = c.axis(dim1, self), c.axis(dim2, self)
    order = [i, j, *(a for a in range(self.type.rank) if a not in (i, j))]
    x = c.transpose(self, order)
    rows, columns = x.shape[:2]
    flat = c.reshape(x, (rows * columns, *x.shape[2:]))
    count = src.shape[-1]
    start: Any = offset if offset >= 0 else -offset * columns
    index = c.b.add(c.b.mul(c.b.arange(end=count), c.value(columns + 1, DType.I64)), c.value(start, DType.I64))
    diagonal = c.transpose(src, [src.type.rank - 1, *range(src.type.rank - 1)])
    put = c.reshape(c.b.index_put(flat, index, c.cast(diagonal, self.dtype)), x.shape)
    return c.transpose(put, [order.index(a) for a in range(self.type.rank)])


@lowers("pad")
def pad(c: Context, self: Value, pad: Sequence[Any], mode: str, value: Any) -> Value:
    """F.pad: constant, or by index along each padded axis."""
    from moec.frontend.aten.shape import constant_pad

    if mode == "constant":
        return constant_pad(c, self, pad, 0 if value is None else value)
    if mode not in ("reflect", "replicate", "circular"):
        raise c.refuse(f"mode {mode!r}")
    x = self
    for i in range(len(pad) // 2):
        axis, low, high = self.type.rank - 1 - i, pad[2 * i], pad[2 * i + 1]
        if mode == "circular" and isinstance(low, int) and isinstance(high, int):  # repeats what cropping leaves
            x = c.slice(x, axis, max(-low, 0), x.shape[axis] - max(-high, 0))
            low, high = max(low, 0), max(high, 0)
        n = x.shape[axis]
        if not all(isinstance(v, int) for v in (low, high, n)):
            raise c.refuse(f"mode {mode!r} needs sizes that are known")
        index = [_source(mode, at, n) for at in range(-low, n + high)]
        x = c.b.gather(x, c.b.reshape(_integers(c, index), shape=(len(index),)), axis=axis)
    return x


def _source(mode: str, at: int, n: int) -> int:
    if mode == "circular":
        return at % n
    if mode == "replicate":
        return min(max(at, 0), n - 1)
    at = abs(at)
    return at if at < n else 2 * (n - 1) - at


def _integers(c: Context, values: Sequence[int]) -> Value:
    """A constant of any length: runs of consecutive numbers, up or down, joined."""
    runs: list[list[int]] = []
    for v in values:
        last = runs[-1] if runs else None
        if last and v - last[-1] in (-1, 1) and (len(last) == 1 or v - last[-1] == last[-1] - last[-2]):
            last.append(v)
        else:
            runs.append([v])
    parts = []
    for run in runs:
        up = c.b.arange(end=len(run))
        first = c.value(run[0], DType.I64)
        parts.append(c.b.sub(first, up) if len(run) > 1 and run[1] < run[0] else c.b.add(first, up))
    return c.concat(parts, 0) if parts else c.b.arange(end=0)
