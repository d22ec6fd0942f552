"""Large numbers: whether a graph stays finite where another does. An exponential that has lost what kept its argument
small (the maximum that a softmax subtracts) agrees on ordinary numbers and gives inf or NaN on large ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moec.ir.graph import Graph
from moec.ir.types import DType
from moec.ir.weight import TensorSource, Weight

# ops that leave float64 for arguments that f32 holds with ease; what others do to large numbers is a matter of range
_GROWING = {"math.exp", "math.pow"}
_FACTOR = 1e4


def may_overflow(graph: Graph) -> bool:
    """Whether the graph has ops whose results leave float64 for ordinary large numbers."""
    graphs = (graph, *graph.functions.values())
    return any(n.op in _GROWING or n.opdef.family == "extern" for g in graphs for n in g.nodes)


def first_infinite(
    expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor]
) -> tuple[int, tuple[int, ...], float, float] | None:
    """(output, index, expected, got) of the first element that is finite in `expected` only, or None. Outputs of
    another shape are left to whoever compares values."""
    for i, (a, b) in enumerate(zip(expected, got, strict=True)):
        if not a.is_floating_point() or a.shape != b.shape:
            continue
        a, b = a.to(torch.float64), b.to(torch.float64)
        lost = (a.isfinite() & ~b.isfinite()).nonzero()
        if len(lost):
            index = tuple(int(k) for k in lost[0])
            return i, index, float(a[index]), float(b[index])
    return None


def with_large_weights(graph: Graph) -> Graph:
    """A copy with every float matrix ten thousand times as large (16-bit ones up to their largest number), so that what
    stands behind a normalisation is large too: attention scores, logits of routers."""
    graph = graph.clone()
    for g in (graph, *graph.functions.values()):
        for name, v in g.weights.items():
            if v.weight is not None and v.weight.source is not None and _is_matrix(v.weight):
                most = torch.finfo(v.dtype.torch).max
                data = (v.weight.load().to(torch.float64) * _FACTOR).clamp(-most, most)
                v.weight = Weight(name, v.type, TensorSource(data.to(v.dtype.torch)))
    return graph


def _is_matrix(weight: Weight) -> bool:
    return weight.type.rank > 1 and weight.type.dtype in (DType.F16, DType.BF16, DType.F32, DType.F64)
