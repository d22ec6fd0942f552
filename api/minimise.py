"""A small graph on which a pass still does the same thing wrong (delta debugging; Zeller and Hildebrandt, Simplifying
and Isolating Failure-Inducing Input, 2002)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from moec.ir import CompileError, Graph, Node, Value, parse, run
from moec.ir.cases import Case, with_data
from moec.judging import Fault
from moec.subgraph import Resize, at_binding, extract, is_solvable, resize, solvable, without_data

_RADII = (0, 1, 2, 4, 8, 16)
_SIZES = (2, 3, 4, 8, 16)  # what static sizes are tried at; 1 hides what a reader wants to see

# what is still wrong with a graph: on seeded inputs (None), or on the ones given
Check = Callable[[Graph, "Sequence[torch.Tensor] | None"], "Fault | None"]


@dataclass(frozen=True)
class Minimised:
    """`graph` fails as the whole did, with `fault`. Its inputs and weights are seeded where `inputs` is None, else
    they are the captured ones."""

    graph: Graph
    fault: Fault
    inputs: tuple[torch.Tensor, ...] | None = None


def minimise(
    graph: Graph, seeds: Iterable[Node], fault: Fault, check: Check, case: Case | None, *, seconds: float = 60.0
) -> Minimised | None:
    """The smallest part of `graph` found in `seconds` on which `check` finds a fault like `fault`, or None where
    not even the whole shows it by itself.

    seeds: nodes around which to look, as a rule matched them; none: the whole graph. case: sizes and inputs that
    show the fault in the whole; the values there are captured where seeded ones do not show it.
    """
    seeds = list(seeds)
    owner = seeds[0].graph if seeds and seeds[0].graph is not None else graph
    if owner is not graph:
        owner.functions, case = graph.functions, None  # sizes and values inside a function are not those of the case
    search = _Search(owner, fault, check, time.monotonic() + seconds)
    attempts: list[_Form] = [_symbolic]
    if case is not None:
        binding, inputs = case.binding, case.inputs
        attempts.append(lambda part, mapping: (at_binding(part, binding), None))
        captured = _Captured(owner, inputs, binding)
        attempts.append(captured.form)
    for form in attempts:
        for nodes in _regions(owner, seeds):
            found = search.fails(nodes, None, form)
            if found is not None:
                return search.shrink(list(nodes), form, found)
    return None


def _regions(graph: Graph, seeds: list[Node]) -> Iterator[list[Node]]:
    """The seeds with more and more of their surroundings, at last the whole graph."""
    everything = [n for n in graph.nodes if n.operands]
    size = 0
    for radius in _RADII if seeds else ():
        near = dict.fromkeys(seeds)
        for _ in range(radius):
            before = [v.producer for n in near for v in n.operands if v is not None and v.producer is not None]
            after = [u for n in near for r in n.results for u in r.users]
            near.update(dict.fromkeys([*before, *after]))
        if len(near) > size and len(near) < len(everything):
            size = len(near)
            yield [n for n in graph.nodes if n in near]
    yield everything


# -- forms: what an extracted part is checked as -------------------------------------------------------

_Form = Callable[[Graph, Mapping[Value, Value]], "tuple[Graph, tuple[torch.Tensor, ...] | None]"]


def _symbolic(part: Graph, mapping: Mapping[Value, Value]) -> tuple[Graph, None]:
    part = solvable(part)
    if not is_solvable(part):
        raise CompileError("sizes of the part are not given by its inputs", code="dims")
    return part, None


class _Captured:
    """The values of a run stand for inputs, weights keep their data, sizes are numbers."""

    def __init__(self, graph: Graph, inputs: Sequence[torch.Tensor], binding: Mapping[str, int]):
        self.graph, self.inputs, self.binding = graph, inputs, binding
        self.values: dict[Value, torch.Tensor] | None = None

    def form(self, part: Graph, mapping: Mapping[Value, Value]) -> tuple[Graph, tuple[torch.Tensor, ...]]:
        if self.values is None:
            self.values = {}
            values = self.values
            run(self.graph, self.inputs, tap=lambda v, t: values.update({v: t}))
        seen = {new: self.values[old] for old, new in mapping.items() if old in self.values}
        return at_binding(part, self.binding), tuple(seen[v] for v in part.inputs)


# -- the search ----------------------------------------------------------------------------------------


class _Search:
    def __init__(self, graph: Graph, fault: Fault, check: Check, deadline: float):
        self.graph, self.fault, self.check, self.deadline = graph, fault, check, deadline

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def fails(self, nodes: Iterable[Node], outputs: Sequence[Value] | None, form: _Form) -> Minimised | None:
        """The part of these nodes, where it shows the fault."""
        try:
            part, mapping = extract(self.graph, nodes, outputs)
            return self.judge(*form(part, mapping)) if part.outputs else None
        except CompileError:  # a part that cannot stand alone
            return None

    def judge(self, part: Graph, inputs: tuple[torch.Tensor, ...] | None) -> Minimised | None:
        """As a fresh process will see it: read from its text."""
        if inputs is None:
            read = with_data(parse(str(without_data(part))))
        else:
            read = parse(str(part))
            read.bind_weights({n: v.weight for n, v in part.weights.items() if v.weight is not None})
        found = self.check(read, inputs)
        if found is None or not found.like(self.fault):
            return None
        return Minimised(part if inputs is not None else without_data(part), found, inputs)

    def shrink(self, nodes: list[Node], form: _Form, best: Minimised) -> Minimised:
        """Fewer nodes, then fewer outputs, then smaller sizes, as long as the fault stays."""
        nodes, best = self._fewer_nodes(nodes, form, best)
        best = self._fewer_outputs(nodes, form, best)
        return best if best.inputs is not None else self._smaller(best)

    def _fewer_nodes(self, nodes: list[Node], form: _Form, best: Minimised) -> tuple[list[Node], Minimised]:
        chunk = len(nodes) // 2
        while chunk:
            before, start = len(nodes), 0
            while start < len(nodes) and not self.late:
                fewer = nodes[:start] + nodes[start + chunk :]
                found = self.fails(fewer, None, form) if fewer else None
                if found is None:
                    start += chunk
                else:
                    nodes, best = fewer, found
            # single nodes until none can go, larger parts once
            chunk = chunk // 2 if chunk > 1 or len(nodes) == before or self.late else 1
        return nodes, best

    def _fewer_outputs(self, nodes: list[Node], form: _Form, best: Minimised) -> Minimised:
        chosen = set(nodes)
        results = [r for n in nodes for r in n.results]
        outputs = [r for r in results if r.is_output or not r.uses or any(u not in chosen for u in r.users)]
        for v in list(outputs):
            fewer = [w for w in outputs if w is not v]
            if not fewer or self.late:
                break
            live = _needed(fewer, chosen)
            found = self.fails([n for n in nodes if n in live], fewer, form)
            if found is not None:
                outputs, best = fewer, found
        return best

    def _smaller(self, best: Minimised) -> Minimised:
        """Each static size in turn at a small number, everywhere or in types only."""
        values = [*best.graph.inputs, *best.graph.weights.values(), *(r for n in best.graph.nodes for r in n.results)]
        sizes = sorted({s for v in values for s in v.shape if isinstance(s, int) and s > 2}, reverse=True)
        for old in sizes:
            for new, attributes in ((s, a) for s in _SIZES if s < old for a in (True, False)):
                if self.late:
                    return best
                try:
                    found = self.judge(resize(best.graph, _swapping(old, new), attributes=attributes), None)
                except CompileError:  # sizes that do not fit together
                    continue
                if found is not None:
                    best = found
                    break
        return best


def _swapping(old: int, new: int) -> Resize:
    return lambda s: new if s == old else s


def _needed(outputs: Iterable[Value], chosen: set[Node]) -> set[Node]:
    needed: set[Node] = set()
    stack = [v.producer for v in outputs]
    while stack:
        n = stack.pop()
        if n is not None and n in chosen and n not in needed:
            needed.add(n)
            stack += [v.producer for v in n.operands if v is not None]
    return needed
