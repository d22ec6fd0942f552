"""Dead code, common subexpressions, constant folding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moec.ir import Dim, Graph, Node, TensorType, Value, Weight
from moec.ir.interpreter import evaluate_node
from moec.ir.ops.tensor import INLINE_LIMIT
from moec.ir.runtime_sizes import needs, runtime_symbols
from moec.passes.base import Pass


@dataclass(frozen=True)
class DeadCode(Pass):
    """Removes nodes and weights that no output depends on, and functions that nothing calls."""

    def run(self, graph: Graph) -> Graph:
        graph = graph.clone()
        for g in (graph, *graph.functions.values()):
            sources = {symbol: value.producer for symbol, (value, _) in runtime_symbols(g).items()}
            shown = {source for v in g.outputs for source in map(sources.get, v.type.symbols)}
            for node in reversed(list(g.nodes)):
                if not any(r.uses or r.is_output for r in node.results) and node not in shown:
                    g.erase(node)
                else:  # what brings in a size that stays has to stay
                    shown |= {sources.get(symbol) for symbol in needs(node)}
            g.prune_weights()
        # from the graph itself, through what it calls: a function that only a dead one calls is dead too
        called = {n.attrs["callee"] for n in graph.find("call.graph")}
        graph.functions = {name: fn for name, fn in graph.functions.items() if name in called}
        return graph


@dataclass(frozen=True)
class CommonSubexpressions(Pass):
    """Merges nodes of the same op, attributes and operands (either order where commutative)."""

    def run(self, graph: Graph) -> Graph:
        graph = graph.clone()
        for g in (graph, *graph.functions.values()):
            seen: dict[Any, Node] = {}
            for node in g.nodes:
                first = seen.setdefault(_key(node), node)
                if first is not node:
                    for old, new in zip(node.results, first.results, strict=True):
                        g.replace_value(old, new)
                    g.erase(node)
        return graph


def _key(node: Node) -> Any:
    operands = tuple(0 if v is None else id(v) for v in node.operands)
    if node.opdef.commutative:
        operands = tuple(sorted(operands))
    # repr tells 1 from 1.0 and True, and -0.0 from 0.0
    return node.op, operands, repr(sorted(node.attrs.items()))


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Evaluates nodes whose operands are all constants or small weights, by the reference.

    A result of up to `limit` bytes is folded; weights larger than `limit` are not read. A result of at
    most 64 elements becomes a `tensor.constant`, a larger one a weight `folded…`.
    """

    limit: int = 1 << 20

    def run(self, graph: Graph) -> Graph:
        graph = graph.clone()
        known: dict[Value, torch.Tensor] = {}
        for node in graph.nodes:
            if self._foldable(node, known):
                operands = [None if v is None else self._tensor(v, known) for v in node.operands]
                for r, t in zip(node.results, evaluate_node(node, operands, {}), strict=True):
                    known[r] = t.contiguous()
        for node in reversed(list(graph.nodes)):
            if node.op == "tensor.constant" or not all(r in known for r in node.results):
                continue
            # only what a node that stays needs is materialised
            for r in node.results:
                if any(u.results[0] not in known for u in r.users) or r.is_output:
                    graph.replace_value(r, _materialise(graph, node, known[r]))
            if not any(r.uses or r.is_output for r in node.results):
                graph.erase(node)
        graph.prune_weights()
        return graph

    def _foldable(self, node: Node, known: dict[Value, torch.Tensor]) -> bool:
        if node.op == "call.graph" or any(_symbolic(a) for a in node.attrs.values()):
            return False
        for r in node.results:
            size = r.type.nbytes
            if not isinstance(size, int) or size > self.limit or r.dtype.bits < 8:
                return False
        return all(v is None or v in known or self._readable(v) for v in node.operands)

    def _readable(self, v: Value) -> bool:
        if v.weight is None or v.weight.source is None:
            return False
        size = v.type.nbytes
        return isinstance(size, int) and size <= self.limit

    @staticmethod
    def _tensor(v: Value, known: dict[Value, torch.Tensor]) -> torch.Tensor:
        return v.weight.load() if v.weight is not None else known[v]


def _symbolic(attr: Any) -> bool:
    return isinstance(attr, Dim) or (isinstance(attr, tuple) and any(map(_symbolic, attr)))


def _materialise(graph: Graph, node: Node, tensor: torch.Tensor) -> Value:
    type = TensorType.of(tensor)
    if tensor.numel() <= INLINE_LIMIT and (
        type.dtype.is_integer or type.dtype == "bool" or type.dtype in ("f32", "f64")
    ):
        attrs = {"value": tuple(tensor.reshape(-1).tolist()), "type": type}
        return graph.create("tensor.constant", (), attrs, location=node.location, before=node).result
    stem = f"folded.{node.location.module or 'graph'}.{node.op.split('.')[1]}"
    return graph.add_weight(Weight.of(graph.fresh_weight_name(stem), tensor))
