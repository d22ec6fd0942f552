"""RMSNorm, and the rule for which dtype the numerically delicate parts run in."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """x itself if it is float32 or float64, else x as float32: norms and routers run at this precision."""
    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x²) + eps) over the last axis (Zhang and Sennrich, arXiv:1910.07467).

    x: any float [..., dim], result: the same shape and dtype. The mean is taken in float32, or in float64 for float64.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = at_least_float32(x)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (y if y.dtype == x.dtype else y.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
