"""Resize: each axis by itself, as a gather of what its elements are made of."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from moec.frontend.onnx.context import ImportContext, Size
from moec.frontend.onnx.registry import imports
from moec.ir import DType, Value

_COARSEST = 64  # denominators of factors by which unknown sizes are multiplied


@imports("Upsample", since=9)
@imports("Resize", since=10)
def resize_10(c: ImportContext, x: Value, scales: Value, *, mode: str) -> Value:
    return _resized(c, x, range(x.type.rank), scales, None, mode, "asymmetric", None)


@imports("Resize", since=11)
def resize(c: ImportContext, x: Value, roi: Value | None = None, scales: Value | None = None,
           sizes: Value | None = None, *, antialias: int | None, axes: Any, coordinate_transformation_mode: str,
           cubic_coeff_a: float, exclude_outside: int, extrapolation_value: float,
           keep_aspect_ratio_policy: str | None, mode: str, nearest_mode: str) -> Value:  # fmt: skip
    if antialias or keep_aspect_ratio_policy not in (None, "stretch"):
        raise c.refuse("with antialias" if antialias else f"keep_aspect_ratio_policy {keep_aspect_ratio_policy!r}")
    chosen = range(x.type.rank) if axes is None else [c.norm_axis(a, x.type.rank) for a in axes]
    return _resized(c, x, chosen, scales, sizes, mode, coordinate_transformation_mode, nearest_mode)


def _resized(c: ImportContext, x: Value, axes: Any, scales: Value | None, sizes: Value | None, mode: str,
             coordinates: str, rounding: str | None) -> Value:  # fmt: skip
    if mode not in ("nearest", "linear") or (mode == "linear" and not x.dtype.is_float):
        raise c.refuse(f"mode {mode!r} of {x.dtype}")
    factors = None if scales is None else c.array(scales)
    wanted = None if sizes is None else c.elements(sizes)
    if scales is not None and scales.shape == (0,):  # where `sizes` is meant
        factors = None
    if (factors is None) == (wanted is None):
        raise c.refuse("the sizes are known only at run time")
    given = factors.reshape(-1).tolist() if factors is not None else wanted
    assert given is not None
    if len(given) != len(axes):
        raise c.refuse(f"{len(given)} scales or sizes for {len(axes)} axes of {x.type}", code="type")
    for axis, amount in zip(axes, given, strict=True):
        size = x.shape[axis]
        target, scale = (amount, None) if factors is None else (_scaled(c, size, amount), amount)
        if scale == 1.0 or (scale is None and target == size):
            continue
        place = _places(c, size, target, scale, coordinates)
        # opset 10 leaves it open; ONNX's tests and ONNX Runtime round up where an axis shrinks
        nearest = rounding or ("ceil" if scale is not None and scale < 1 else "floor")
        x = _nearest(c, x, axis, place, nearest) if mode == "nearest" else _linear(c, x, axis, place)
    return x


def _scaled(c: ImportContext, size: Size, scale: float) -> Size:
    """⌊size · scale⌋"""
    if isinstance(size, int):
        return int(np.float32(size) * np.float32(scale))
    ratio = Fraction(scale).limit_denominator(_COARSEST)
    if np.float32(ratio) != np.float32(scale):
        raise c.refuse(f"an axis of size {size} by {scale}")
    return size * ratio.numerator // ratio.denominator


def _places(c: ImportContext, size: Size, target: Size, scale: float | None, coordinates: str) -> Value:
    """f32[target]: where in the axis of `size` elements each result lies."""

    def number(n: Size) -> Value:
        return c.value(n, DType.F32) if isinstance(n, int) else c.cast(c.value(n, DType.I64), DType.F32)

    steps = c.cast(c.b.arange(end=target), DType.F32)
    if coordinates == "align_corners":
        between = c.b.max(number(target - 1), c.value(1.0, DType.F32))  # a single result lies at 0
        return c.b.div(c.b.mul(steps, number(size - 1)), between)
    factor = c.value(scale, DType.F32) if scale is not None else c.b.div(number(target), number(size))
    if coordinates == "asymmetric":
        return c.b.div(steps, factor)
    centred = c.b.sub(c.b.div(c.b.add(steps, 0.5), factor), 0.5)
    if coordinates == "half_pixel":
        return centred
    if coordinates == "pytorch_half_pixel" and isinstance(target, int):
        return centred if target > 1 else c.b.mul(steps, 0.0)
    raise c.refuse(f"coordinates {coordinates!r} for {target} results")


_ROUNDED: dict[str, Callable[[ImportContext, Value], Value]] = {
    "floor": lambda c, x: c.b.floor(x),
    "ceil": lambda c, x: c.b.ceil(x),
    "round_prefer_floor": lambda c, x: c.b.ceil(c.b.sub(x, 0.5)),
    "round_prefer_ceil": lambda c, x: c.b.floor(c.b.add(x, 0.5)),
}


def _nearest(c: ImportContext, x: Value, axis: int, place: Value, rounding: str) -> Value:
    if rounding not in _ROUNDED:
        raise c.refuse(f"nearest_mode {rounding!r}")
    return c.b.gather(x, _within(c, _ROUNDED[rounding](c, place), x.shape[axis]), axis=axis)


def _linear(c: ImportContext, x: Value, axis: int, place: Value) -> Value:
    """Between the two elements beside each place, those at the ends going on beyond them."""
    size = x.shape[axis]
    low = c.b.floor(place)
    part = c.cast(c.b.sub(place, low), x.dtype)
    part = c.reshape(part, (*part.shape, *[1] * (x.type.rank - axis - 1)))
    left, right = (c.b.gather(x, _within(c, at, size), axis=axis) for at in (low, c.b.add(low, 1.0)))
    return c.b.add(left, c.b.mul(c.b.sub(right, left), part))


def _within(c: ImportContext, place: Value, size: Size) -> Value:
    """i64: places in an axis of `size` elements, those outside at its ends."""
    at = c.b.max(c.cast(place, DType.I64), c.value(0, DType.I64))
    return c.b.min(at, c.value(size - 1, DType.I64))
