"""Quantising and dequantising, per tensor and per axis."""

from __future__ import annotations

from moec.frontend.onnx.context import ImportContext
from moec.frontend.onnx.extern import element_type
from moec.frontend.onnx.registry import imports
from moec.ir import DType, Value

_RANGES = {DType.U8: (0, 255), DType.I8: (-128, 127), DType.I16: (-32768, 32767)}


def _beside(c: ImportContext, v: Value, x: Value, axis: int) -> Value:
    """A value per tensor or per element of an axis, so that it broadcasts against x."""
    if v.type.rank == 0 or v.shape == (1,):
        return c.reshape(v, ())
    if v.type.rank != 1:
        raise c.refuse("in blocks")
    axis = c.norm_axis(axis, x.type.rank)
    return c.reshape(v, (*v.shape, *[1] * (x.type.rank - axis - 1)))


@imports("DequantizeLinear", since=10)
def dequantize(c: ImportContext, x: Value, scale: Value, zero: Value | None = None, *, axis: int | None,
               block_size: int | None, output_dtype: int | None) -> Value:  # fmt: skip
    if block_size:
        raise c.refuse("in blocks")
    dtype = element_type(output_dtype) if output_dtype else scale.dtype
    if dtype is not DType.F32 or scale.dtype is not DType.F32:
        raise c.refuse(f"to {dtype} with {scale.dtype} scales")
    at = 1 if axis is None else axis
    if zero is None:
        wide = c.cast(x, DType.F32)
    elif x.dtype.is_float:
        raise c.refuse("floats with a zero point")
    else:
        difference = c.b.sub(c.cast(x, DType.I32), _beside(c, c.cast(zero, DType.I32), x, at))
        wide = c.cast(difference, DType.F32)
    return c.b.mul(wide, _beside(c, scale, x, at))


@imports("QuantizeLinear", since=10)
def quantize(c: ImportContext, x: Value, scale: Value, zero: Value | None = None, *, axis: int | None,
             block_size: int | None, output_dtype: int | None, precision: int | None,
             saturate: int | None) -> Value:  # fmt: skip
    if block_size or precision:
        raise c.refuse("in blocks, or with a precision")
    if x.dtype is not DType.F32 or scale.dtype is not DType.F32:
        raise c.refuse(f"of {x.dtype} with {scale.dtype} scales")
    dtype = zero.dtype if zero is not None else element_type(output_dtype) if output_dtype else DType.U8
    at = 1 if axis is None else axis
    scaled = c.b.div(x, _beside(c, scale, x, at))
    if dtype is DType.F8E4M3 and zero is None and saturate != 0:
        return c.cast(scaled, dtype)
    if dtype not in _RANGES:
        raise c.refuse(f"to {dtype}")
    assert dtype is not None
    rounded = c.b.round(scaled)
    if zero is not None:
        rounded = c.b.add(rounded, _beside(c, c.cast(zero, DType.F32), x, at))
    low, high = _RANGES[dtype]
    return c.cast(c.b.clamp(rounded, low=float(low), high=float(high)), dtype)
