"""What the tests of this backend share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from moec.backends import Executable, get_backend
from moec.ir import Builder, Dim, DType, Graph, TensorType, Value, Weight, run
from moec.ir.dims import parse_size


def dims(shape: Sequence[int | str]) -> tuple[int | Dim, ...]:
    return tuple(parse_size(s) if isinstance(s, str) else s for s in shape)


def typed(dtype: str, *shape: int | str) -> TensorType:
    """A type with sizes as text: typed("f32", "B", "2*S")."""
    return TensorType(DType.of(dtype), dims(shape))


def graph_of(types: dict[str, TensorType], build: Callable[..., Any]) -> Graph:
    """The graph of `build(b, *inputs)`, verified."""
    g = Graph("test")
    values = [g.add_input(n, t) for n, t in types.items()]
    result = build(Builder(g), *values)
    for v in result if isinstance(result, tuple) else (result,):
        g.add_output(v)
    g.verify()
    return g


def compiled(graph: Graph, **options: Any) -> Executable:
    return get_backend("onnxruntime").compile(graph, threads=1, options=options)


def agrees(executable: Executable, inputs: Sequence[torch.Tensor], rtol: float = 1e-5) -> list[torch.Tensor]:
    """Outputs, after comparing them with the reference: floats to `rtol` of the typical magnitude."""
    want = run(executable.graph, inputs)
    got = executable.run(inputs)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        assert g.shape == w.shape
        exact = not w.dtype.is_floating_point or w.dtype == torch.float8_e4m3fn
        scale = 0.0 if exact or not w.numel() else float(w.double().nan_to_num(0, 0, 0).square().mean().sqrt())
        torch.testing.assert_close(
            g.double(), w.double(), rtol=0 if exact else rtol, atol=rtol * scale, equal_nan=True, check_dtype=False
        )
    return got


def weight(b: Builder, name: str, tensor: torch.Tensor) -> Value:
    return b.graph.add_weight(Weight.of(name, tensor))


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
