"""What routed experts are made of: grouped products, counting, indicators."""

from __future__ import annotations

import torch

from moec.frontend.aten.extern import lower_extern
from moec.frontend.aten.linear import matmul
from moec.frontend.aten.registry import lowers
from moec.frontend.context import Context, Number
from moec.ir import DType, Value


@lowers("_grouped_mm")
def grouped_mm(
    c: Context, self: Value, mat2: Value, offs: Value | None, bias: Value | None, out_dtype: torch.dtype | None
) -> Value:
    if bias is not None or (out_dtype is not None and DType.of(out_dtype) is not self.dtype):
        raise c.refuse("a bias or another result dtype is not supported")
    if self.type.rank == 3 and mat2.type.rank == 3 and offs is None:
        return matmul(c, self, mat2)
    if self.type.rank != 2 or mat2.type.rank != 3 or offs is None:
        raise c.refuse(f"operands {self.type} and {mat2.type}; supported are rows [R, K] with weights [E, K, N]")
    return c.b.grouped_matmul(self, mat2, c.cast(offs, DType.I32))


@lowers("transformers::grouped_mm_fallback")
def grouped_mm_fallback(c: Context, input: Value, weight: Value, offs: Value) -> Value:
    return c.b.grouped_matmul(input, weight, c.cast(offs, DType.I32))


@lowers("moec::grouped_mm", "moec_frontend::grouped_mm")
def moec_grouped_mm(c: Context, rows: Value, weight: Value, ends: Value) -> Value:
    return c.b.grouped_matmul(rows, weight, c.cast(ends, DType.I32))


@lowers("histc")
def histc(c: Context, self: Value, bins: int, min: Number, max: Number) -> Value:
    """Counts of expert ids: unit bins over integers (torch takes only floats on a CPU, hence the cast)."""
    source = self
    if self.producer is not None and self.producer.op == "math.cast":
        source = self.producer.operands[0] or self
    if not source.dtype.is_integer or (min, max) != (0, bins - 1):
        arguments = {"self": self, "bins": bins, "min": min, "max": max}
        return lower_extern(c, c.op, arguments, lambda _: None)[0]
    return c.cast(c.b.histc(source, bins=bins), self.dtype)


@lowers("one_hot")
def one_hot(c: Context, self: Value, num_classes: int) -> Value:
    if num_classes < 0:
        raise c.refuse(
            "without num_classes the shape depends on the values", code="data-dependent", hint="pass num_classes=N"
        )
    return c.b.one_hot(self, depth=num_classes)
