"""`moec.compare`: the same program on several backends, and where they first part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from moec.backends import Backend, get_backend
from moec.compiled import CompiledModel
from moec.difference import Difference, difference
from moec.ir import ArgumentValueError, Graph, Node, Placement, Quantization, Value, run
from moec.ir.interpreter import sizes_of
from moec.isolated import NodeResult, compare_nodes
from moec.matching import corresponding
from moec.passes.base import Pass
from moec.passes.pipeline import Pipeline, build_pipeline
from moec.program import Program, Settings, finish, run_passes
from moec.progress import progress
from moec.routing import RoutingFlip, flips
from moec.sources import acquire
from moec.tolerance import Bound, end_to_end, scale_of

Step = Callable[[str], None]


@dataclass(frozen=True)
class OutputResult:
    """One output of one backend against the first backend's."""

    backend: str
    output: str
    difference: Difference


@dataclass(frozen=True)
class Divergence:
    """The first node, in the order of the reference's graph, whose value is out of tolerance."""

    backend: str
    node: Node
    location: str
    error: float
    tolerance: float
    why: str

    def __str__(self) -> str:
        return (
            f"{self.backend} first diverges at {self.node.op} ({self.location}): error {self.error:.3g}, "
            f"tolerance {self.tolerance:.3g} ({self.why})"
        )


