"""Backends as the hostile cases use them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moec.backends import Executable, get_backend
from moec.ir import Builder, Graph, TensorType, Value, Weight
from moec.passes.legalise import Legalise

# name → (backend, its options)
SETUPS: dict[str, tuple[str, dict[str, Any]]] = {
    "reference": ("reference", {}),
    "onnxruntime": ("onnxruntime", {}),
    "portable": ("onnxruntime", {"portable": True}),
    "triton": ("triton", {}),
}


def graph_of(types: dict[str, TensorType], build: Callable[..., Any]) -> Graph:
    """The verified graph of `build(b, *inputs)`."""
    g = Graph("hostile")
    values = [g.add_input(n, t) for n, t in types.items()]
    made = build(Builder(g), *values)
    for v in made if isinstance(made, tuple) else (made,):
        g.add_output(v)
    g.verify()
    return g


def weight(b: Builder, name: str, tensor: torch.Tensor) -> Value:
    return b.graph.add_weight(Weight.of(name, tensor))


def compiled(setup: str, graph: Graph, **options: Any) -> Executable:
    """A graph as a backend compiles it, legalised for it."""
    name, own = SETUPS[setup]
    backend = get_backend(name)
    return backend.compile(Legalise(backend).run(backend.prepare(graph)), threads=1, options=own | options)


@contextmanager
def no_worker_left() -> Iterator[None]:
    """The interpreter worker, if one was started, ends with the block: a case may leave no process."""
    try:
        yield
    finally:
        from moec.backends.triton import worker

        worker().close()


def same(got: torch.Tensor, want: torch.Tensor, rtol: float, what: str = "") -> None:
    """Floats to `rtol` of the largest number of their row (and eight subnormal steps), infinities and NaN where they
    are, integers exactly."""
    assert got.shape == want.shape, f"{what}: {list(got.shape)} for {list(want.shape)}"
    if not want.dtype.is_floating_point:
        assert torch.equal(got, want), f"{what}: {got.tolist()} is not {want.tolist()}"
        return
    a, b = got.double(), want.double()
    size = b.nan_to_num(0, 0, 0).abs().amax(-1, keepdim=True) if b.numel() else b
    ok = ((a - b).abs() <= rtol * size + 2.0**-146) | (a == b) | (a.isnan() & b.isnan())
    rows = (~ok).flatten(0, -2).any(-1).nonzero()[:3, 0].tolist() if ok.ndim > 1 else []
    shown = [(r, a.flatten(0, -2)[r][:6].tolist(), b.flatten(0, -2)[r][:6].tolist()) for r in rows]
    assert bool(ok.all()), f"{what}: (row, got, want) {shown or (a.tolist(), b.tolist())}"
