"""The small graph that shows a culprit's fault again, and the line that does it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from moec.backend_fault import fault_on
from moec.backends import Backend, get_backend
from moec.culprit import Culprit
from moec.graph_file import save_graph
from moec.ir import ArgumentValueError, CompileError, Graph, Location, Node
from moec.ir.cases import Case
from moec.ir.interpreter import bind_inputs
from moec.judging import fault_of
from moec.minimise import minimise
from moec.passes.base import Analysis, Pass
from moec.passes.rewrite import Rewrite
from moec.passes.rewriting.engine import compiled_patterns
from moec.passes.rewriting.match import Match
from moec.passes.rewriting.matcher import Matcher
from moec.passes.spec import print_pass

_LONG = 200


def reproduce(
    found: Culprit,
    suspects: Sequence[Pass | Analysis],
    inputs: Sequence[torch.Tensor] | None,
    seconds: float,
    folder: Path | None,
    backend: Backend,
) -> None:
    """Fill in `minimised`, `path` and `repro`. suspects: passes that may show the fault by themselves, best first."""
    assert found.before is not None
    assert found.fault is not None
    graph, fault = found.before, found.fault
    case = fault.difference.case if fault.difference is not None else None
    if case is None and inputs is not None:
        case = Case("the given inputs", bind_inputs(graph, inputs), tuple(inputs))
    if found.kind == "backend":
        seeds = _diverging(found, graph)
        check = partial(fault_on, backend)
        found.minimised = minimise(graph, seeds, fault, check, case, seconds=seconds)
    else:
        rule = found.culprit
        seeds = _matched(rule, graph, found.location) if isinstance(rule, Rewrite) else _at(found.location, graph)
        end = time.monotonic() + seconds
        for p in suspects:
            small = minimise(graph, seeds, fault, partial(fault_of, p), case, seconds=end - time.monotonic())
            if small is not None:
                found.minimised, found.shown_by = small, p
                break
    if found.minimised is None:
        found.notices.append("no part of the graph shows the fault by itself")
        return
    found.path = folder / "culprit.ir" if folder is not None else None
    _describe(found, backend)
    if found.path is None:
        found.notices.append("moec.bisect(…, out=folder) saves the minimised graph as culprit.ir")
    else:
        what = f"{found.kind} {found.name} ({found.source})" if found.source else f"{found.kind} {found.name}"
        header = f"{what}\n{found.minimised.fault.kind}: {found.minimised.fault}\n{found.repro}"
        save_graph(found.minimised.graph, found.path, found.minimised.inputs, header)


def _describe(found: Culprit, backend: Backend) -> None:
    """Set `found.repro`: a command where text names the pass or backend, else Python."""
    path = str(found.path or "culprit.ir")
    call = f"moec.bisect(*moec.graph_file.load_graph({path!r}), "
    if found.shown_by is None:
        try:
            get_backend(backend.name)
            found.repro = f"moec bisect {shlex.quote(path)} --no-default --backend {backend.name}"
        except ArgumentValueError:
            found.repro = call + "passes=moec.passes.Pipeline(), backend=…)"
            found.notices.append("the repro is Python: the backend is none of moec's, write it in place of …")
        return
    try:
        if isinstance(found.shown_by, Analysis):
            raise ArgumentValueError("--pass takes no analyses")
        found.repro = f"moec bisect {shlex.quote(path)} --pass {shlex.quote(print_pass(found.shown_by))}"
    except ArgumentValueError as e:
        shown = repr(found.shown_by)
        short = shown if len(shown) < _LONG and "\n" not in shown else f"{type(found.shown_by).__name__}(…)"
        found.repro = call + f"passes=moec.passes.Pipeline([{short}]))"
        found.notices.append(f"the repro is Python, to be run where the class is defined: {e.message}")


def _at(location: Location, graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if location and n.location == location]


def _diverging(found: Culprit, graph: Graph) -> list[Node]:
    """The node of `graph` that a divergence is at; it may have been found in a copy."""
    if found.divergence is None:
        return _at(found.location, graph)
    node = found.divergence.node
    twins = [n for n in graph.nodes if n.op == node.op and n.location == node.location]
    return [n for n in twins if n.results[0].origins & node.results[0].origins] or twins


def _matched(rule: Rewrite, graph: Graph, location: Location) -> list[Node]:
    """The nodes that the rule matches at a location (anywhere, where it matches nowhere there)."""
    try:
        patterns = compiled_patterns(rule)
    except CompileError:  # that is what is wrong with it
        return []
    anywhere: list[Node] = []
    for pattern in patterns:
        for node in graph.find(pattern.roots[0].node.opdef.name, unique=True):
            for bindings in Matcher(pattern).at(node):
                m = Match(bindings, pattern)
                if m.location == location:
                    return list(m.nodes)
                anywhere = anywhere or list(m.nodes)
    return anywhere
