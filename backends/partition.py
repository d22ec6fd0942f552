"""Splitting a graph between a backend and the reference interpreter, for `fallback="reference"`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moec.backends.base import Backend, Executable
from moec.ir import Graph, Node, Value
from moec.ir.graph import copy_node
from moec.ir.interpreter import bind_inputs
from moec.ir.runtime_sizes import introduces, needs, runtime_symbols


@dataclass(frozen=True)
class Fallback:
    """A node that runs in the reference interpreter, and why."""

    op: str
    location: str
    reason: str


@dataclass(eq=False)
class Segment:
    """A part of a graph that one backend runs. `inputs` and `outputs` are values of the whole graph, in the
    order of the part's own; `mapping` leads from the whole graph's values to the part's."""

    graph: Graph
    inputs: list[Value]
    outputs: list[Value]
    mapping: dict[Value, Value]
    in_reference: bool


def fallbacks(graph: Graph, backend: Backend) -> list[Fallback]:
    """What of a legalised graph the backend cannot run, each node once, called functions included."""
    found = []
    for g in (graph, *graph.functions.values()):
        for node in g.nodes:
            reason = backend.missing(node)
            if reason is not None:
                found.append(Fallback(node.op, node.location.describe(), reason))
    return found


def partition(graph: Graph, backend: Backend) -> list[Segment]:
    """Segments in execution order, alternating between the backend and the reference.

    A node's level is the largest of its producers', plus one where the side changes; the nodes of one level have
    no dependencies through the other side, so they form one segment and the number of changes is least.
    """
    bad_functions = {
        name for name, fn in graph.functions.items() if any(backend.missing(n) is not None for n in fn.nodes)
    }
    grown = True
    while grown:  # a function that calls a bad one is bad
        bad = {
            name
            for name, fn in graph.functions.items()
            if any(n.op == "call.graph" and n.attrs["callee"] in bad_functions for n in fn.nodes)
        }
        grown = not bad <= bad_functions
        bad_functions |= bad

    def on_reference(node: Node) -> bool:
        if node.op == "call.graph" and node.attrs["callee"] in bad_functions:
            return True
        return backend.missing(node) is not None

    sources = runtime_symbols(graph)
    levels: dict[Node, int] = {}
    groups: dict[int, list[Node]] = {}
    for node in graph.nodes:
        side = int(on_reference(node))
        level = side
        for v in (*node.operands, *(sources[s][0] for s in needs(node) if s in sources)):
            if v is not None and v.producer is not None:
                above = levels[v.producer]
                level = max(level, above + (above % 2 != side))
        levels[node] = level
        groups.setdefault(level, []).append(node)
    needed_elsewhere: set[Value] = set()
    for nodes in groups.values():
        used = _symbols(nodes) | {s for n in nodes for v in n.operands if v is not None for s in v.type.symbols}
        needed_elsewhere |= {sources[s][0] for s in used if s in sources and sources[s][0].producer not in nodes}
    return [_segment(graph, groups[level], level % 2 == 1, sources, needed_elsewhere) for level in sorted(groups)]


def _segment(
    graph: Graph,
    nodes: list[Node],
    in_reference: bool,
    sources: Mapping[str, tuple[Value, int]],
    needed_elsewhere: set[Value],
) -> Segment:
    """`sources`: where sizes known only at run time are seen; `needed_elsewhere`: those of them that other parts
    need."""
    inside = set(nodes)
    part = Graph(graph.name)
    part.functions = graph.functions
    mapping: dict[Value, Value] = {}
    inputs: list[Value] = []

    def add_input(v: Value) -> None:
        if v in mapping:
            return
        mapping[v] = part.add_input(v.name if v.producer is None and v.name else f"v{len(inputs)}.", v.type)
        mapping[v].origins = v.origins
        inputs.append(v)

    for node in nodes:
        for v in node.operands:
            if v is None or (v.producer is not None and v.producer in inside):
                continue
            if v.weight is not None:
                if v not in mapping:
                    mapping[v] = part.add_weight(v.weight)
                    mapping[v].origins = v.origins
            else:
                add_input(v)
    # dimension symbols are solved from input shapes: add what carries missing ones
    needed = _symbols(nodes)
    for symbol, (v, _) in sources.items():
        if symbol in needed | part.symbols and v.producer not in inside:
            add_input(v)
    for v in graph.inputs:
        bound = {str(s) for i in part.inputs for s in i.shape if not isinstance(s, int) and s.is_symbol}
        if v.type.symbols and (needed | part.symbols) - bound - sources.keys():
            add_input(v)
    for node in nodes:
        copy_node(node, part, mapping)
    outputs = []
    for node in nodes:
        for r in node.results:
            if r.is_output or r in needed_elsewhere or any(user not in inside for user in r.users):
                outputs.append(r)
                part.add_output(mapping[r])
    return Segment(part, inputs, outputs, mapping, in_reference)


def _symbols(nodes: Sequence[Node]) -> set[str]:
    """What the nodes need, less what they bring in themselves."""
    return set().union(*map(needs, nodes)) - set().union(*map(introduces, nodes))


class PartitionedExecutable(Executable):
    """Runs the segments of a graph in turn, some on a backend and some in the reference interpreter."""

    def __init__(
        self,
        graph: Graph,
        backend: Backend,
        threads: int | None,
        folder: Path | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        from moec.backends.reference import backend as reference

        self.graph = graph
        self.segments = partition(graph, backend)
        self.parts: list[Executable] = []
        for i, s in enumerate(self.segments):
            if s.in_reference:
                self.parts.append(reference.compile(s.graph))
            elif folder is not None:
                self.parts.append(backend.load(s.graph, folder / f"segment{i}", threads=threads, options=options))
            else:
                self.parts.append(backend.compile(s.graph, threads=threads, options=options))

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        env = self._run(inputs)
        return [v.weight.load() if v.weight is not None else env[v] for v in self.graph.outputs]

    def _run(self, inputs: Sequence[torch.Tensor]) -> dict[Value, torch.Tensor]:
        bind_inputs(self.graph, inputs)
        env = dict(zip(self.graph.inputs, inputs, strict=True))
        for s, part in zip(self.segments, self.parts, strict=True):
            env.update(zip(s.outputs, part.run([env[v] for v in s.inputs]), strict=True))
        return env

    def tap(self, inputs: Sequence[torch.Tensor], values: Sequence[Value]) -> dict[Value, torch.Tensor]:
        env = self._run(inputs)
        seen = {v: env[v] for v in values if v in env}
        for s, part in zip(self.segments, self.parts, strict=True):
            wanted = {s.mapping[v]: v for v in values if v not in seen and v in s.mapping}
            if wanted:
                tapped = part.tap([env[v] for v in s.inputs], list(wanted))
                seen.update((wanted[k], t) for k, t in tapped.items())
        return seen

    def save(self, folder: Path) -> None:
        for i, part in enumerate(self.parts):
            (folder / f"segment{i}").mkdir(parents=True, exist_ok=True)
            part.save(folder / f"segment{i}")

    @property
    def stats(self) -> dict[str, Any]:
        on_reference = [s for s in self.segments if s.in_reference]
        figures = {
            "segments": len(self.segments),
            "reference segments": len(on_reference),
            "reference nodes": sum(len(s.graph) for s in on_reference),
        }
        for i, part in enumerate(self.parts):
            figures.update({f"segment {i}: {k}": v for k, v in part.stats.items()})
        return figures
