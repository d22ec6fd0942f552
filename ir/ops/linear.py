"""`linear`: matrix products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from moec.ir.errors import require
from moec.ir.opdef import Operand, OptionalOperand, op
from moec.ir.ops.overflow import overflows
from moec.ir.types import DType, TensorType, broadcast


@op("linear.matmul")
class MatMul:
    """a [..., M, K] @ b [..., K, N] → [..., M, N], leading axes broadcast."""

    a: Operand
    b: Operand

    def infer(self) -> TensorType:
        a, b = self.a, self.b
        require(a.dtype == b.dtype and a.dtype.is_wide_float, f"needs equal float dtypes, got {a.dtype} and {b.dtype}")
        require(a.rank >= 2 and b.rank >= 2, f"needs rank ≥ 2, got {a} and {b}")
        require(a.shape[-1] == b.shape[-2], f"inner sizes differ: {a.shape[-1]} and {b.shape[-2]}")
        return a.with_shape((*broadcast(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]))

    def reference(self) -> torch.Tensor:
        return torch.matmul(self.a, self.b)

    def undefined(self) -> bool:
        return overflows(self.a, self.b)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.floats(r.n, r.k), r.floats(r.k, r.m)], {}
        yield [r.floats(2, 1, r.n, r.k), r.floats(3, r.k, r.m)], {}


@op("linear.linear")
class Linear:
    """x [..., K] @ weight [N, K]ᵀ (+ bias [N]) → [..., N]."""

    x: Operand
    weight: Operand
    bias: OptionalOperand

    def infer(self) -> TensorType:
        x, w, b = self.x, self.weight, self.bias
        require(x.dtype == w.dtype and x.dtype.is_wide_float, f"needs equal float dtypes, got {x.dtype} and {w.dtype}")
        require(w.rank == 2 and x.rank >= 1, f"weight {w} must have rank 2, x {x} at least 1")
        require(x.shape[-1] == w.shape[1], f"x has {x.shape[-1]} channels, weight takes {w.shape[1]}")
        require(b is None or b == TensorType(x.dtype, (w.shape[0],)), f"bias {b} does not fit weight {w}")
        return x.with_shape((*x.shape[:-1], w.shape[0]))

    def reference(self) -> torch.Tensor:
        return F.linear(self.x, self.weight, self.bias)

    def decompose(self, b: Any) -> Any:
        y = b.matmul(self.x, b.transpose(self.weight, perm=(1, 0)))
        return y if self.bias is None else b.add(y, self.bias)

    def undefined(self) -> bool:
        return overflows(self.x, self.weight, self.bias)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.floats(r.n, r.k), r.floats(r.m, r.k)], {}
        yield [r.floats(2, r.n, r.k), r.floats(r.m, r.k), r.floats(r.m)], {}


@op("linear.grouped_matmul")
class GroupedMatMul:
    """Rows x[offsets[e−1] : offsets[e]] times w[e], for every group e: x [R, K], w [E, K, N], offsets i32[E]
    (inclusive ends, not decreasing) → [R, N]. Rows beyond the last offset are zero."""

    x: Operand
    w: Operand
    offsets: Operand

    def infer(self) -> TensorType:
        x, w, o = self.x, self.w, self.offsets
        require(x.dtype == w.dtype and x.dtype.is_wide_float, f"needs equal float dtypes, got {x.dtype} and {w.dtype}")
        require(x.rank == 2 and w.rank == 3, f"x {x} must have rank 2, w {w} rank 3")
        require(x.shape[1] == w.shape[1], f"inner sizes differ: {x.shape[1]} and {w.shape[1]}")
        require(o == TensorType(DType.I32, (w.shape[0],)), f"offsets {o}, expected i32[{w.shape[0]}]")
        return x.with_shape((x.shape[0], w.shape[2]))

    def reference(self) -> torch.Tensor:
        out = self.x.new_zeros(self.x.shape[0], self.w.shape[2])
        ends = self.offsets
        if ends.numel() and not bool((ends >= 0).all() & (ends.diff() >= 0).all() & (ends[-1] <= len(out))):
            raise ValueError(f"offsets {ends.tolist()} do not ascend to at most {len(out)}, the number of rows")
        start = 0
        for e, end in enumerate(self.offsets.tolist()):
            if end > start:
                out[start:end] = self.x[start:end] @ self.w[e]
            start = end
        return out

    def undefined(self) -> bool:
        return overflows(self.x, self.w)

    @staticmethod
    def samples(r: Any) -> Any:
        ends = r.ints(0, r.n + 1, 4).sort().values
        ends[-1] = r.n
        yield [r.floats(r.n, r.k), r.floats(4, r.k, r.m), ends.to(torch.int32)], {}
