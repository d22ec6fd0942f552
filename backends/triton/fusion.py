"""Grouping elementwise nodes into generated kernels, and the order in which everything runs."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from moec.backends.triton.codegen import Custom, Program, literal, program
from moec.ir import Graph, Node, Value
from moec.ir.runtime_sizes import needs, runtime_symbols

MAX_NODES = 64
"""Nodes of a group at most; longer chains gain nothing and hold more registers."""
MAX_POINTERS = 24
"""Inputs plus results of a group at most."""


@dataclass(eq=False)
class Group:
    """Elementwise nodes of one result shape, in SSA order, that run as one kernel.

    `inputs`: values loaded; `outputs`: values stored (used outside the group, returned, or asked for); `literals`:
    scalar constants written into the kernel; `custom`: expressions from outside.
    """

    nodes: list[Node]
    inputs: list[Value]
    outputs: list[Value]
    literals: dict[Value, str]
    custom: Custom

    @property
    def shape(self) -> tuple:
        return self.nodes[0].results[0].shape

    @cached_property
    def program(self) -> Program:
        return program(self.nodes, self.inputs, self.literals, self.outputs, self.custom)


Unit = Group | Node


def plan(graph: Graph, keep: Collection[Value] = (), custom: Custom = MappingProxyType({})) -> list[Unit]:
    """Units in an order in which each can run; values in `keep` are computed and stored even if only fused code
    needs them. Constants that are literals wherever they are used do not appear."""
    wanted = frozenset(keep)
    position = {node: i for i, node in enumerate(graph.nodes)}
    inlined = {use for node in position if node.opdef.elementwise for use in _inlined(node)}
    left = [n for n in position if not _is_literal(n) or _needed(n, inlined, wanted)]
    partition = _Partition(graph, left, position, inlined)
    for node in left:
        if node.opdef.elementwise:
            for v in node.operands:
                if v is not None and v.producer is not None and v.producer.opdef.elementwise:
                    partition.try_merge(v.producer, node)
    return [
        _group(nodes, inlined, wanted, custom) if nodes[0].opdef.elementwise else nodes[0]
        for nodes in partition.ordered()
    ]


def _is_literal(node: Node) -> bool:
    if node.op == "tensor.full":
        return True
    return node.op == "tensor.constant" and len(node.attrs["value"]) == 1


def _inlined(node: Node) -> list[tuple[Node, int]]:
    """Uses of scalar constants by an elementwise node that become literals: all, but one operand stays a tensor."""
    constant = [i for i, v in enumerate(node.operands) if v is not None and v.producer and _is_literal(v.producer)]
    if len(constant) == sum(v is not None for v in node.operands):
        constant = constant[1:]
    return [(node, i) for i in constant]


def _needed(node: Node, inlined: set[tuple[Node, int]], wanted: frozenset[Value]) -> bool:
    v = node.results[0]
    return v.is_output or v in wanted or not set(v.uses) <= inlined


def _text(v: Value) -> str:
    assert v.producer is not None
    attrs = v.producer.attrs
    return literal(attrs["value"] if v.producer.op == "tensor.full" else attrs["value"][0], v.dtype)


def _group(nodes: list[Node], inlined: set[tuple[Node, int]], wanted: frozenset[Value], custom: Custom) -> Group:
    members = set(nodes)
    inputs: dict[Value, None] = {}
    literals: dict[Value, str] = {}
    for node in nodes:
        for i, v in enumerate(node.operands):
            if v is not None and (node, i) in inlined:
                literals[v] = _text(v)
            elif v is not None and v.producer not in members:
                inputs[v] = None
    # a constant may be a literal of one node and the one tensor of another
    for v in inputs:
        literals.pop(v, None)
    results = [n.results[0] for n in nodes]
    outputs = [v for v in results if v.is_output or v in wanted or any(n not in members for n in v.users)]
    # a node without any use still runs: its value may be asked for
    return Group(nodes, list(inputs), outputs or results[-1:], literals, custom)


class _Partition:
    """Nodes in units, with the edges between units kept acyclic."""

    def __init__(self, graph: Graph, nodes: list[Node], position: dict[Node, int], inlined: set[tuple[Node, int]]):
        self.position = position
        self.inlined = inlined
        sources = runtime_symbols(graph)
        # what brings in a size runs before what needs it
        self.sizes = {n: [sources[s][0].producer for s in needs(n) if s in sources] for n in nodes if sources}
        self.unit = {node: position[node] for node in nodes}
        self.members = {position[node]: [node] for node in nodes}

    def _sources(self, unit: int) -> set[int]:
        """Units that this one reads from."""
        found = set()
        for node in self.members[unit]:
            for i, v in enumerate(node.operands):
                if v is not None and v.producer in self.unit and (node, i) not in self.inlined:
                    found.add(self.unit[v.producer])
            found |= {self.unit[n] for n in self.sizes.get(node, ()) if n in self.unit}
        return found - {unit}

    def try_merge(self, first: Node, second: Node) -> None:
        """Put two nodes into one unit where shapes agree, limits hold and no path leaves the unit and comes back."""
        a, b = self.unit[first], self.unit[second]
        if a == b or first.results[0].shape != second.results[0].shape:
            return
        nodes = sorted(self.members[a] + self.members[b], key=self.position.__getitem__)
        if len(nodes) > MAX_NODES or self._pointers(nodes) > MAX_POINTERS or self._returns({a, b}):
            return
        self.members[a] = nodes
        del self.members[b]
        for node in nodes:
            self.unit[node] = a

    def _pointers(self, nodes: list[Node]) -> int:
        inside = set(nodes)
        loaded = {v for n in nodes for v in n.operands if v is not None and v.producer not in inside}
        stored = [n for n in nodes if n.results[0].is_output or any(u not in inside for u in n.results[0].users)]
        return len(loaded) + len(stored)

    def _returns(self, units: set[int]) -> bool:
        # nothing before the first member can depend on a member
        start = min(self.position[self.members[u][0]] for u in units)
        stack = [s for u in units for s in self._sources(u) if s not in units]
        seen = set(stack)
        while stack:
            unit = stack.pop()
            if self.position[self.members[unit][-1]] < start:
                continue
            for source in self._sources(unit):
                if source in units:
                    return True
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
        return False

    def ordered(self) -> Iterable[list[Node]]:
        """Units topologically, those that end early first."""
        waiting = {u: self._sources(u) for u in self.members}
        readers: dict[int, list[int]] = {u: [] for u in self.members}
        for unit, sources in waiting.items():
            for source in sources:
                readers[source].append(unit)
        ready = [(self.position[self.members[u][-1]], u) for u, sources in waiting.items() if not sources]
        heapq.heapify(ready)
        while ready:
            _, unit = heapq.heappop(ready)
            yield self.members[unit]
            for reader in readers[unit]:
                waiting[reader].discard(unit)
                if not waiting[reader]:
                    heapq.heappush(ready, (self.position[self.members[reader][-1]], reader))
