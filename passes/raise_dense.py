"""Experts that run on every token and are masked afterwards, to `moe.experts`.

Two forms: stacked weights in one batched product, and one module per expert in an unrolled loop. The mask
comes from the routing: scatter(0, experts, weights), Σ_j one_hot(experts)·weights, or per expert
Σ_j (experts = e)·weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moec.ir import Builder, ComputedSource, Graph, Node, TensorType, Value, Weight
from moec.passes.base import Pass, active_record
from moec.passes.matcher import Matcher, scalar_constant
from moec.passes.pattern import build_patterns
from moec.passes.pattern_types import Pattern
from moec.passes.rewrite import Match, Refused, Rewrite
from moec.passes.structure import ACTIVATIONS, gated, is_filled, producer, through

Routing = tuple[Value, Value]


def combine_matrix(v: Value | None) -> Routing | None:
    """(weights, experts) [T, k] where v [T, E] holds each expert's weight for each token, 0 if not chosen."""
    v = through(v, "math.cast")
    scatter = producer(v, "tensor.scatter_elements")
    if scatter is not None:
        zeros, experts, weights = scatter.operands
        return (weights, experts) if is_filled(zeros, 0) and scatter.attrs["axis"] == -1 else None
    total = producer(v, "math.sum")
    if total is None or total.attrs["axes"] != (-2,) or total.attrs["keepdim"]:
        return None
    product = producer(through(total.operands[0], "math.cast"), "math.mul")
    for hot, factor in _orders(product):
        one_hot = producer(through(hot, "math.cast"), "tensor.one_hot")
        weights = through(factor, "tensor.reshape", "math.cast")
        if one_hot is not None and weights is not None and weights.shape == one_hot.operands[0].shape:
            return weights, one_hot.operands[0]
    return None


def combine_column(v: Value | None) -> tuple[Value, Value, int] | None:
    """(weights, experts, e) where v [T, 1] is expert e's weight for each token."""
    v = through(v, "tensor.reshape", "math.cast")
    cut = producer(v, "tensor.slice")
    if cut is not None:
        routing = combine_matrix(cut.operands[0])
        start, end = cut.attrs["start"], cut.attrs["end"]
        return (*routing, start) if routing and cut.attrs["axis"] == -1 and end == start + 1 else None
    total = producer(v, "math.sum")
    if total is None or total.attrs["axes"] != (-1,):
        return None
    for mask, weights in _orders(producer(through(total.operands[0], "math.cast"), "math.mul")):
        equal = producer(through(mask, "math.cast"), "math.eq")
        for experts, number in _orders(equal):
            e = scalar_constant(number)
            if isinstance(e, int) and experts.shape == weights.shape:
                return weights, experts, e
    return None


def _orders(node: Node | None) -> list[tuple[Any, Any]]:
    if node is None:
        return []
    a, b = node.operands
    return [(a, b), (b, a)]


def _rows(v: Value) -> Value | None:
    """x [T, d] of which v is a broadcast over leading axes."""
    tail = v.shape[-2:]
    while v.type.rank > 2:
        node = producer(v, "tensor.expand") or producer(v, "tensor.reshape")
        if node is None or node.operands[0].shape[-2:] != tail:
            return None
        v = node.operands[0]
    return v if v.shape == tail else None


@dataclass(frozen=True)
class DenseExperts(Rewrite):
    """Σ_e combine[:, e] · mlp_e(x) with stacked weights → moe.experts"""

    activation: str = "silu"

    @property
    def name(self) -> str:
        return f"dense_experts_{self.activation}"

    def pattern(self, p: Any, rows: Any, gate_up: Any, down: Any, factors: Any) -> Any:
        h = p.matmul(rows, p.transpose(gate_up, perm=(0, 2, 1)))
        y = p.matmul(gated(p, h, self.activation), p.transpose(down, perm=(0, 2, 1)))
        return p.sum(p.mul(y, factors), axes=(-3,))

    def when(self, m: Match) -> Refused | None:
        routing, x = self._routing(m), _rows(m.rows)
        if routing is None:
            return m.no("the factors are not a routing's combine matrix", at=m.factors)
        if x is None or x.type != m.root.type:
            return m.no(f"{m.rows.type} are not the same rows for every expert", at=m.rows)
        half = m.gate_up.shape[1] // 2
        return m.no(f"halves {m.halves} of {m.gate_up.type}") if m.halves != (half, half) else None

    @staticmethod
    def _routing(m: Match) -> Routing | None:
        """factors [E, T, 1] = transpose(combine [T, E])"""
        flipped = producer(through(m.factors, "tensor.reshape", "math.cast"), "tensor.transpose")
        if flipped is None or flipped.attrs["perm"] != (1, 0) or m.factors.shape != (*flipped.results[0].shape, 1):
            return None
        return combine_matrix(flipped.operands[0])

    def replace(self, b: Any, m: Match) -> Any:
        routing = self._routing(m)
        assert routing is not None  # when() saw it
        weights, experts = routing
        return b.moe_experts(_rows(m.rows), weights, experts, m.gate_up, m.down, activation=self.activation)


