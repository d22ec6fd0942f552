"""torch tensors as NumPy arrays and back, FP8 and bfloat16 included (NumPy has those from ml_dtypes)."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F

from moec.ir.dims import evaluate
from moec.ir.errors import CompileError
from moec.ir.types import DType, TensorType

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
_TORCH = frozenset("fdlihbB?")  # codes of NumPy's types that are torch's too
_AS_BITS = {DType.BF16: torch.int16, **dict.fromkeys(_FLOAT8, torch.uint8)}
# types below 8 bits: the 8-bit integers that a byte of theirs is
BYTES = {DType.I4: DType.I8, DType.I2: DType.I8, DType.U4: DType.U8, DType.U2: DType.U8}
# nothing of ours computes with these but `quant`, for which i4 are codes: they come and go
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
    if type(array) is np.ndarray and array.dtype.char in _TORCH and array.dtype.isnative and array.flags.carray:
        return torch.from_numpy(array)
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


# torch neither converts, copies nor compares what has less than 8 bits; it views it as the bytes that hold it


def converted(tensor: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Numbers as elements of `dtype`, which has to hold them where it has less than 8 bits."""
    return tensor.to(BYTES[dtype].torch).view(dtype.torch) if dtype in BYTES else tensor.to(dtype.torch)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Elements of less than 8 bits as the 8-bit integers that hold them; anything else as it is."""
    dtype = DType.of(tensor.dtype)
    return tensor.view(BYTES[dtype].torch) if dtype in BYTES else tensor


def from_bytes(tensor: torch.Tensor, dtype: DType) -> torch.Tensor:
    """The inverse of `as_bytes`."""
    return tensor.view(dtype.torch) if dtype in BYTES and DType.of(tensor.dtype) is BYTES[dtype] else tensor


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy."""
    return as_bytes(tensor).clone(memory_format=torch.contiguous_format).view(tensor.dtype)


def packed(tensor: torch.Tensor) -> torch.Tensor:
    """What a file holds of a tensor: 4-bit integers two a byte, the first in the low half, u8[⌈elements / 2⌉], 2-bit
    ones four a byte; anything else as it is."""
    dtype = DType.of(tensor.dtype)
    if dtype not in BYTES:
        return tensor
    each = 8 // dtype.bits
    flat = tensor.reshape(-1).view(torch.uint8) & (2**dtype.bits - 1)
    flat = F.pad(flat, (0, -flat.numel() % each)).reshape(-1, each)
    result = flat[:, 0].clone()
    for i in range(1, each):
        result |= flat[:, i] << (i * dtype.bits)
    return result


def packed_type(type: TensorType) -> TensorType:
    """The type of what `packed` makes of a tensor of a static type."""
    if type.dtype not in BYTES:
        return type
    return TensorType(DType.U8, (-(-math.prod(evaluate(s, {}) for s in type.shape) * type.dtype.bits // 8),))


def unpacked(tensor: torch.Tensor, type: TensorType) -> torch.Tensor:
    """The inverse of `packed`, for a tensor of `packed_type(type)`."""
    if type.dtype not in BYTES:
        return tensor
    shape = [evaluate(s, {}) for s in type.shape]
    bits, each = type.dtype.bits, 8 // type.dtype.bits
    flat = torch.stack([(tensor >> (i * bits)) & (2**bits - 1) for i in range(each)], 1).reshape(-1)
    if BYTES[type.dtype] is DType.I8:  # the highest bit is the sign
        flat = flat.view(torch.int8)
        flat = torch.where(flat >= 2 ** (bits - 1), flat - 2**bits, flat)
    return flat[: math.prod(shape)].reshape(shape).view(type.dtype.torch)
