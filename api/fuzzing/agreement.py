"""A backend against the reference on one graph, end to end and node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.backends import Backend, get_backend
from moec.comparing.nodes import isolate
from moec.difference import difference
from moec.fuzzing.outcome import Broken, Outcome
from moec.fuzzing.spread import spread
from moec.ir import CompileError, Graph, Node, TensorType, Value
from moec.ir.arrays import copied
from moec.ir.interpreter import bind_inputs, evaluate_attr
from moec.ir.interpreter import run as evaluate_graph
from moec.ir.runtime_sizes import measured
from moec.passes import Pipeline
from moec.program import Settings, legalise, lower
from moec.tolerance import end_to_end, one_node, scale_of


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = (a == b) | ((a != a) & (b != b)) if a.dtype.itemsize > 1 else a.view(torch.uint8) == b.view(torch.uint8)
    return a.shape == b.shape and a.dtype == b.dtype and bool(same.all())


def check_backend(
    graph: Graph, inputs: Sequence[torch.Tensor], backend: str | Backend, options: Mapping[str, Any] | None = None
) -> Outcome:
    """The backend agrees with the reference: end to end within the bounds of `moec.tolerance`, or, where rounding is
    magnified, within what the graph leaves open and node by node; only node by node behind what the backend adds up
    more coarsely."""
    target = get_backend(backend)
    settings = Settings(target, Pipeline(()), threads=1)
    try:
        legal, _, _ = legalise(graph, settings)
    except CompileError as e:
        if e.code == "unsupported-op" and e.message:
            return Outcome(skipped=e.message)
        return Outcome(Broken(f"{target.name}: legalise", f"[{e.code}] {e.message}"))
    expected = evaluate_graph(graph, inputs)
    before = [copied(t) for t in inputs]
    try:
        executable = target.compile(legal, threads=1, options=options) if options else lower(legal, settings, [])
        got = executable.run(inputs)
    except CompileError as e:
        return Outcome(Broken(f"{target.name}: {e.code}", e.message))
    if not all(identical(a, b) for a, b in zip(before, inputs, strict=True)):
        return Outcome(Broken(f"{target.name}: inputs", "a run changes its inputs"))
    values: dict[Value, torch.Tensor] = {}
    evaluate_graph(graph, inputs, tap=lambda v, t: values.update({v: t}))
    binding = measured(values, graph, bind_inputs(graph, inputs))
    doubtful = undefined(graph, values, binding)
    coarse = behind_coarse(graph, target)
    bounds = end_to_end(graph, binding)
    open_: Any = "not asked"
    note = ""
    for i, (v, name) in enumerate(zip(graph.outputs, graph.output_names, strict=True)):
        want, tensor = expected[i], got[i]
        if v in doubtful:
            continue
        if want.shape != tensor.shape or want.dtype != tensor.dtype:
            what = f"{TensorType.of(tensor)}, expected {TensorType.of(want)}"
            return Outcome(Broken(f"{target.name}: type", f"output {name!r} is {what}"))
        if v.weight is not None:
            bound, scale = None, 0.0
            if not identical(want, tensor):
                return Outcome(Broken(f"{target.name}: numbers", f"output {name!r}, a weight, is another"))
            continue
        if v in coarse:
            continue
        bound, scale = bounds[v], scale_of(want, v.producer, values)
        d = difference(want, tensor, bound, scale)
        if d.ok:
            continue
        note = "what the graph leaves open"
        if open_ == "not asked":
            open_ = spread(graph, inputs)
        if open_ is not None and not open_[i].explains(want, tensor, d.tolerance):
            return Outcome(
                Broken(
                    f"{target.name}: numbers",
                    f"output {name!r} is off by {d.max_error:.3g}, bound {d.tolerance:.3g}, open {open_[i].size:.3g}"
                    f"\n  expected {_short(want)}\n  got      {_short(tensor)}",
                )
            )
    broken = None
    if note or target.name != "triton":
        broken = check_nodes(graph, values, binding, doubtful, settings)
    return Outcome(broken, note=note)


def check_nodes(
    graph: Graph,
    values: dict[Value, torch.Tensor],
    binding: Mapping[str, int],
    doubtful: set[Value],
    settings: Settings,
) -> Broken | None:
    """Every node on its own, fed with the reference's values, in one program."""
    nodes = [
        node
        for node in graph.nodes
        if node.op != "call.graph" and not doubtful.intersection(node.results) - set(_uncertain(node, doubtful))
    ]
    asked = [(node, r) for node in nodes for r in node.results]
    if not asked:
        return None
    name = settings.backend.name
    seen = _Seen(graph, values)
    try:
        whole, fed = isolate(nodes, seen, binding, settings.backend)
        legal, _, left = legalise(whole, settings)
        got = lower(legal, settings, left).run(fed)
    except CompileError as e:
        return Broken(f"{name}: nodes", f"[{e.code}] {e.message}")
    loaded = {v: seen.get(v) for v in (*values, *graph.weights.values())}
    for (node, v), tensor in zip(asked, got, strict=True):
        if v in doubtful:
            continue
        coarse = settings.backend.coarse_sums(node)
        if coarse is not None and not values[v].isfinite().all():  # what rounds its operands makes numbers of NaN
            continue
        bound = one_node(node, v, binding, coarse)
        d = difference(values[v], tensor, bound, 2 * scale_of(values[v], node, loaded))
        if not d.ok and not _open_node(node, v, loaded, binding, tensor, d.tolerance):
            given = ", ".join("_" if o is None else _short(loaded[o]) for o in node.operands)
            return Broken(
                f"{name}: {node.op}",
                f"off by {d.max_error:.3g}, tolerance {d.tolerance:.3g} ({d.why}) {node.attrs}\n  of {given}\n"
                f"  expected {_short(values[v])}\n  got      {_short(tensor)}",
            )
    return None


