"""`norm`: normalisation over the last axis."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from moec.ir.errors import require
from moec.ir.opdef import Attr, Operand, OptionalOperand, op
from moec.ir.ops.overflow import overflows
from moec.ir.types import DType, TensorType


def _compute(x: torch.Tensor) -> torch.dtype:
    """Half-width floats are normalised in f32; f64 stays."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rms(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    wide = x.to(_compute(x))
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return y if weight is None else weight * y


def _check(x: TensorType, weight: TensorType | None, what: str = "weight", eps: float = 0.0) -> None:
    require(eps >= 0, f"eps is {eps}, not a number from 0")
    require(x.dtype.is_wide_float and x.rank >= 1, f"takes floats of rank ≥ 1, got {x}")
    want = TensorType(x.dtype, (x.shape[-1],))
    require(weight is None or weight == want, f"{what} {weight}, expected {want}")


def _rms_decomposed(b: Any, x: Any, weight: Any, eps: float) -> Any:
    wide = x if x.dtype in (DType.F32, DType.F64) else b.cast(x, dtype=DType.F32)
    mean = b.mean(b.mul(wide, wide), axes=(-1,), keepdim=True)
    y = b.mul(wide, b.rsqrt(b.add(mean, eps)))
    y = y if y.dtype == x.dtype else b.cast(y, dtype=x.dtype)
    return y if weight is None else b.mul(y, weight)


@op("norm.rms")
class RMSNorm:
    """x / √(mean(x²) + eps) · weight over the last axis (Zhang & Sennrich 2019). Computed in f32 at least;
    rounded to the dtype of x before the weight is applied, as the Llama family does."""

    x: Operand
    weight: OptionalOperand
    eps: Attr[float] = 1e-6

    def infer(self) -> TensorType:
        _check(self.x, self.weight, eps=self.eps)
        return self.x

    def reference(self) -> torch.Tensor:
        return _rms(self.x, self.weight, self.eps)

    def decompose(self, b: Any) -> Any:
        return _rms_decomposed(b, self.x, self.weight, self.eps)

    def undefined(self) -> bool:
        return overflows(self.x, self.weight)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.floats(r.n, r.k), r.floats(r.k)], {}
        yield [r.floats(2, r.n, r.k, dtype="bf16"), r.floats(r.k, dtype="bf16")], {"eps": 1e-5}
        yield [r.floats(r.n, r.k)], {}


@op("norm.add_rms", results=2)
class AddRMSNorm:
    """Residual add, then RMSNorm: (rms(x + residual), x + residual)."""

    x: Operand
    residual: Operand
    weight: OptionalOperand
    eps: Attr[float] = 1e-6

    def infer(self) -> tuple[TensorType, ...]:
        _check(self.x, self.weight, eps=self.eps)
        require(self.x == self.residual, f"x {self.x} and residual {self.residual} differ")
        return self.x, self.x

    def reference(self) -> tuple[torch.Tensor, ...]:
        total = self.x + self.residual
        return _rms(total, self.weight, self.eps), total

    def decompose(self, b: Any) -> Any:
        total = b.add(self.x, self.residual)
        return _rms_decomposed(b, total, self.weight, self.eps), total

    def undefined(self) -> bool:
        return overflows(self.x, self.residual, self.weight)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.floats(r.n, r.k), r.floats(r.n, r.k), r.floats(r.k)], {}
        yield [r.floats(2, r.n, r.k), r.floats(2, r.n, r.k), r.floats(r.k)], {"eps": 1e-5}


@op("norm.layer")
class LayerNorm:
    """(x − mean) / √(var + eps) · weight + bias over the last axis."""

    x: Operand
    weight: OptionalOperand
    bias: OptionalOperand
    eps: Attr[float] = 1e-5

    def infer(self) -> TensorType:
        _check(self.x, self.weight, eps=self.eps)
        _check(self.x, self.bias, "bias")
        return self.x

    def reference(self) -> torch.Tensor:
        return F.layer_norm(self.x, self.x.shape[-1:], self.weight, self.bias, self.eps)

    def decompose(self, b: Any) -> Any:
        x = self.x if self.x.dtype in (DType.F32, DType.F64) else b.cast(self.x, dtype=DType.F32)
        centred = b.sub(x, b.mean(x, axes=(-1,), keepdim=True))
        var = b.mean(b.mul(centred, centred), axes=(-1,), keepdim=True)
        y = b.mul(centred, b.rsqrt(b.add(var, self.eps)))
        for w, apply in ((self.weight, b.mul), (self.bias, b.add)):
            if w is not None:
                y = apply(y, w if w.dtype == y.dtype else b.cast(w, dtype=y.dtype))
        return y if y.dtype == self.x.dtype else b.cast(y, dtype=self.x.dtype)

    def undefined(self) -> bool:
        return overflows(self.x, self.weight, self.bias)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.floats(r.n, r.k), r.floats(r.k), r.floats(r.k)], {}
        yield [r.floats(r.n, r.k)], {"eps": 1e-6}
