"""Measuring what a model does on sample inputs: the load of its experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moec.ir import CompileError, Graph, Node, Value, run

EXPERT_OPS = ("moe.experts", "quant.scaled_experts")


def expert_nodes(graph: Graph) -> list[Node]:
    """The grouped-experts nodes of a graph in order: row i of a load or placement belongs to node i.

    Raises CompileError where called functions hold some (run before `outline`).
    """
    nodes = [n for n in graph.nodes if n.op in EXPERT_OPS]
    inside = [n for fn in graph.functions.values() for n in fn.nodes if n.op in EXPERT_OPS]
    if inside:
        raise CompileError(
            f"{inside[0].op} is inside a called function, whose layers share their experts' routing",
            code="placement",
            location=inside[0].location,
            hint="work on the graph before it is outlined",
        )
    return nodes


def logical_experts(node: Node) -> Value:
    """The routed expert ids of a grouped-experts node, before any remap to slots."""
    experts = node.operand("experts")
    if experts.producer is not None and experts.producer.op == "moe.remap":
        experts = experts.producer.operand("experts")
    return experts


def num_logical_experts(node: Node) -> int:
    """Experts that routing chooses from (without a remap: those that the weights hold)."""
    experts = node.operand("experts")
    if experts.producer is not None and experts.producer.op == "moe.remap":
        return experts.producer.operand("table").shape[0]
    return node.operand("gate_up").shape[0]


def _choices(graph: Graph, inputs: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, int]]:
    """Per grouped-experts node: chosen expert ids i64[T, k] and the number of experts."""
    nodes = expert_nodes(graph)
    if not nodes:
        raise CompileError("the graph has no moe.experts node", code="placement")
    counts = {num_logical_experts(n) for n in nodes}
    if len(counts) > 1:
        raise CompileError(f"layers have different numbers of experts: {sorted(counts)}", code="placement")
    wanted = {logical_experts(n) for n in nodes}
    seen: dict[Value, torch.Tensor] = {}

    def tap(value: Value, tensor: torch.Tensor) -> None:
        if value in wanted:
            seen[value] = tensor

    run(graph, inputs, tap=tap)
    return [(seen[logical_experts(n)], num_logical_experts(n)) for n in nodes]


def expert_load(graph: Graph, inputs: Sequence[torch.Tensor]) -> np.ndarray:
    """How many assignments each expert gets: f64[L, E], one row per grouped-experts node in graph order.

    Runs the graph on `inputs` in the reference interpreter; add up the results of several batches. What
    `place_experts` takes as `load`. Raises CompileError where the graph has no experts, or layers differ
    in their number.
    """
    return np.stack(
        [torch.bincount(ids.reshape(-1), minlength=e).double().numpy() for ids, e in _choices(graph, inputs)]
    )


def expert_coactivation(graph: Graph, inputs: Sequence[torch.Tensor]) -> np.ndarray:
    """How often two experts serve the same token: f64[L, E, E], symmetric with a zero diagonal, else as
    `expert_load`. What `place_experts` takes as `coactivation`."""
    result = []
    for ids, e in _choices(graph, inputs):
        chosen = torch.zeros(ids.shape[0], e, dtype=torch.float64).scatter_(1, ids, 1.0)
        result.append((chosen.T @ chosen).fill_diagonal_(0.0).numpy())
    return np.stack(result)
