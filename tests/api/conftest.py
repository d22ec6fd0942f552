"""Small graphs and models for the tests of the public interface."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moec

torch.set_num_threads(1)

MLP = """
graph(%x: f32[T, 16], %keep: i64[T]) -> (%y: f32[T, 8], %kept: i64[T]) {
  weight @norm: f32[16]
  weight @up: f32[32, 16]
  weight @down: f32[8, 32]
  %0: f32[T, 16] = norm.rms(%x, @norm) {eps=1e-06} loc("norm" "model.py":3) origin("a")
  %1: f32[T, 32] = linear.linear(%0, @up) loc("up" "model.py":4) origin("b")
  %2: f32[T, 32] = math.silu(%1) loc("act" "model.py":5) origin("c")
  %3: f32[T, 8] = linear.linear(%2, @down) loc("down" "model.py":6) origin("d")
  return %3, %keep
}
"""


def bind(graph: moec.Graph, seed: int = 0) -> moec.Graph:
    """Random weights of about unit gain."""
    generator = torch.Generator().manual_seed(seed)
    for name, v in graph.weights.items():
        graph.bind_weights({name: torch.randn(v.shape, generator=generator) / v.shape[-1] ** 0.5})
    return graph


@pytest.fixture
def mlp() -> moec.Graph:
    return bind(moec.parse(MLP))


@pytest.fixture
def mlp_args() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(1)), torch.arange(5)


class Nested(nn.Module):
    """Takes and returns nested structures."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, pair, *, scale, extra=None):
        a, rest = pair
        y = self.linear(x) * scale + a + rest["b"]
        return {"y": y, "parts": (y + 1, [y * 2, None]), "a": a * 1}


@pytest.fixture
def nested() -> Nested:
    torch.manual_seed(0)
    return Nested().eval()
