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

    A result of up to `limit` bytes is folded, and all that one run adds to the graph is at most `total` bytes; weights
    larger than `limit` are not read. Only ops whose work is in proportion to operands and results are evaluated, so
    that compiling never takes memory that the model does not need. A result of at most 64 elements becomes a
    `tensor.constant`, a larger one a weight `folded…`.
    """

    limit: int = 1 << 20
    total: int = 1 << 28

    def run(self, graph: Graph) -> Graph:
        graph = graph.clone()
        constant: set[Value] = set()  # by the types alone
        for node in graph.nodes:
            if self._foldable(node, constant):
                constant.update(node.results)
        wanted, left = self._wanted(graph, constant)
        known = self._evaluated(graph, constant - left, wanted)
        for node in reversed(list(graph.nodes)):
            if node.op == "tensor.constant" or node.results[0] not in constant or node.results[0] in left:
                continue
            for r in node.results:
                if r in known:
                    graph.replace_value(r, _materialise(graph, node, known[r]))
            if not any(r.uses or r.is_output for r in node.results):
                graph.erase(node)
        graph.prune_weights()
        return graph

    def _wanted(self, graph: Graph, constant: set[Value]) -> tuple[set[Value], set[Value]]:
        """The results that a node that stays, or an output, needs; and those left as they are since the total would be
        more than `total`."""
        wanted: set[Value] = set()
        left: set[Value] = set()
        total = 0
        for node in reversed(list(graph.nodes)):
            if node.results and node.results[0] not in constant:
                continue
            needed = [
                r
                for r in node.results
                if r.is_output or any(u.results[0] not in constant or u.results[0] in left for u in r.users)
            ]
            if node.op == "tensor.constant" or not needed:
                continue
            total += sum(_bytes(r) for r in needed)
            if total > self.total:
                left.update(node.results)
            else:
                wanted.update(needed)
        return wanted, left

    def _evaluated(self, graph: Graph, constant: set[Value], wanted: set[Value]) -> dict[Value, torch.Tensor]:
        """The wanted results; others are kept until their last use only."""
        needed = set(wanted)
        order = []
        for node in reversed(list(graph.nodes)):
            if any(r in needed for r in node.results) and node.results[0] in constant:
                needed.update(v for v in node.operands if v is not None and v.weight is None)
                order.append(node)
        last = {v: node for node in reversed(order) for v in node.operands if v is not None}
        known: dict[Value, torch.Tensor] = {}
        for node in reversed(order):
            operands = [None if v is None else self._tensor(v, known) for v in node.operands]
            for r, t in zip(node.results, evaluate_node(node, operands, {}), strict=True):
                if r in needed:
                    known[r] = t.contiguous()
            for v in node.operands:
                if v is not None and last[v] is node and v not in wanted:
                    known.pop(v, None)
        return known

    def _foldable(self, node: Node, constant: set[Value]) -> bool:
        if node.op == "quant.dequantize":  # what is stored in few bits stays so
            return False
        if node.opdef.family not in _PROPORTIONAL or any(_symbolic(a) for a in node.attrs.values()):
            return False
        if any(not 0 <= _bytes(r) <= self.limit or r.dtype.bits < 8 for r in node.results):
            return False
        return all(v is None or v in constant or self._readable(v) for v in node.operands)

    def _readable(self, v: Value) -> bool:
        return v.weight is not None and v.weight.source is not None and 0 <= _bytes(v) <= self.limit

    @staticmethod
    def _tensor(v: Value, known: dict[Value, torch.Tensor]) -> torch.Tensor:
        return v.weight.load() if v.weight is not None else known[v]


# families of ops that need memory for operands and results only; attention has all scores at once, say
_PROPORTIONAL = ("math", "tensor", "linear", "norm", "rope", "quant")


def _bytes(v: Value) -> int:
    """Bytes of a value, -1 where a size is symbolic."""
    size = v.type.nbytes
    return size if isinstance(size, int) else -1


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
