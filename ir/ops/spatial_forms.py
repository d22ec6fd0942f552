"""Pooling and distances in terms of `linear`, `math` and `tensor` ops (see extern_aten)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

SPATIAL_FORMS: dict[str, Callable[[Any, Any], Any]] = {}

# -- averages: along each axis a product with a matrix of ones where the window is ----------------------


def _weighted(b: Any, x: Any, axis: int, start: Any, end: Any, divisor: Any) -> Any:
    """Sums of x over start ≤ place < end along an axis, by the divisor; all i64[out]."""
    n, out, rank = x.shape[axis], start.shape[0], x.type.rank
    places = b.reshape(b.arange(end=n), shape=(n, 1))
    inside = b.cast(b.and_(b.ge(places, start), b.lt(places, end)), dtype=x.dtype)
    if divisor is not None:
        inside = b.div(inside, b.cast(divisor, dtype=x.dtype))
    last = [i for i in range(rank) if i != axis] + [axis]
    moved = x if axis == rank - 1 else b.transpose(x, perm=tuple(last))
    y = b.matmul(b.reshape(moved, shape=(x.type.numel // n, n)), inside)
    y = b.reshape(y, shape=(*moved.shape[:-1], out))
    return y if axis == rank - 1 else b.transpose(y, perm=tuple(last.index(i) for i in range(rank)))


def _adaptive(op: Any, b: Any) -> Any:
    y = op.self
    if 0 in y.shape:
        return b.full(shape=op.types[0].shape, value=0.0, dtype=y.dtype)
    result = op.types[0].shape
    for axis in range(y.type.rank - len(op.output_size), y.type.rank):
        n, out = y.shape[axis], result[axis]
        i = b.arange(end=out)
        start = b.floordiv(b.mul(i, n), b.constant_like(out, i))
        end = b.floordiv(b.add(b.mul(b.add(i, 1), n), out - 1), b.constant_like(out, i))
        y = _weighted(b, y, axis, start, end, b.sub(end, start))
    return y


def _average(op: Any, b: Any) -> Any:
    y, result = op.self, op.types[0].shape
    spatial = 2 if type(op).opdef.name.endswith("2d") else 3
    if 0 in y.shape or 0 in result:
        return b.full(shape=result, value=0.0, dtype=y.dtype)
    kernel, padding = _each(op.kernel_size, spatial), _each(op.padding, spatial)
    stride = _each(op.stride or op.kernel_size, spatial)
    for k, s, p, axis in zip(kernel, stride, padding, range(y.type.rank - spatial, y.type.rank), strict=True):
        n = y.shape[axis]
        begin = b.sub(b.mul(b.arange(end=result[axis]), s), p)
        stop = b.min(b.add(begin, k), b.constant_like(n + p, begin))
        start, end = b.max(begin, b.constant_like(0, begin)), b.min(stop, b.constant_like(n, begin))
        count = b.sub(stop, begin) if op.count_include_pad else b.sub(end, start)
        y = _weighted(b, y, axis, start, end, None if op.divisor_override else count)
    return b.mul(y, 1 / op.divisor_override) if op.divisor_override else y


def _each(value: Any, count: int) -> tuple[int, ...]:
    return tuple(value) * count if len(value) == 1 else tuple(value)


SPATIAL_FORMS |= {
    "_adaptive_avg_pool2d": _adaptive,
    "_adaptive_avg_pool3d": _adaptive,
    "avg_pool2d": _average,
    "avg_pool3d": _average,
}

# -- distances ----------------------------------------------------------------------------------------


def _distance(b: Any, difference: Any, p: float) -> Any:
    """The p-norm over the last axis."""
    size, axes = b.abs(difference), (difference.type.rank - 1,)
    if p == 0:
        return b.sum(b.cast(b.ne(size, 0.0), dtype=size.dtype), axes=axes)
    if p == math.inf:
        return b.amax(size, axes=axes)
    if p == 1:
        return b.sum(size, axes=axes)
    if p == 2:
        return b.sqrt(b.sum(b.mul(size, size), axes=axes))
    power = b.pow(size, b.constant_like(float(p), size))
    return b.pow(b.sum(power, axes=axes), b.constant_like(1 / p, size))


def _cdist(op: Any, b: Any) -> Any:
    (*_, r, d), (*_, q, _) = op.x1.shape, op.x2.shape
    if not d or 0 in op.types[0].shape:
        return b.full(shape=op.types[0].shape, value=0.0, dtype=op.types[0].dtype)
    left = b.reshape(op.x1, shape=(*op.x1.shape[:-2], r, 1, d))
    right = b.reshape(op.x2, shape=(*op.x2.shape[:-2], 1, q, d))
    return _distance(b, b.sub(left, right), op.p)


def _pdist(op: Any, b: Any) -> Any:
    x = op.self
    n, d = x.shape
    if n < 2 or not d:
        return b.full(shape=op.types[0].shape, value=0.0, dtype=op.types[0].dtype)
    parts = []
    for i in range(n - 1):
        row = b.slice(x, axis=0, start=i, end=i + 1)
        parts.append(_distance(b, b.sub(row, b.slice(x, axis=0, start=i + 1, end=n)), op.p))
    return parts[0] if len(parts) == 1 else b.concat(*parts, axis=0)


SPATIAL_FORMS |= {"_cdist_forward": _cdist, "_pdist_forward": _pdist}