@dataclass(eq=False)
class Comparison:
    """What `moec.compare` found. `outputs` holds a row per backend and output; `nodes` a row per backend and node
    where nodes were compared in isolation; `routing_flips` the tokens that chose other experts."""

    reference: str
    isolated: bool
    outputs: list[OutputResult] = field(default_factory=list)
    nodes: list[NodeResult] = field(default_factory=list)
    routing_flips: list[RoutingFlip] = field(default_factory=list)
    first_divergence: Divergence | None = None
    fallbacks: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether everything judged is in tolerance: the nodes where isolated, else the outputs; and every routing
        flip is a near tie."""
        judged = all(n.ok for n in self.nodes) if self.isolated else all(o.difference.ok for o in self.outputs)
        return judged and all(f.near_tie for f in self.routing_flips)

    def __str__(self) -> str:
        from moec.comparison_table import render

        return render(self)


@dataclass(eq=False)
class _Contender:
    name: str
    settings: Settings | None
    program: Program | None
    call: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]


def compare(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    backends: Sequence[str | Backend | CompiledModel] = ("reference", "onnxruntime"),
    dynamic_shapes: Any = None,
    passes: Iterable[Pass] | Pipeline | None = None,
    quantize: str | Quantization | None = None,
    placement: Placement | None = None,
    fallback: str = "error",
    threads: int | None = None,
    isolated: bool | None = None,
) -> Comparison:
    """Run a model on several backends and compare each with the first.

    model, args, kwargs, dynamic_shapes, passes, quantize, placement, fallback, threads: as in `moec.compile`; every
    backend runs the graph after the same passes. For a Graph, args are the tensors of its inputs.
    backends: at least two of: a name, a Backend, a CompiledModel (compiled from this model at these arguments), or
    "eager" for the model itself in PyTorch.
    isolated: False compares end to end: outputs, and values inside at points that both graphs have, in order, to find
    the first divergence. True feeds every node the reference's operands and compares its results, which is how FP8 is
    judged. None chooses True for graphs that quantise activations, else False.

    Tolerances come from dtype and reduction length (`moec.tolerance`). Tokens whose experts differ are reported with
    their margin; where that is a near tie, the reference is run again with the other backend's experts, so that the
    comparison goes on past them. Raises CompileError.
    """
    if isinstance(backends, str | Backend | CompiledModel) or len(backends) < 2:
        raise ArgumentValueError(f"backends={backends!r} must be at least two", code="arguments")
    with progress("compare") as step:
        step("trace")
        example, named = ((), None) if isinstance(model, Graph) else (args, kwargs)
        graph, signature = acquire(model, example, named, dynamic_shapes)
        inputs = signature.flatten(args, kwargs)
        pipeline = build_pipeline(passes, quantize, placement)
        base = Settings(get_backend("reference"), pipeline, fallback, threads)
        after, _ = run_passes(graph, base, step)
        contenders = [
            _contender(b, model, (args, kwargs or {}), signature.outputs, after, base, step) for b in backends
        ]
        if isolated is None:
            isolated = any(node.op == "quant.quantize" or _quantises_inside(node) for node in after.nodes)
        first = contenders[0]
        comparison = Comparison(first.name, isolated)
        expected = first.call(inputs)
        bounds = _output_bounds(after, inputs)
        for other in contenders[1:]:
            step(f"run {other.name}")
            got, pinned = other.call(inputs), expected
            if other.program is not None:
                comparison.fallbacks[other.name] = len(other.program.fallbacks)
            if isolated:
                if other.settings is not None:
                    comparison.nodes += compare_nodes(after, inputs, other.settings, step)
            elif first.program is not None and other.program is not None:
                divergence, found, repinned = _localise(first.program, other.name, other.program, inputs)
                comparison.routing_flips += found
                comparison.first_divergence = comparison.first_divergence or divergence
                pinned = repinned if repinned is not None else expected
            for name, bound, e, g in zip(after.output_names, bounds, pinned, got, strict=True):
                comparison.outputs.append(
                    OutputResult(other.name, name, difference(e, g, bound, scale_of(e, None, {})))
                )
    if comparison.first_divergence is None:
        comparison.first_divergence = _worst_node(comparison.nodes)
    return comparison


def _quantises_inside(node: Node) -> bool:
    return node.op == "quant.scaled_experts" and node.attrs["group"] is not None


def _output_bounds(graph: Graph, inputs: Sequence[torch.Tensor]) -> list[Bound]:
    bounds = end_to_end(graph, sizes_of(graph, inputs))
    return [bounds.get(v, Bound(0.0, "a weight")) for v in graph.outputs]


def _contender(
    backend: Any, model: Any, call: tuple[Any, Any], leaves: Sequence[Any], after: Graph, base: Settings, step: Step
) -> _Contender:
    if isinstance(backend, CompiledModel):
        program = backend.program
        shapes = [[v.type for v in g.inputs] for g in (after, program.graph)]
        if shapes[0] != shapes[1] or program.graph.output_names != after.output_names:
            raise ArgumentValueError(
                f"{backend!r} was compiled with inputs {', '.join(map(str, shapes[1]))}, the model has "
                f"{', '.join(map(str, shapes[0]))} here",
                code="arguments",
                hint="compile the model at the same arguments and dynamic_shapes",
            )
        return _Contender(f"compiled {backend.backend}", backend.settings, program, program.executable.run)
    if backend == "eager":
        if not isinstance(model, torch.nn.Module):
            raise ArgumentValueError(f"'eager' needs a torch.nn.Module, got {type(model).__name__}", code="arguments")
        return _Contender("eager", None, None, lambda _: _eager(model, call, leaves))
    settings = replace(base, backend=get_backend(backend))
    program = finish(after, settings, step)
    return _Contender(settings.backend.name, settings, program, program.executable.run)


def _eager(model: torch.nn.Module, call: tuple[Any, Any], leaves: Sequence[Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        flat = pytree.tree_leaves(model(*call[0], **call[1]))
    found = {i: value for (kind, i), value in zip(leaves, flat, strict=True) if kind == "tensor"}
    found |= {i: torch.tensor(value) for (kind, i), value in zip(leaves, flat, strict=True) if kind == "size"}
    return [found[i] for i in sorted(found)]


def _localise(
    mine: Program, name: str, theirs: Program, inputs: list[torch.Tensor]
) -> tuple[Divergence | None, list[RoutingFlip], list[torch.Tensor] | None]:
    """(first divergence, routing flips, the reference's outputs with near-tied routing pinned to the other's)."""
    pairs = corresponding(mine.legal, theirs.legal)
    other = theirs.executable.tap(inputs, list(dict.fromkeys(pairs.values())))
    bounds = end_to_end(mine.legal, sizes_of(mine.legal, inputs))
    found: list[RoutingFlip] = []
    pins: dict[Value, torch.Tensor] = {}
    pinned_outputs: list[torch.Tensor] | None = None
    reference = _tap_all(mine, inputs)
    for node in [n for n in mine.legal.nodes if n.op == "moe.route"]:
        experts = node.results[1]
        if experts not in pairs or pairs[experts] not in other or mine.executable.graph is not mine.legal:
            continue
        chosen = other[pairs[experts]]
        if torch.equal(reference[experts], chosen):
            continue
        logits = node.operand("logits")
        bias = node.operand("bias")
        bias_values = None if bias is None else (bias.weight.load() if bias.weight is not None else reference[bias])
        tolerance = 2 * bounds[logits].relative * max(1.0, scale_of(reference[logits], None, {}))
        new = flips(name, node, reference[logits], bias_values, reference[experts], chosen, tolerance)
        found += new
        if all(f.near_tie for f in new) and pairs.get(node.results[0]) in other:
            pins |= {r: other[pairs[r]] for r in node.results}
            reference, pinned_outputs = _run_pinned(mine.legal, inputs, pins)
    for node in mine.legal.nodes:
        for v in node.results:
            if v not in pairs or pairs[v] not in other or v in pins:
                continue
            d = difference(reference[v], other[pairs[v]], bounds[v], scale_of(reference[v], node, reference))
            if not d.ok and not _is_view_of_pinned(node, pins):
                where = node.location.describe()
                return Divergence(name, node, where, d.max_error, d.tolerance, d.why), found, pinned_outputs
    return None, found, pinned_outputs


def _is_view_of_pinned(node: Node, pins: Mapping[Value, torch.Tensor]) -> bool:
    return node.op == "moe.route" and any(r in pins for r in node.results)


def _tap_all(program: Program, inputs: list[torch.Tensor]) -> dict[Value, torch.Tensor]:
    values = [*program.legal.inputs, *(r for n in program.legal.nodes for r in n.results)]
    seen = program.executable.tap(inputs, values)
    return {**dict(zip(program.legal.inputs, inputs, strict=True)), **seen}


def _run_pinned(
    graph: Graph, inputs: list[torch.Tensor], pins: Mapping[Value, torch.Tensor]
) -> tuple[dict[Value, torch.Tensor], list[torch.Tensor]]:
    seen: dict[Value, torch.Tensor] = {}

    def tap(value: Value, tensor: torch.Tensor) -> torch.Tensor | None:
        seen[value] = pins.get(value, tensor)
        return pins.get(value)

    return seen, run(graph, inputs, tap=tap)


def _worst_node(nodes: Sequence[NodeResult]) -> Divergence | None:
    for n in nodes:
        if not n.ok:
            d = n.difference
            return Divergence(n.backend, n.node, n.location, d.max_error, d.tolerance, n.problem or d.why)
    return None
