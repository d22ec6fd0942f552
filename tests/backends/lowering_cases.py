"""Graphs of one op, and what "equal" means between two backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moec.backends import Backend
from moec.ir import Builder, DType, Graph, OpDef, TensorType, Value, Weight

SIZES = [(0, 1, 5), (1, 2, 3), (5, 3, 7)]


def single(opdef: OpDef, operands: Sequence[Any], attrs: dict[str, Any], constant: bool = False) -> Graph:
    """A graph of one node; with `constant` every operand but the first is a weight."""
    g = Graph(opdef.name)
    values: list[Value | None] = []
    for i, t in enumerate(operands):
        if t is None:
            values.append(None)
        elif constant and i > 0:
            values.append(g.add_weight(Weight.of(f"w{i}", t)))
        else:
            values.append(g.add_input(f"x{i}", TensorType.of(t)))
    for r in g.create(opdef, values, attrs).results:
        g.add_output(r)
    g.verify()
    return g


def inputs_of(graph: Graph, operands: Sequence[Any]) -> list[torch.Tensor]:
    return [t for i, t in enumerate(operands) if t is not None and any(v.name == f"x{i}" for v in graph.inputs)]


def legal(graph: Graph, backend: Backend) -> str | None:
    """Decompose in place what the backend lacks; the reason where it cannot take the graph."""
    graph = backend.prepare(graph)
    for node in list(graph.nodes):
        reason = backend.missing(node)
        if reason is None:
            continue
        if node.op in backend.unsupported or node.opdef.decompose is None:
            return reason
        b = Builder(graph, before=node)
        new = node.opdef.instance(node.operands, node.attrs).decompose(b)
        for old, value in zip(node.results, new if isinstance(new, tuple) else (new,), strict=True):
            graph.replace_value(old, value)
        graph.erase(node)
        return legal(graph, backend)
    return None


def tolerance(graph: Graph) -> float:
    """Relative error that rounding may cause: by the narrowest float and the longest axis."""
    types = [v.type for n in graph.nodes for v in (*n.operands, *n.results) if v is not None]
    floats = [t.dtype for t in types if t.dtype.is_float and t.dtype.bits > 8]
    eps = max((torch.finfo(d.torch).eps for d in floats), default=0.0)
    longest = max((s for t in types for s in t.shape if isinstance(s, int)), default=1)
    return 8 * eps * max(longest, 1) ** 0.5


def coarse(graph: Graph, backend: Backend) -> float:
    """What a backend adds to it where it rounds operands of its own (of few numbers, one decides)."""
    found = [backend.coarse_sums(n) for n in graph.nodes]
    return sum(4 * unit * terms**0.5 for unit, terms in filter(None, found))


def assert_same(got: torch.Tensor, want: torch.Tensor, rtol: float) -> None:
    """Equal shape and dtype; floats to `rtol` of the larger of the value and the typical magnitude, other
    types and FP8 codes exactly; NaN and infinities in the same places."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    if not want.numel():
        return
    if not want.dtype.is_floating_point:
        assert torch.equal(got, want), f"{got} is not {want}"
        return
    exact = DType.of(want.dtype).bits == 8
    got, want = got.double(), want.double()
    finite = want.isfinite()
    torch.testing.assert_close(got[~finite], want[~finite], rtol=0, atol=0, equal_nan=True)
    got, want = got[finite], want[finite]  # a stray NaN or infinity of `got` fails below
    if exact:
        assert torch.equal(got, want), f"{got} is not {want}"
    elif want.numel():
        torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * float(want.square().mean().sqrt()))
