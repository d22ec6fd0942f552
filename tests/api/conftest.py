"""Small graphs and models for the tests of the public interface."""

from __future__ import annotations

import pytest
import torch

import moec

from .samples import MLP, TinyLM, bind

torch.set_num_threads(1)


@pytest.fixture
def mlp() -> moec.Graph:
    return bind(moec.parse(MLP))


@pytest.fixture
def mlp_args() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(1)), torch.arange(5)


@pytest.fixture(scope="session")
def tiny_lm() -> TinyLM:
    torch.manual_seed(0)
    model = TinyLM().eval()
    with torch.no_grad():
        model.head.weight *= 4  # so that greedy choices differ clearly
    return model


@pytest.fixture(scope="session")
def compiled_lm(tiny_lm) -> moec.CompiledModel:
    """Compiled with an example (static) and not yet asked to generate."""
    return moec.compile(tiny_lm, (torch.arange(8).reshape(2, 4),), backend="onnxruntime", threads=1)
