"""Every node of a graph on a backend by itself, fed with the reference's operands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moec.difference import Difference, difference
from moec.ir import CompileError, Dim, Graph, Node, TensorType, Value, run
from moec.ir.dims import evaluate
from moec.ir.interpreter import bind_inputs
from moec.ir.runtime_sizes import measured
from moec.program import Settings, legalise, lower
from moec.tolerance import one_node, scale_of

Step = Callable[[str], None]


@dataclass(frozen=True)
class NodeResult:
    """One node on one backend: its worst result, or why it did not run."""

    backend: str
    op: str
    location: str
    node: Node
    difference: Difference
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and self.difference.ok


def reference_values(graph: Graph, inputs: list[torch.Tensor]) -> dict[Value, torch.Tensor]:
    """Every value of a graph in the reference."""
    seen: dict[Value, torch.Tensor] = {}

    def keep(value: Value, tensor: torch.Tensor) -> None:
        seen[value] = tensor

    run(graph, inputs, tap=keep)
    return seen


def compare_nodes(
    graph: Graph, inputs: list[torch.Tensor], settings: Settings, step: Step = lambda name: None
) -> list[NodeResult]:
    """Each node of `graph` (moving data apart) on the backend of `settings` against the reference."""
    binding = bind_inputs(graph, inputs)
    values = reference_values(graph, inputs)
    binding = measured(values, graph, binding)
    results = []
    for i, node in enumerate(graph.nodes):
        if node.op.startswith("tensor.") or node.op == "call.graph":
            continue
        step(f"{settings.backend.name}, node {i} of {len(graph)}")
        results.append(_compare(node, graph, values, binding, settings))
    return results


def _compare(
    node: Node, graph: Graph, values: Mapping[Value, torch.Tensor], binding: Mapping[str, int], settings: Settings
) -> NodeResult:
    where = node.location.describe()
    try:
        single, fed = single_node(node, values, binding)
        legal, _, left = legalise(single, settings)
        got = lower(legal, settings, left).run(fed)
    except CompileError as e:
        nothing = Difference(float("inf"), float("inf"), 0.0, False)
        return NodeResult(settings.backend.name, node.op, where, node, nothing, str(e.message))
    worst: Difference | None = None
    for value, tensor in zip(node.results, got, strict=True):
        expected = values[value]
        if node.op == "moe.route":
            expected, tensor = _align(node, value, values, got)
        bound = one_node(node, value, binding)
        d = difference(expected, tensor, bound, scale_of(expected, node, values))
        if worst is None or (not d.ok, d.max_error / (d.tolerance or 1)) > (
            not worst.ok,
            worst.max_error / (worst.tolerance or 1),
        ):
            worst = d
    assert worst is not None
    return NodeResult(settings.backend.name, node.op, where, node, worst)


def _align(
    node: Node, value: Value, values: Mapping[Value, torch.Tensor], got: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A routing result with each token's experts in order of their ids: near ties may come in either order."""
    weights, experts = (values[r] for r in node.results)
    mine, theirs = experts.argsort(dim=-1, stable=True), got[1].argsort(dim=-1, stable=True)
    expected = experts if value is node.results[1] else weights
    return expected.gather(-1, mine), got[value.index].gather(-1, theirs)


def single_node(
    node: Node, values: Mapping[Value, torch.Tensor], binding: Mapping[str, int]
) -> tuple[Graph, list[torch.Tensor]]:
    """A graph of one node with every size a number, and its operands; weights stay weights."""
    single = Graph("node")
    mapping: dict[Value, Value] = {}
    fed: list[torch.Tensor] = []
    for v in node.operands:
        if v is None or v in mapping:
            continue
        if v.weight is not None:
            mapping[v] = single.add_weight(v.weight)
        else:
            mapping[v] = single.add_input(f"x{len(fed)}", TensorType.of(values[v]))
            fed.append(values[v])
    attrs = {k: _concrete(a, binding) for k, a in node.attrs.items()}
    operands = [None if v is None else mapping[v] for v in node.operands]
    copy = single.create(node.opdef, operands, attrs, location=node.location)
    for r in copy.results:
        single.add_output(r)
    return single, fed


def _concrete(x: Any, binding: Mapping[str, int]) -> Any:
    match x:
        case Dim():
            return x.evaluate(binding)
        case TensorType():
            return x.with_shape([evaluate(s, binding) for s in x.shape])
        case tuple():
            return tuple(_concrete(y, binding) for y in x)
    return x
