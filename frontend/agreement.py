"""Whether a program gives what its model gives on some inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from moec.frontend.signature import Signature
from moec.frontend.ties import LowestFirst
from moec.ir import CompileError, Graph, run
from moec.ir.dims import evaluate

# a wrong branch or a frozen size shows everywhere; a flipped near-tie of the routing in few rows
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
_MAY_DIFFER = {torch.float64: 0.0, torch.float32: 0.02, torch.float16: 0.25, torch.bfloat16: 0.25}


def resized(t: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The example's values repeated or cut along every axis, so that ids and masks stay plausible."""
    for axis, n in enumerate(shape):
        if t.shape[axis] == n:
            continue
        if t.shape[axis] == 0:
            t = torch.zeros(*t.shape[:axis], n, *t.shape[axis + 1 :], dtype=t.dtype, device=t.device)
        else:
            t = t.index_select(axis, torch.arange(n, device=t.device) % t.shape[axis])
    return t


def inputs_at(graph: Graph, example: Sequence[torch.Tensor], sizes: Mapping[str, int]) -> list[torch.Tensor]:
    """The example resized to the graph's input shapes at sizes by symbol."""
    shapes = [[evaluate(d, sizes) for d in v.shape] for v in graph.inputs]
    return [resized(t, shape) for t, shape in zip(example, shapes, strict=True)]


def eager(model: torch.nn.Module, signature: Signature, inputs: Sequence[torch.Tensor]) -> list[Any]:
    rest = iter([t.clone() for t in inputs])
    leaves = [
        signature.constants[i] if i in signature.constants else next(rest) for i in range(signature.in_spec.num_leaves)
    ]
    args, kwargs = pytree.tree_unflatten(leaves, signature.in_spec)
    with LowestFirst():
        return pytree.tree_leaves(model(*args, **kwargs))


def disagreement(graph: Graph, signature: Signature, inputs: Sequence[torch.Tensor], want: Sequence[Any]) -> str | None:
    try:
        got = run(graph, [t.cpu() for t in inputs])
    except CompileError as e:
        return f"it fails: {e.message}"
    tensors = [
        (torch.view_as_real(w) if kind == "complex" else w, got[i])
        for (kind, i), w in zip(signature.outputs, want, strict=False)
        if kind != "constant" and isinstance(w, torch.Tensor)
    ]
    if len(want) != len(signature.outputs):
        return f"the model returns {len(want)} values, the program {len(signature.outputs)}"
    for (w, g), name in zip(tensors, graph.output_names, strict=False):
        if w.shape != g.shape:
            return f"output {name!r} has shape {list(g.shape)}, the model's {list(w.shape)}"
        if _differs(w.cpu(), g):
            return f"output {name!r} differs from the model's by up to {_distance(w.cpu(), g):.3g}"
    return None


def _differs(want: torch.Tensor, got: torch.Tensor) -> bool:
    if not want.numel():
        return False
    if want.dtype not in _TOLERANCE:
        return float((want != got).float().mean()) > 0.02
    tolerance = _TOLERANCE[want.dtype]
    finite = want[want.isfinite()].double().abs()
    scale = float(finite.square().mean().sqrt()) if finite.numel() else 1.0
    absolute = tolerance * max(scale, 1e-6)
    close = torch.isclose(got.double(), want.double(), rtol=tolerance, atol=absolute, equal_nan=True)
    return float((~close).double().mean()) > _MAY_DIFFER[want.dtype]


def _distance(want: torch.Tensor, got: torch.Tensor) -> float:
    return float((want.double() - got.double()).abs().nan_to_num().max())
