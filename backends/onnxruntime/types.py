"""How IR element types appear in the ONNX graph."""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as onnx
import torch

from moec.ir import DType
from moec.ir.arrays import BYTES

# what ONNX calls the types that the backend carries in others
STORED = {
    DType.F16: onnx.DataType.FLOAT16,
    DType.BF16: onnx.DataType.BFLOAT16,
    DType.F8E4M3: onnx.DataType.FLOAT8E4M3FN,
    DType.F8E5M2: onnx.DataType.FLOAT8E5M2,
    DType.F8E4M3FNUZ: onnx.DataType.FLOAT8E4M3FNUZ,
    DType.F8E5M2FNUZ: onnx.DataType.FLOAT8E5M2FNUZ,
    DType.F8E8M0: onnx.DataType.FLOAT8E8M0,
    DType.I4: onnx.DataType.INT4,
    DType.U4: onnx.DataType.UINT4,
    DType.I2: onnx.DataType.INT2,
    DType.U2: onnx.DataType.UINT2,
}
ONNX = {
    DType.F64: onnx.DataType.DOUBLE,
    DType.F32: onnx.DataType.FLOAT,
    DType.F8E4M3: onnx.DataType.FLOAT8E4M3FN,
    DType.F8E5M2: onnx.DataType.FLOAT8E5M2,
    DType.F16: onnx.DataType.FLOAT16,  # this and the next of weights only, which are widened before anything else
    DType.BF16: onnx.DataType.BFLOAT16,
    DType.I4: onnx.DataType.INT4,  # of weights that DequantizeLinear takes
    DType.I64: onnx.DataType.INT64,
    DType.I32: onnx.DataType.INT32,
    DType.I16: onnx.DataType.INT16,
    DType.I8: onnx.DataType.INT8,
    DType.U64: onnx.DataType.UINT64,
    DType.U32: onnx.DataType.UINT32,
    DType.U16: onnx.DataType.UINT16,
    DType.U8: onnx.DataType.UINT8,
    DType.BOOL: onnx.DataType.BOOL,
}
FLOAT8 = (DType.F8E4M3, DType.F8E5M2)
NARROW_INTEGERS = (DType.I16, DType.I8, DType.U8)


@functools.cache
def carrier(dtype: DType) -> DType:
    """The type that a value has while it is computed: bf16 and f16 are computed in f32, and FP8 values are
    f32 numbers that were rounded to FP8 (most CPU kernels take neither). Stored FP8 weights stay FP8. Integers below
    8 bits are carried by 8-bit ones."""
    if dtype in BYTES:
        return BYTES[dtype]
    return DType.F32 if dtype in (DType.BF16, DType.F16) or (dtype.is_float and dtype.bits == 8) else dtype


def carried(tensor: torch.Tensor, dtype: DType) -> torch.Tensor:
    """A tensor of `dtype` in its carrier."""
    if carrier(dtype) is dtype:
        return tensor
    return tensor.view(BYTES[dtype].torch) if dtype in BYTES else tensor.to(carrier(dtype).torch)


def uncarried(tensor: torch.Tensor, dtype: DType) -> torch.Tensor:
    """The reverse of `carried`."""
    if carrier(dtype) is dtype:
        return tensor
    return tensor.view(dtype.torch) if dtype in BYTES else tensor.to(dtype.torch)


def onnx_type(dtype: DType) -> onnx.DataType:
    """The ONNX type of the carrier."""
    return ONNX[carrier(dtype)]


@functools.cache
def numpy_type(dtype: DType) -> np.dtype:
    """The NumPy type of the carrier."""
    return np.dtype(onnx_type(dtype).numpy())