def behind_coarse(graph: Graph, backend: Backend) -> set[Value]:
    """Values that depend on a node which a backend adds up more coarsely than f32."""

    def is_coarse(node: Node) -> bool:
        inner = graph.functions[node.attrs["callee"]].nodes if node.op == "call.graph" else ()
        return backend.coarse_sums(node) is not None or any(map(is_coarse, inner))

    found: set[Value] = set()
    for node in graph.nodes:
        if any(v in found for v in node.operands if v is not None) or is_coarse(node):
            found.update(node.results)
    return found


@dataclass(frozen=True)
class _Seen:
    """The values of a run in memory, as `isolate` wants them."""

    graph: Graph
    tensors: Mapping[Value, torch.Tensor]

    def get(self, v: Value) -> torch.Tensor:
        return v.weight.load() if v.weight is not None else self.tensors[v]

    def type(self, v: Value) -> TensorType:
        return TensorType.of(self.get(v))


def _open_node(
    node: Node,
    v: Value,
    values: Mapping[Value, torch.Tensor],
    binding: Mapping[str, int],
    got: torch.Tensor,
    tolerance: float,
) -> bool:
    """Whether a node that is off is so where it overflows on the way, say."""
    assert node.graph is not None
    single, fed = isolate([node], _Seen(node.graph, values), binding)
    open_ = spread(single, fed)
    return open_ is None or open_[v.index].explains(values[v], got, tolerance)


def _uncertain(node: Node, doubtful: set[Value]) -> list[Value]:
    """Results that are doubtful because an operand is."""
    return list(node.results) if any(v in doubtful for v in node.operands if v is not None) else []


def undefined(
    graph: Graph,
    values: Mapping[Value, torch.Tensor],
    binding: Mapping[str, int],
    functions: Mapping[str, Graph] | None = None,
) -> set[Value]:
    """Values that depend on a result which its op does not promise (`OpDef.undefined`)."""
    functions = graph.functions if functions is None else functions
    found: set[Value] = set()
    for node in graph.nodes:
        operands = [
            None if v is None else v.weight.load() if v.weight is not None else values[v] for v in node.operands
        ]
        if any(v in found for v in node.operands if v is not None) or _undefined(node, operands, binding, functions):
            found.update(node.results)
    return found


def _undefined(node: Node, operands: Sequence[Any], binding: Mapping[str, int], functions: Mapping[str, Graph]) -> bool:
    if node.op == "call.graph":
        callee = functions[node.attrs["callee"]]
        inner: dict[Value, torch.Tensor] = {}
        evaluate_graph(callee, operands, tap=lambda v, t: inner.update({v: t}), functions=functions)
        sizes = measured(inner, callee, bind_inputs(callee, operands))
        return bool(undefined(callee, inner, sizes, functions).intersection(callee.outputs))
    attrs = {k: evaluate_attr(a, binding) for k, a in node.attrs.items()}
    return node.opdef.undefined(operands, attrs)


def _short(t: torch.Tensor) -> str:
    return f"{TensorType.of(t)} {t.flatten()[:8].tolist()}{' …' if t.numel() > 8 else ''}"