def _expert_pattern(activation: str) -> Pattern:
    op, attrs = ACTIVATIONS[activation]

    def pattern(p: Any, x: Any, gate: Any, up: Any, down: Any, factor: Any) -> Any:
        hidden = p.mul(p.op(op, [p.linear_linear(x, gate)], attrs), p.linear_linear(x, up))
        return p.mul(p.linear_linear(hidden, down), factor)

    return build_patterns(pattern)[0]


@dataclass(frozen=True)
class RaiseUnrolledExperts(Pass):
    """Σ_e column_e · mlp_e(x), one MLP per expert with weights of its own → moe.experts on their stack.

    The stacked weights are built when first read. All E experts must be there, each once.
    """

    def run(self, graph: Graph) -> Graph:
        graph = graph.clone()
        for activation in ACTIVATIONS:
            groups: dict[tuple[Value, Value, Value], dict[int, Match]] = {}
            pattern = _expert_pattern(activation)
            for node in graph.find("math.mul", unique=True):
                if node.graph is not graph:
                    continue
                for bindings in Matcher(pattern).at(node):
                    m = Match(bindings, pattern)
                    column = combine_column(m.factor)
                    if column is not None and all(w.weight for w in (m.gate, m.up, m.down)):
                        weights, experts, e = column
                        groups.setdefault((m.x, weights, experts), {})[e] = m
                        break
            for (x, weights, experts), found in groups.items():
                self._replace(graph, x, weights, experts, found, activation)
        return graph

    def _replace(
        self, graph: Graph, x: Value, weights: Value, experts: Value, found: dict[int, Match], activation: str
    ) -> None:
        route = producer(weights, "moe.route")
        if route is None or x.type.rank != 2 or sorted(found) != list(range(route.operands[0].shape[-1])):
            return
        root, rest = _sum_of({m.root for m in found.values()})
        if root is None or root.type != x.type:
            return
        ordered = [found[e] for e in sorted(found)]
        gate_up = _stack(graph, [(m.gate, m.up) for m in ordered])
        down = _stack(graph, [(m.down,) for m in ordered])
        node = root.producer
        assert node is not None
        b = Builder(graph, before=node, location=ordered[0].location.merge(*(m.location for m in ordered)))
        y = b.moe_experts(x, weights, experts, gate_up, down, activation=activation)
        for other in rest:
            y = b.add(y, other)
        graph.replace_value(root, y)
        record = active_record.get()
        if record is not None:
            record.fired["unrolled_experts"] = record.fired.get("unrolled_experts", 0) + 1


def _sum_of(terms: set[Value]) -> tuple[Value | None, list[Value]]:
    """The sum that all terms flow into by additions alone, and its other (non-zero) terms."""
    root = next(iter(terms))
    while True:
        leaves = _leaves(root)
        if terms <= set(leaves):
            return root, [v for v in leaves if v not in terms and not is_filled(v, 0)]
        users = root.users
        if len(users) != 1 or users[0].op != "math.add" or root.is_output:
            return None, []
        root = users[0].result


def _leaves(v: Value) -> list[Value]:
    stack, leaves = [v], []
    while stack:
        node = producer(stack[-1], "math.add")
        top = stack.pop()
        if node is None:
            leaves.append(top)
        else:
            stack += node.operands
    return leaves


def _stack(graph: Graph, rows: list[tuple[Value, ...]]) -> Value:
    """[E, …] weight of each expert's matrices, joined along their rows."""
    parts = [[v.weight for v in row if v.weight is not None] for row in rows]
    first = rows[0]
    shape = (len(rows), sum(int(v.shape[0]) for v in first), *first[0].shape[1:])
    name = graph.fresh_weight_name(f"{parts[0][0].name}.stacked")

    def compute() -> torch.Tensor:
        return torch.stack([torch.cat([w.load() for w in row]) for row in parts])

    return graph.add_weight(Weight(name, TensorType(first[0].dtype, shape), ComputedSource(compute)))
