"""Models and comparisons that the front end's tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moec.frontend import Traced
from moec.ir import parse, run

torch.set_num_threads(1)

Compare = Callable[..., None]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tensors(x: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(x) if isinstance(t, torch.Tensor)]


def assert_same(traced: Traced, model: torch.nn.Module, args: Any = (), kwargs: Any = None, tol: float = 1e-5) -> None:
    """The reference interpreter on the traced graph gives what the model gives, scaled by its magnitude."""
    kwargs = kwargs or {}
    with torch.no_grad():
        want = tensors(model(*args, **kwargs))
    got = tensors(traced.unflatten(run(traced.graph, traced.flatten(args, kwargs))))
    assert len(want) == len(got)
    for w, g in zip(want, got, strict=True):
        assert (w.shape, w.dtype) == (g.shape, g.dtype)
        scale = max(1.0, float(w.double().abs().max())) if w.numel() else 1.0
        torch.testing.assert_close(g.double(), w.double(), rtol=tol, atol=tol * scale, equal_nan=True)


def assert_well_formed(traced: Traced) -> None:
    """The text form reads back, and nodes know where they come from."""
    graph = traced.graph
    graph.verify()
    assert parse(str(graph)) == graph
    nodes = list(graph.nodes)
    located = [n for n in nodes if n.location.frames and n.location.frames[0].file]
    assert len(located) >= 0.95 * len(nodes)
    assert not any(f.file.startswith("/") for n in nodes for f in n.location.frames)


@pytest.fixture
def same() -> Compare:
    return assert_same


@pytest.fixture
def well_formed() -> Compare:
    return assert_well_formed
