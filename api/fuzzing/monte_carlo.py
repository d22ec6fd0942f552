"""Monte Carlo arithmetic: PyTorch code whose every operation rounds at random (Parker 1997)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten
_OF_ONE = {_aten.sigmoid, _aten.tanh, _aten.erf}  # backends have them right to a unit of 1, not of the result,
# these to one of their first operand
_OF_OPERAND = {_aten.silu, _aten.gelu, _aten.sin, _aten.cos, _aten.remainder, _aten.fmod}
_VANISHES = 0.25  # how often 0 comes of what is less than its error


class Rounding(TorchDispatchMode):
    """Inside, each f32 or f64 tensor that an operation makes is moved by up to `u` of its elements, at random."""

    def __init__(self, u: float, generator: torch.Generator):
        super().__init__()
        self.u, self.generator = u, generator

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or func._schema.is_mutable:
            return result
        kind = func.overloadpacket
        floor = 1.0 if kind in _OF_ONE else args[0].abs() if kind in _OF_OPERAND else 0.0
        return tree_map_only(torch.Tensor, lambda t: self._rounded(t, floor), result)

    def _rounded(self, t: torch.Tensor, floor: float | torch.Tensor) -> torch.Tensor:
        if t.dtype not in (torch.float32, torch.float64) or not t.numel():
            return t
        x = t.double()
        amount = self.u * torch.maximum(x.abs(), torch.as_tensor(floor, dtype=torch.float64))
        noise = 2 * torch.rand(t.shape, generator=self.generator, dtype=torch.float64) - 1
        vanishes = (x.abs() < amount) & (torch.rand(t.shape, generator=self.generator) < _VANISHES)
        moved = torch.where(vanishes, 0.0, x + noise * amount)
        return torch.where(amount.isfinite(), moved, x).to(t.dtype)
