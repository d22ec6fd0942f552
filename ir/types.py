"""Element types and tensor types."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moec.ir.dims import Dim, product
from moec.ir.errors import CompileError

TorchDType = torch.dtype


class DType(enum.StrEnum):
    """Element type; the value is its name in the text format, and compares equal to it."""

    F64 = "f64"
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    F8E4M3 = "f8e4m3fn"
    F8E5M2 = "f8e5m2"
    F8E4M3FNUZ = "f8e4m3fnuz"
    F8E5M2FNUZ = "f8e5m2fnuz"
    F8E8M0 = "f8e8m0fnu"
    I64 = "i64"
    I32 = "i32"
    I16 = "i16"
    I8 = "i8"
    U64 = "u64"
    U32 = "u32"
    U16 = "u16"
    U8 = "u8"
    I4 = "i4"
    U4 = "u4"
    I2 = "i2"
    U2 = "u2"
    BOOL = "bool"
    C64 = "c64"

    @property
    def bits(self) -> int:
        return 8 if self is DType.BOOL else int("".join(c for c in self.value.split("e")[0] if c.isdigit()))

    @property
    def is_float(self) -> bool:
        return self.value.startswith(("f", "bf"))

    @property
    def is_wide_float(self) -> bool:
        """Floats that ops compute with: all but the 8-bit ones, which are codes and want a cast first."""
        return self.is_float and self.bits > 8

    @property
    def is_integer(self) -> bool:
        return self.value[0] in "iu"

    @property
    def torch(self) -> TorchDType:
        """The torch dtype. Those below 8 bits hold one element a byte there, and torch does nothing with them but view
        them as 8-bit integers (see moec.ir.arrays)."""
        return _TORCH[self]

    def holds(self, value: bool | int | float) -> bool:
        """Whether a number is one of this type: integers in range for an integer type, no NaN or fraction for bool and
        integers. Floats are rounded."""
        if not (self is DType.BOOL or self.is_integer):
            return isinstance(value, float) or abs(value) < 2**64
        bits = 1 if self is DType.BOOL else self.bits
        low = -(2 ** (bits - 1)) if self.value[0] == "i" else 0
        return low <= value < low + 2**bits and value == int(value)  # no comparison with NaN holds

    @staticmethod
    def of(x: DType | str | TorchDType) -> DType:
        """From a text name ("bf16"), a torch dtype, or itself. Raises CompileError on anything else."""
        if isinstance(x, TorchDType):
            if x in _FROM_TORCH:
                return _FROM_TORCH[x]
            raise CompileError(f"unsupported dtype {x}", code="dtype", hint=f"supported: {', '.join(DType)}")
        try:
            return DType(x)
        except ValueError:
            raise CompileError(f"unknown dtype {x!r}", code="dtype", hint=f"one of {', '.join(DType)}") from None


_TORCH = {
    DType.F64: torch.float64,
    DType.F32: torch.float32,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.F8E4M3: torch.float8_e4m3fn,
    DType.F8E5M2: torch.float8_e5m2,
    DType.F8E4M3FNUZ: torch.float8_e4m3fnuz,
    DType.F8E5M2FNUZ: torch.float8_e5m2fnuz,
    DType.F8E8M0: torch.float8_e8m0fnu,
    DType.I64: torch.int64,
    DType.I32: torch.int32,
    DType.I16: torch.int16,
    DType.I8: torch.int8,
    DType.U64: torch.uint64,
    DType.U32: torch.uint32,
    DType.U16: torch.uint16,
    DType.U8: torch.uint8,
    DType.I4: torch.int4,  # type: ignore[attr-defined]  # missing in torch's stubs
    DType.U4: torch.uint4,  # type: ignore[attr-defined]  # missing in torch's stubs
    DType.I2: torch.int2,  # type: ignore[attr-defined]  # missing in torch's stubs
    DType.U2: torch.uint2,  # type: ignore[attr-defined]  # missing in torch's stubs
    DType.BOOL: torch.bool,
    DType.C64: torch.complex64,
}
_FROM_TORCH = {v: k for k, v in _TORCH.items()}


_MOST_AXES = 64  # as in torch and NumPy


def _clipped(x: object) -> str:
    text = repr(x) if not isinstance(x, int) or abs(x) < 10**99 else "of more than 99 digits"
    return text if len(text) <= 200 else text[:197] + "..."


@dataclass(frozen=True)
class TensorType:
    """A dtype and a shape of ints and `Dim`s; prints as `bf16[T, 512]`."""

    dtype: DType
    shape: tuple[int | Dim, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", DType.of(self.dtype))
        object.__setattr__(self, "shape", tuple(self.shape))
        for s in self.shape:
            if isinstance(s, bool) or not isinstance(s, int | Dim) or (isinstance(s, int) and not 0 <= s < 2**63):
                raise CompileError(f"bad size {_clipped(s)} in shape {_clipped(self.shape)}", code="shape")
        if len(self.shape) > _MOST_AXES:
            raise CompileError(f"a shape of {len(self.shape)} axes, more than {_MOST_AXES}", code="shape")
        # also where another size is 0 or not known yet: strides are products of the sizes that are
        known = math.prod(max(s, 1) for s in self.shape if isinstance(s, int)) * self.dtype.bits
        if known >= 2**66:
            raise CompileError(f"{self} has {known // 8} bytes, more than 64 bits count", code="shape")

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> int | Dim:
        return product(self.shape)

    @property
    def nbytes(self) -> int | Dim:
        """Bytes of a dense tensor (4-bit types packed two a byte)."""
        bits = self.numel * self.dtype.bits
        return bits // 8

    @property
    def is_static(self) -> bool:
        return all(isinstance(s, int) for s in self.shape)

    @property
    def symbols(self) -> frozenset[str]:
        return frozenset().union(*(s.symbols for s in self.shape if isinstance(s, Dim)))

    def with_shape(self, shape: Sequence[int | Dim]) -> TensorType:
        return TensorType(self.dtype, tuple(shape))

    def with_dtype(self, dtype: DType | str) -> TensorType:
        return TensorType(DType.of(dtype), self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorType:
        return TensorType(DType.of(tensor.dtype), tuple(tensor.shape))


def broadcast(*shapes: Sequence[int | Dim]) -> tuple[int | Dim, ...]:
    """NumPy broadcasting over sizes; two different symbols do not broadcast. Raises CompileError."""
    rank = max((len(s) for s in shapes), default=0)
    result: list[int | Dim] = []
    for i in range(rank):
        out: int | Dim = 1
        for s in shapes:
            j = i - (rank - len(s))
            if j < 0 or s[j] == 1 or s[j] == out:
                continue
            if out != 1:
                shown = " and ".join(f"[{', '.join(map(str, s))}]" for s in shapes)
                raise CompileError(f"shapes {shown} do not broadcast (axis {i}: {out} against {s[j]})", code="type")
            out = s[j]
        result.append(out)
    return tuple(result)
