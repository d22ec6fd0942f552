"""torch tensors as NumPy arrays and back, FP8 and bfloat16 included (NumPy has those from ml_dtypes)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

from moec.ir.errors import CompileError
from moec.ir.types import DType

NUMPY = {
    DType.F64: np.float64, DType.F32: np.float32, DType.F16: np.float16, DType.BF16: ml_dtypes.bfloat16,
    DType.F8E4M3: ml_dtypes.float8_e4m3fn, DType.F8E5M2: ml_dtypes.float8_e5m2, DType.I64: np.int64,
    DType.I32: np.int32, DType.I16: np.int16, DType.I8: np.int8, DType.U64: np.uint64, DType.U32: np.uint32,
    DType.U16: np.uint16, DType.U8: np.uint8, DType.BOOL: np.bool_, DType.C64: np.complex64, DType.I4: ml_dtypes.int4,
    DType.U4: ml_dtypes.uint4, DType.I2: ml_dtypes.int2, DType.U2: ml_dtypes.uint2,
    DType.F8E4M3FNUZ: ml_dtypes.float8_e4m3fnuz, DType.F8E5M2FNUZ: ml_dtypes.float8_e5m2fnuz,
    DType.F8E8M0: ml_dtypes.float8_e8m0fnu,
}  # fmt: skip
_FROM_NUMPY = {np.dtype(v): k for k, v in NUMPY.items()}
_FLOAT8 = (DType.F8E4M3, DType.F8E5M2, DType.F8E4M3FNUZ, DType.F8E5M2FNUZ, DType.F8E8M0)
_AS_BITS = {DType.BF16: torch.int16, **dict.fromkeys(_FLOAT8, torch.uint8)}
# types below 8 bits: the 8-bit integers that a byte of theirs is
BYTES = {DType.I4: DType.I8, DType.I2: DType.I8, DType.U4: DType.U8, DType.U2: DType.U8}
# nothing of ours computes with these: they come and go
OPAQUE = frozenset({*BYTES, DType.F8E4M3FNUZ, DType.F8E5M2FNUZ, DType.F8E8M0})


def dtype_of(array: np.ndarray) -> DType:
    """The element type of an array. Raises CompileError for one that the IR does not have (strings, objects)."""
    try:
        return _FROM_NUMPY[array.dtype.newbyteorder("=") if array.dtype.byteorder == ">" else array.dtype]
    except KeyError:
        raise CompileError(f"elements of type {array.dtype} are not supported", code="dtype") from None


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous array with the tensor's elements; shares memory where it can."""
    tensor = tensor.detach().cpu().contiguous()
    dtype = DType.of(tensor.dtype)
    if dtype in _AS_BITS:
        return tensor.view(_AS_BITS[dtype]).numpy().view(NUMPY[dtype])
    if dtype in BYTES:
        return tensor.view(BYTES[dtype].torch).numpy().astype(NUMPY[dtype])
    return tensor.numpy()


def from_numpy(array: Any) -> torch.Tensor:
    """A tensor with the array's elements; copies what torch may not write to. Raises CompileError as `dtype_of`."""
    array = np.asarray(array)
    dtype = dtype_of(array)
    if dtype in BYTES:
        return torch.from_numpy(array.astype(NUMPY[BYTES[dtype]])).view(dtype.torch)
    # torch takes native byte order only; it warns of arrays that it must not write to
    array = np.require(array, dtype=np.dtype(NUMPY[dtype]).newbyteorder("="), requirements=["C", "W"])
    if dtype in _AS_BITS:
        bits = np.int16 if dtype is DType.BF16 else np.uint8
        return torch.from_numpy(array.view(bits)).view(dtype.torch)
    return torch.from_numpy(array.view(NUMPY[dtype]))  # NumPy has two types for some widths, of which torch knows one
