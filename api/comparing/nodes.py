"""Nodes of a graph on a backend by themselves, fed with the reference's operands.

Many go into one program, each with inputs of its own, so that a backend can fuse nothing across them and is loaded
once for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch

from moec.backends import Backend
from moec.backends.base import by_size
from moec.comparing.routing import meet
from moec.comparing.store import Values
from moec.difference import Difference, difference
from moec.ir import CompileError, Dim, Graph, Node, TensorType, Value
from moec.ir.dims import evaluate
from moec.ir.graph import copy_node
from moec.program import Settings, legalise, lower
from moec.tolerance import Tolerance, given_bound, one_node, scale_of

Step = Callable[[str], None]
TOGETHER = 48  # nodes in one program at most
BUDGET = 128 << 20  # bytes of operands, weights and results in it


@dataclass(frozen=True)
class NodeResult:
    """One node (its worst result, or why it did not run) or one value inside, on one backend."""

    backend: str
    op: str
    location: str
    node: Node
    difference: Difference
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and self.difference.ok

    def to_dict(self) -> dict[str, Any]:
        shown = {"backend": self.backend, "op": self.op, "location": self.location, "problem": self.problem}
        return {**shown, "ok": self.ok, "difference": asdict(self.difference)}


def compare_nodes(
    values: Values,
    nodes: Sequence[Node],
    settings: Settings,
    binding: Mapping[str, int],
    tolerance: Tolerance = None,
    step: Step = lambda name: None,
    moves: bool = False,
) -> list[NodeResult]:
    """Each of `nodes` on the backend of `settings` against the reference, whose values are given; in their order.
    Constants are part of the nodes that use them, not nodes of their own. The backend's tuning is left out: these are
    the nodes that are asked about. moves: see `isolate`."""
    settings = replace(settings, tuning=0)
    results: list[NodeResult] = []
    judged = [n for n in nodes if n.op != "tensor.constant"]
    for part in _parts(judged, values):
        step(f"{settings.backend.name}, node {len(results)} of {len(judged)}")
        results += _compare(part, values, settings, binding, tolerance, moves)
    return results


def _parts(nodes: Sequence[Node], values: Values) -> Iterator[list[Node]]:
    def size(node: Node) -> int:
        return sum(_bytes(values.type(v)) for v in (*node.operands, *node.results) if v is not None)

    return by_size(nodes, size, BUDGET, TOGETHER)


def _bytes(type: TensorType) -> int:
    return math.prod(s for s in type.shape if isinstance(s, int)) * type.dtype.bits // 8


def _compare(
    nodes: list[Node],
    values: Values,
    settings: Settings,
    binding: Mapping[str, int],
    tolerance: Tolerance,
    moves: bool,
) -> list[NodeResult]:
    try:
        part, fed = isolate(nodes, values, binding, settings.backend, moves)
        legal, _, left = legalise(part, settings)
        got = lower(legal, settings, left).run(fed)
    except CompileError as e:
        if len(nodes) > 1:  # which of them it is
            middle = len(nodes) // 2
            halves = nodes[:middle], nodes[middle:]
            return [r for half in halves for r in _compare(half, values, settings, binding, tolerance, moves)]
        node = nodes[0]
        nothing = Difference(math.inf, math.inf, 0.0, False)
        return [NodeResult(settings.backend.name, node.op, node.location.describe(), node, nothing, str(e.message))]
    found, start = [], 0
    for node in nodes:
        mine = got[start : start + len(node.results)]
        start += len(node.results)
        worst = _worst(settings.backend, node, values, mine, binding, tolerance)
        found.append(NodeResult(settings.backend.name, node.op, node.location.describe(), node, worst))
    return found


def _worst(
    backend: Backend,
    node: Node,
    values: Values,
    got: list[torch.Tensor],
    binding: Mapping[str, int],
    tolerance: Tolerance,
) -> Difference:
    operands = {v: values.get(v) for v in node.operands if v is not None}
    expected = [values.get(r) for r in node.results]
    if node.op == "moe.route":
        expected = _routed(backend.name, node, operands, got)
    found = []
    for value, want, tensor in zip(node.results, expected, got, strict=True):
        bound = given_bound(one_node(node, value, binding, backend.coarse_sums(node)), tolerance, node)
        found.append(difference(want, tensor, bound, scale_of(want, node, operands)))
    return max(found, key=lambda d: (not d.ok, d.badness))


def _routed(
    name: str, node: Node, operands: Mapping[Value, torch.Tensor], got: list[torch.Tensor]
) -> list[torch.Tensor]:
    """What a router should give: computed anew, as the reference's values may be pinned to another's; near ties as the
    backend chose, where scores are computed (the logits themselves are not rounded, and their ties are decided)."""
    logits, bias = (None if v is None else operands[v] for v in (node.operand("logits"), node.operand("bias")))
    assert logits is not None
    exact = node.attrs["scoring"].startswith("topk_") and bias is None and node.attrs["n_group"] == 1
    met = None if exact else meet(name, node, logits, bias, got[1], logits)
    if met is not None:
        return [met[0], met[1]]
    return list(node.opdef.instance([logits, bias], node.attrs).reference())


class Known(Protocol):
    """The values of one run of a graph, with their actual types: every size is a number."""

    @property
    def graph(self) -> Graph: ...

    def get(self, value: Value, /) -> torch.Tensor: ...

    def type(self, value: Value, /) -> TensorType: ...


def isolate(
    nodes: Sequence[Node],
    values: Known,
    binding: Mapping[str, int],
    backend: Backend | None = None,
    moves: bool = False,
) -> tuple[Graph, list[torch.Tensor]]:
    """A graph of some nodes, not connected to each other, with every size a number; and their operands. Weights stay
    weights, also those that are dequantised first where `backend` takes what is stored; constants stay constants. Its
    outputs are the nodes' results in order. moves: a transpose that an operand comes from stays too, which a lowering
    may take as one with the node."""
    part = Graph("nodes")
    part.functions = values.graph.functions
    fed: list[torch.Tensor] = []

    def copied(node: Node, mapping: dict[Value, Value]) -> Node:
        attrs = {k: a if k in node.opdef.binds else _concrete(a, binding) for k, a in node.attrs.items()}
        operands = [None if v is None else mapping[v] for v in node.operands]
        copy = part.create(node.opdef, operands, attrs, location=node.location)
        for old, new in zip(node.results, copy.results, strict=True):
            new.origins = old.origins
            mapping[old] = new
        return copy

    def feed(v: Value, mapping: dict[Value, Value], moved: bool, as_stored: bool) -> None:
        made = v.producer
        if v in mapping:
            return
        if v.weight is not None:
            mapping[v] = part.add_weight(v.weight)
        elif made is not None and made.op == "tensor.constant":
            copy_node(made, part, mapping)
        elif as_stored and made is not None and _is_stored(made):
            for stored in made.operands:
                assert stored is not None
                assert stored.weight is not None
                mapping[stored] = part.add_weight(stored.weight)
            copy_node(made, part, mapping)
        elif moved and made is not None and made.op == "tensor.transpose" and made.operands[0] is not None:
            feed(made.operands[0], mapping, False, as_stored)
            copied(made, mapping)
        else:
            mapping[v] = part.add_input(f"x{len(fed)}", values.type(v))
            fed.append(values.get(v))

    for node in nodes:
        mapping: dict[Value, Value] = {}
        as_stored = backend is not None and backend.coarse_sums(node) is not None
        for v in node.operands:
            if v is not None:
                feed(v, mapping, moves, as_stored)
        for r in copied(node, mapping).results:
            part.add_output(r)
    return part, fed


def _is_stored(node: Node) -> bool:
    """Whether a node only widens a stored weight."""
    return node.op == "quant.dequantize" and all(v is not None and v.weight is not None for v in node.operands)


def _concrete(x: Any, binding: Mapping[str, int]) -> Any:
    match x:
        case Dim():
            return x.evaluate(binding)
        case TensorType():
            return x.with_shape([evaluate(s, binding) for s in x.shape])
        case tuple():
            return tuple(_concrete(y, binding) for y in x)
    return x
