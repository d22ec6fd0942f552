"""A text of a graph for comparing: the same for graphs that differ in node order, locations, origins and digests
only."""

from __future__ import annotations

import difflib

from moec.ir import Graph, Node, Weight
from moec.ir.printer import print_graph


def canonical_text(graph: Graph, *, unused_weights: bool = True) -> str:
    """The text format without locations and origins; nodes in the order in which the outputs need them (dead ones
    last), weights by name. `unused_weights=False` drops weights and constants without uses, such as those that a rule
    matched by value."""
    graph = graph.clone()
    for g in (graph, *graph.functions.values()):
        if not unused_weights:
            for node in list(g.nodes):
                if node.op == "tensor.constant" and not node.result.uses and not node.result.is_output:
                    g.erase(node)
            g.prune_weights()
        for v in g.inputs:
            v.origins = frozenset([v.name or ""])
        g.weights = dict(sorted(g.weights.items()))
        for v in g.weights.values():
            assert v.weight is not None
            v.weight = Weight(v.weight.name, v.weight.type)
            v.origins = frozenset()
        for node in _in_order_of_need(g):
            g.move_before(node, None)
    graph.functions = dict(sorted(graph.functions.items()))
    return print_graph(graph, locations=False)


def _in_order_of_need(graph: Graph) -> list[Node]:
    roots = [v.producer for v in graph.outputs if v.producer is not None]
    order: dict[Node, None] = {}
    for root in (*roots, *graph.nodes):
        stack = [(root, False)]
        while stack:
            node, complete = stack.pop()
            if node in order:
                continue
            if complete:
                order[node] = None
                continue
            stack.append((node, True))
            stack += [(v.producer, False) for v in reversed(node.operands) if v is not None and v.producer is not None]
    return list(order)


def text_diff(expected: str, got: str) -> str:
    """A unified diff of two texts, the whole of them as context where they are short."""
    want, have = expected.splitlines(), got.splitlines()
    around = 1000 if len(want) <= 40 else 3
    rows = difflib.unified_diff(want, have, "expected", "got", lineterm="", n=around)
    return "\n".join(rows)
