"""Grouped matrix product in every dtype, eager and traced."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [R, a] sorted by group × weight [E, a, b] → [R, b]; group e owns the rows before ends[e] (i32[E]).

    `torch.nn.functional.grouped_mm`, but for two of its gaps in torch 2.13. It refuses float64: a loop serves that.
    Its shape inference refuses all but bfloat16, although the kernel takes float32: while tracing, other dtypes become
    the op `moec::grouped_mm`, which means the same and has shape inference, but no gradient.
    """
    if rows.dtype != torch.bfloat16 and (torch.compiler.is_compiling() or rows.is_meta):
        return torch.ops.moec.grouped_mm(rows, weight, ends)
    return _compute(rows, weight, ends)


def _compute(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if rows.dtype != torch.float64:
        return F.grouped_mm(rows, weight, offs=ends)
    starts = [0, *ends.tolist()]
    return torch.cat([rows[starts[e] : starts[e + 1]] @ weight[e] for e in range(weight.shape[0])])


@torch.library.custom_op("moec::grouped_mm", mutates_args=())
def _traced(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return _compute(rows, weight, ends)


@_traced.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    torch._check(rows.ndim == 2 and weight.ndim == 3, lambda: "grouped_mm takes rows [R, a] and weight [E, a, b]")
    torch._check(rows.shape[1] == weight.shape[1], lambda: f"rows {rows.shape} do not fit weight {weight.shape}")
    return rows.new_empty(rows.shape[0], weight.shape[2])
