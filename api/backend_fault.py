"""What a backend does wrong to a graph that every pass left right."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moec.backends import Backend
from moec.comparing import Comparison, compare
from moec.culprit import Culprit
from moec.ir import CompileError, Graph, Location
from moec.ir.equivalence import Oracle
from moec.judging import Fault
from moec.passes.pipeline import Pipeline


def compared(backend: Backend, graph: Graph, inputs: Sequence[torch.Tensor]) -> Comparison | Fault:
    """The graph on the backend against the reference, or how the backend refuses it."""
    try:
        return compare(graph, inputs, backends=("reference", backend), passes=Pipeline(()))
    except CompileError as e:
        return Fault("crash", e.message, location=e.location or Location())


def fault_on(backend: Backend, graph: Graph, inputs: Sequence[torch.Tensor] | None = None) -> Fault | None:
    """What the backend does wrong to a graph, on the given inputs or on seeded ones of several sizes."""
    cases = [inputs] if inputs is not None else [c.inputs for c in Oracle(graph).cases if c.pin is None]
    for case in cases:
        comparison = compared(backend, graph, case)
        if isinstance(comparison, Fault):
            return comparison
        if not comparison.ok:
            return _out_of_tolerance(backend, comparison)
    return None


def blame(backend: Backend, graph: Graph, inputs: Sequence[torch.Tensor]) -> Culprit:
    """The backend as the culprit, with the first node at which it diverges, where it is one."""
    comparison = compared(backend, graph, inputs)
    if isinstance(comparison, Fault):
        return Culprit("backend", backend=backend.name, fault=comparison, location=comparison.location, before=graph)
    if comparison.ok:
        return Culprit("none")
    divergence = comparison.first_divergence
    return Culprit(
        "backend",
        backend=backend.name,
        divergence=divergence,
        fault=_out_of_tolerance(backend, comparison),
        location=divergence.node.location if divergence is not None else Location(),
        before=graph,
    )


def _out_of_tolerance(backend: Backend, comparison: Comparison) -> Fault:
    text = str(comparison.first_divergence or f"outputs of {backend.name} are out of tolerance")
    return Fault("numbers", text)
