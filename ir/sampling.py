"""Test cases for ops: what `OpDef.samples` draws from.

An op's `samples(r)` yields `(operands, attrs)` pairs; `r.n`, `r.m`, `r.k` are sizes that the caller
varies (0, 1 and odd included), so that every op meets every size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from moec.ir.opdef import OpDef
from moec.ir.types import DType

Case = tuple[list[Any], dict[str, Any]]


class Sampler:
    """Seeded random tensors. `n` may be 0; `m` and `k` are at least 1."""

    def __init__(self, n: int = 5, m: int = 3, k: int = 7, seed: int = 0):
        self.n, self.m, self.k = n, m, k
        self.generator = torch.Generator().manual_seed(seed)

    def floats(self, *shape: int, dtype: str = "f32", positive: bool = False) -> torch.Tensor:
        x = torch.randn(shape, generator=self.generator)
        return (x.abs() + 0.1 if positive else x).to(DType.of(dtype).torch)

    def ints(self, low: int, high: int, *shape: int, dtype: str = "i64") -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(DType.of(dtype).torch)

    def bools(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator) < 0.5


def cases(opdef: OpDef, sampler: Sampler) -> Iterator[Case]:
    """All cases of an op at the sampler's sizes."""
    if opdef.samples is not None:
        yield from opdef.samples(sampler)
