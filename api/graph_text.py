"""A text of a graph for comparing: the same for graphs that differ in node order, locations, origins and digests
only; and what differs between two graphs, in lines that are the same wherever the graphs are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from moec.ir import Graph, Node, Value, Weight
from moec.ir.printer import print_graph, print_node, shorten, symbol


def canonical_text(graph: Graph, *, unused_weights: bool = True) -> str:
    """The text format without locations and origins; nodes in the order in which the outputs need them (dead ones
    last), weights by name. `unused_weights=False` drops weights and constants without uses, such as those that a rule
    matched by value."""
    return print_graph(_canonical(graph, unused_weights), locations=False)


def _canonical(graph: Graph, unused_weights: bool) -> Graph:
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
    return graph


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
    return _diff(expected.splitlines(), got.splitlines(), "expected", "got")


def graph_diff(
    before: Graph, after: Graph, names: tuple[str, str] = ("before", "after"), *, unused_weights: bool = True
) -> str:
    """A unified diff of two graphs as `canonical_text` has them, but for the numbers of values: a node that both have
    has one name, so that a node more or less does not change every line after it."""
    a, b = (_canonical(g, unused_weights) for g in (before, after))
    shown = _Aligned(a, b)
    return _diff(_lines(a, shown), _lines(b, shown), *names)


_MOST = 120  # lines of a diff


def _diff(want: list[str], have: list[str], first: str, second: str) -> str:
    around = 1000 if len(want) <= 40 else 3
    rows = list(difflib.unified_diff(want, have, first, second, lineterm="", n=around))
    more = [f"… {len(rows) - _MOST} more lines"] if len(rows) > _MOST else []
    return "\n".join([shorten(row) for row in rows[:_MOST]] + more)


class _Aligned:
    """Names for the values of two graphs: those of nodes that correspond are the same. Nodes correspond in order, by
    op, attributes, types and weights; in a run of nodes that were replaced the last ones do, which others use."""

    def __init__(self, before: Graph, after: Graph):
        self.of: dict[Value, str] = {}
        self._next = 0
        for g in (before, *before.functions.values()):
            self._number(g.nodes)
        pairs = [(before, after)]
        pairs += [(fn, after.functions[name]) for name, fn in before.functions.items() if name in after.functions]
        for a, b in pairs:
            self._align(list(a.nodes), list(b.nodes))
        for g in (after, *after.functions.values()):
            self._number(g.nodes)

    def __call__(self, v: Value | None) -> str:
        if v is None:
            return "_"
        if v.weight is not None:
            return "@" + symbol(v.weight.name)
        return "%" + symbol(v.name or "") if v.producer is None else self.of.get(v, "%?")

    def _number(self, nodes: Iterable[Node]) -> None:
        for r in (r for n in nodes for r in n.results if r not in self.of):
            self.of[r], self._next = f"%{self._next}", self._next + 1

    def _align(self, before: list[Node], after: list[Node]) -> None:
        a, b = ([_key(n) for n in nodes] for nodes in (before, after))
        for _, a0, a1, b0, b1 in difflib.SequenceMatcher(a=a, b=b, autojunk=False).get_opcodes():
            for x, y in zip(reversed(before[a0:a1]), reversed(after[b0:b1]), strict=False):
                if [r.type for r in x.results] != [r.type for r in y.results]:
                    break
                self.of.update((new, self.of[old]) for old, new in zip(x.results, y.results, strict=True))


def _key(node: Node) -> tuple[str, ...]:
    """What a node says without the names of other nodes."""
    weights = [v.weight.name for v in node.operands if v is not None and v.weight is not None]
    return (node.op, str(node.attrs), *(str(r.type) for r in node.results), *weights)


def _lines(graph: Graph, names: _Aligned) -> list[str]:
    lines = []
    for keyword, g in (("graph", graph), *(("function", f) for f in graph.functions.values())):
        title = keyword if g.name == keyword else f"{keyword} @{symbol(g.name)}"
        lines.append(f"{title}({', '.join(f'{names(v)}: {v.type}' for v in g.inputs)})")
        lines += [f"  weight @{symbol(n)}: {v.type}" for n, v in g.weights.items()]
        lines += [f"  {print_node(n, names, locations=False)}" for n in g.nodes]
        pairs = zip(g.output_names, g.outputs, strict=True)
        lines += [f"  return {', '.join(f'{symbol(n)} = {names(v)}: {v.type}' for n, v in pairs)}"]
    return lines
