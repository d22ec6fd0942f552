"""Running one contender: its outputs, then values inside, to a store; or nodes by themselves."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence

import torch

from moec.backends import Executable
from moec.comparing.matching import corresponding
from moec.comparing.nodes import NodeResult, compare_nodes
from moec.comparing.store import Values
from moec.difference import Difference, difference
from moec.ir import Graph, Node, Value, run
from moec.ir.interpreter import bind_inputs
from moec.ir.runtime_sizes import runtime_symbols
from moec.program import Settings
from moec.tolerance import Tolerance, end_to_end, given_bound, scale_of

Step = Callable[[str], None]


def run_program(
    executable: Executable,
    inputs: Sequence[torch.Tensor],
    taps: Sequence[Value],
    values: Values,
    order: Sequence[int] | None = None,
) -> None:
    """The outputs of a plain run, and `taps` of further ones, to `values` (of the executable's graph). order: which
    outputs to keep as the first, second, …; None: as they come."""
    outputs = executable.run(inputs)
    for i, k in enumerate(range(len(outputs)) if order is None else order):
        values.store.put(f"output{i}", outputs[k])
    for v, t in zip(executable.graph.inputs, inputs, strict=True):
        values.put(v, t)
    if taps:
        executable.stream(inputs, taps, values.put)


def run_reference(
    graph: Graph,
    inputs: Sequence[torch.Tensor],
    values: Values,
    replacing: Callable[[Value, torch.Tensor], torch.Tensor | None] = lambda value, tensor: None,
) -> None:
    """Every value of one run in the interpreter, and the outputs. `replacing` may put others in their place."""

    def keep(value: Value, tensor: torch.Tensor) -> torch.Tensor | None:
        other = replacing(value, tensor)
        values.put(value, tensor if other is None else other)
        return other

    for i, tensor in enumerate(run(graph, inputs, tap=keep)):
        values.store.put(f"output{i}", tensor)


def run_tuned(
    tuned: Graph, inputs: Sequence[torch.Tensor], plain: Values, values: Values, tolerance: Tolerance
) -> list[tuple[Node, Difference]]:
    """Hold what a backend's tuning made of a graph against the graph itself, both in the interpreter.

    plain: the values of the graph. A value that both have is compared and goes on as it is in `plain`, so that an error
    shows where it is made and nowhere after. Puts the values of `tuned` to `values`; returns the nodes of the plain
    graph in the order of the tuned one.
    """
    bounds = end_to_end(plain.graph, binding_of(plain))
    same = {yours: mine for mine, yours in corresponding(plain.graph, tuned, by_place=False).items() if mine in plain}
    found: list[tuple[Node, Difference]] = []

    def hold(value: Value, tensor: torch.Tensor) -> torch.Tensor | None:
        mine = same.get(value)
        if mine is None or mine.producer is None:
            return None
        expected, node = plain.get(mine), mine.producer
        operands = {v: plain.get(v) for v in node.operands if v is not None and v in plain}
        bound = given_bound(bounds[mine], tolerance, node)
        found.append((node, difference(expected, tensor, bound, scale_of(expected, node, operands))))
        return expected.to(tensor.dtype) if expected.shape == tensor.shape else None

    run_reference(tuned, inputs, values, hold)
    return found


def run_nodes(
    values: Values,
    nodes: Sequence[Node],
    settings: Settings,
    tolerance: Tolerance,
    step: Step = lambda name: None,
    moves: bool = False,
) -> list[NodeResult]:
    """See `compare_nodes`; the sizes are those that the values have."""
    return compare_nodes(values, nodes, settings, binding_of(values), tolerance, step, moves)


def binding_of(values: Values) -> dict[str, int]:
    """The dim symbols of a graph by its values: those of inputs, and those that only a run gives."""
    graph = values.graph
    binding = bind_inputs(graph, [values.get(v) for v in graph.inputs])
    for symbol, (value, axis) in runtime_symbols(graph).items():
        if value in values:
            size = values.type(value).shape[axis]
            assert isinstance(size, int)
            binding[symbol] = size
    return binding


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
