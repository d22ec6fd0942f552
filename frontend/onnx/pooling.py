"""Pools: the largest or the mean of what a window sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moec.frontend.onnx.context import ImportContext, Size
from moec.frontend.onnx.padding import around
from moec.frontend.onnx.registry import imports
from moec.ir import Value

Ints = Sequence[int] | None


@dataclass(frozen=True)
class _Axis:
    """How a window moves along one axis; `before` and `after` are its padding, `beyond` what ceil_mode adds to it."""

    kernel: int
    stride: int
    dilation: int
    before: int
    after: int
    beyond: int


def _axes(c: ImportContext, x: Value, kernel: Sequence[int], strides: Ints, dilations: Ints, pads: Ints, auto_pad: str,
          ceil: bool) -> list[_Axis]:  # fmt: skip
    n = len(kernel)
    if x.type.rank != n + 2:
        raise c.refuse(f"a window {tuple(kernel)} of {x.type}", code="type")
    stride, dilation = (tuple(a or [1] * n) for a in (strides, dilations))
    sides = around(c, auto_pad, pads, x.shape[2:], kernel, stride, dilation)
    found = []
    for size, k, s, d, b, a in zip(x.shape[2:], kernel, stride, dilation, *sides, strict=True):
        beyond = s - 1 if ceil else 0
        if ceil and a + s > d * (k - 1) + 1:  # the last window may begin in the padding, and is left out then
            if not isinstance(size, int):
                raise c.refuse(f"ceil_mode of an axis of size {size}")
            room = size + b + a - d * (k - 1) - 1
            if math.ceil(room / s) * s >= size + b:
                beyond = 0
        found.append(_Axis(k, s, d, b, a, beyond))
    return found


def _pooled(c: ImportContext, x: Value, axes: Sequence[_Axis], fill: float,
            join: Callable[[Value, Value], Value]) -> Value:  # fmt: skip
    """The joined elements of each window, axis after axis; what lies around x is `fill`."""
    before = (0, 0, *(a.before for a in axes))
    # with stride − 1 more at the end, each place of a window meets as many whole strides as there are results
    after = (0, 0, *(a.after + a.beyond + a.stride - 1 for a in axes))
    extents = list(x.shape[2:])
    x = c.b.pad(x, before=before, after=after, value=fill) if any((*before, *after)) else x
    for i, (a, size) in enumerate(zip(axes, extents, strict=True)):
        room = size + (a.before + a.after + a.beyond - a.dilation * (a.kernel - 1) - 1)
        count: Size = room // a.stride + 1
        if isinstance(count, int) and count < 0:
            raise c.refuse(f"a window of {a.kernel} on an axis of size {size}", code="type")
        places = [j * a.dilation for j in range(a.kernel)]
        parts = [c.slice(x, i + 2, p, count * a.stride + p, a.stride) for p in places]
        x = parts[0]
        for part in parts[1:]:
            x = join(x, part)
    return x


@imports("MaxPool")
def max_pool(c: ImportContext, x: Value, *, auto_pad: str, ceil_mode: int | None, dilations: Ints,
             kernel_shape: Sequence[int], pads: Ints, storage_order: int | None, strides: Ints) -> Value:  # fmt: skip
    c.floats(x)
    axes = _axes(c, x, kernel_shape, strides, dilations, pads, auto_pad, bool(ceil_mode))
    return _pooled(c, x, axes, float("-inf"), c.b.max)


@imports("AveragePool")
def average_pool(c: ImportContext, x: Value, *, auto_pad: str, ceil_mode: int | None, count_include_pad: int | None,
                 dilations: Ints, kernel_shape: Sequence[int], pads: Ints, strides: Ints) -> Value:  # fmt: skip
    c.floats(x)
    wide = c.widen(x)
    axes = _axes(c, x, kernel_shape, strides, dilations, pads, auto_pad, bool(ceil_mode))
    total = _pooled(c, wide, axes, 0.0, c.b.add)
    padded = any(a.before or a.after for a in axes)
    if not any(a.beyond for a in axes) and (count_include_pad or not padded):
        return c.cast(c.b.div(total, float(math.prod(kernel_shape))), x.dtype)
    ones = c.full((1, 1, *x.shape[2:]), 1.0, wide.dtype)
    if count_include_pad:  # padding counts, what ceil_mode adds does not
        sides = [(0, 0, *(getattr(a, side) for a in axes)) for side in ("before", "after")]
        ones = c.b.pad(ones, before=sides[0], after=sides[1], value=1.0)
        axes = [_Axis(a.kernel, a.stride, a.dilation, 0, 0, a.beyond) for a in axes]
    return c.cast(c.b.div(total, _pooled(c, ones, axes, 0.0, c.b.add)), x.dtype)


@imports("GlobalAveragePool")
def global_average(c: ImportContext, x: Value) -> Value:
    c.floats(x)
    return c.b.mean(x, axes=tuple(range(2, x.type.rank)), keepdim=True)


@imports("GlobalMaxPool")
def global_max(c: ImportContext, x: Value) -> Value:
    c.floats(x)
    return c.b.amax(x, axes=tuple(range(2, x.type.rank)), keepdim=True)
