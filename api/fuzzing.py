"""The laws that every graph obeys, whatever it computes: text, copies, passes, and backends against the reference."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.backends import Backend, get_backend
from moec.comparing.nodes import isolate
from moec.difference import difference
from moec.graph_text import canonical_text
from moec.ir import CompileError, Graph, Node, TensorType, Value, parse
from moec.ir.compare import difference as structural_difference
from moec.ir.equivalence import Difference, Oracle
from moec.ir.interpreter import bind_inputs, evaluate_attr
from moec.ir.interpreter import run as evaluate_graph
from moec.ir.runtime_sizes import measured
from moec.judging import attempt
from moec.passes import Pass, Pipeline, default_pipeline
from moec.passes.pipeline import run_pass
from moec.program import Settings, legalise, lower
from moec.random_graphs import Run
from moec.spread import spread
from moec.tolerance import end_to_end, one_node, scale_of


@dataclass(frozen=True)
class Broken:
    """A law that a graph breaks. `law` is the same for the same kind of mistake."""

    law: str
    message: str

    def __str__(self) -> str:
        return f"{self.law}: {self.message}"


@dataclass(frozen=True)
class Outcome:
    """`broken` is None where the law holds; `skipped` says why it could not be asked; `note`: how it was decided."""

    broken: Broken | None = None
    skipped: str | None = None
    note: str = ""


def of_choice() -> tuple[Pass, ...]:
    """Passes that keep the meaning and that the default pipeline lacks."""
    from moec.passes import AbsorbMLA, AppendSharedExperts, FoldNormWeight, FoldScales, MergeLinears, MergeSharedExperts

    return (
        AbsorbMLA(dynamic=True), MergeLinears(), FoldScales(), FoldNormWeight(), MergeSharedExperts(),
        AppendSharedExperts(),
    )  # fmt: skip


# -- the IR ------------------------------------------------------------------------------------------


def check_ir(case: Run) -> Outcome:
    """Text comes back equal and means the same to the last bit; a clone is equal."""
    graph = case.graph
    text = str(graph)
    try:
        read = parse(text)
    except CompileError as e:
        return Outcome(Broken("text", f"it is not read back: {e.message}"))
    reason = structural_difference(graph, read)
    if reason is None and str(read) != text:
        reason = "it prints otherwise when it was read"
    if reason is not None:
        return Outcome(Broken("text", reason))
    if (reason := structural_difference(graph, graph.clone())) is not None:
        return Outcome(Broken("clone", reason))
    for name, g in {"": graph, **graph.functions}.items():
        copy = read.functions[name] if name else read
        copy.bind_weights({n: v.weight for n, v in g.weights.items() if v.weight is not None})
    for name, a, b in zip(
        graph.output_names, evaluate_graph(graph, case.inputs), evaluate_graph(read, case.inputs), strict=True
    ):
        if not _identical(a, b):
            return Outcome(Broken("text", f"output {name!r} of the graph that was read is another"))
    return Outcome()


def _identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = (a == b) | ((a != a) & (b != b)) if a.dtype.itemsize > 1 else a.view(torch.uint8) == b.view(torch.uint8)
    return a.shape == b.shape and a.dtype == b.dtype and bool(same.all())


# -- passes ------------------------------------------------------------------------------------------


def check_passes(case: Run, extra: Sequence[Pass] = ()) -> tuple[Outcome, Graph | None]:
    """Each pass of the default pipeline, and then each of `extra`, keeps the meaning, leaves its input alone and
    changes nothing when run again. Returns the graph after the default pipeline too, where they do."""
    graph = case.graph
    oracle = _oracle(case)
    if isinstance(oracle, Broken):
        return Outcome(oracle), None
    seen = {canonical_text(graph)}
    for p in default_pipeline().passes:
        found = _check_pass(p, graph, oracle, seen)
        if isinstance(found, Broken):
            return Outcome(found), None
        graph = found
    for p in extra:
        found = _check_pass(p, graph, oracle, seen)
        if isinstance(found, Broken):
            return Outcome(found), None
    return Outcome(), graph


def check_random(pass_: Pass, graph: Graph) -> Graph:
    """As `moec.testing.check_pass`, for graphs that no model has: outputs may be NaN or empty, routers are not asked
    about ties, and differences count where they exceed what rounding leaves open. Returns the result; raises
    AssertionError with the law that is broken."""
    oracle = Oracle(graph, pins=False)
    found = _check_pass(pass_, graph, oracle, {canonical_text(graph)})
    if isinstance(found, Broken):
        raise AssertionError(f"{found}\n{graph}")
    return found


def _oracle(case: Run) -> Oracle | Broken:
    """On seeded inputs, or on those of the run where the graph takes few sizes."""
    try:
        return Oracle(case.graph, pins=False)
    except CompileError:
        try:
            return Oracle(case.graph, inputs=case.inputs, pins=False)
        except CompileError as e:
            return Broken("float64", e.message)


def _check_pass(p: Any, graph: Graph, oracle: Oracle, seen: set[str]) -> Graph | Broken:
    result, fault = attempt(p, graph)
    if result is None or fault is not None:
        assert fault is not None
        return Broken(f"pass {p.name}: {fault.kind}", fault.message)
    text = canonical_text(result)
    if text in seen:
        return result
    seen.add(text)
    apart = oracle.difference(result)
    if apart is not None and not _left_open(graph, result, apart):
        return Broken(f"pass {p.name}: {'numbers' if apart.output else 'meaning'}", str(apart))
    try:
        again, _ = run_pass(p, result)
    except CompileError as e:
        return Broken(f"pass {p.name}: again", e.message)
    if canonical_text(again) != text:
        return Broken(f"pass {p.name}: again", "it changes its own result")
    return result


def _left_open(before: Graph, after: Graph, apart: Difference) -> bool:
    """Whether a difference that shows in float64 is within what the graph leaves open in its own dtypes."""
    if apart.output is None or apart.case is None or apart.case.pin is not None:
        return False
    i = before.output_names.index(apart.output)
    values: dict[Value, torch.Tensor] = {}
    evaluate_graph(before, apart.case.inputs, tap=lambda v, t: values.update({v: t}))
    sizes = measured(values, before, bind_inputs(before, apart.case.inputs))
    if before.outputs[i] in undefined(before, values, sizes):
        return True
    want, got = (evaluate_graph(g, apart.case.inputs)[i] for g in (before, after))
    if _identical(want, got):
        return True
    open_ = spread(before, apart.case.inputs)
    return open_ is not None and open_[i].explains(want, got, 0.0)


# -- backends ----------------------------------------------------------------------------------------


def check_backend(
    graph: Graph, inputs: Sequence[torch.Tensor], backend: str | Backend, options: Mapping[str, Any] | None = None
) -> Outcome:
    """The backend agrees with the reference: end to end within the bounds of `moec.tolerance`, or, where rounding is
    magnified, within what the graph leaves open and node by node."""
    target = get_backend(backend)
    settings = Settings(target, Pipeline(()), threads=1)
    try:
        legal, _, _ = legalise(graph, settings)
    except CompileError as e:
        if e.code == "unsupported-op" and e.message:
            return Outcome(skipped=e.message)
        return Outcome(Broken(f"{target.name}: legalise", f"[{e.code}] {e.message}"))
    expected = evaluate_graph(graph, inputs)
    before = [t.clone() for t in inputs]
    try:
        executable = target.compile(legal, threads=1, options=options) if options else lower(legal, settings, [])
        got = executable.run(inputs)
    except CompileError as e:
        return Outcome(Broken(f"{target.name}: {e.code}", e.message))
    if not all(_identical(a, b) for a, b in zip(before, inputs, strict=True)):
        return Outcome(Broken(f"{target.name}: inputs", "a run changes its inputs"))
    values: dict[Value, torch.Tensor] = {}
    evaluate_graph(graph, inputs, tap=lambda v, t: values.update({v: t}))
    binding = measured(values, graph, bind_inputs(graph, inputs))
    doubtful = undefined(graph, values, binding)
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
            if not _identical(want, tensor):
                return Outcome(Broken(f"{target.name}: numbers", f"output {name!r}, a weight, is another"))
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
        whole, fed = isolate(nodes, seen, binding)  # type: ignore[arg-type]  # what it asks of values
        legal, _, left = legalise(whole, settings)
        got = lower(legal, settings, left).run(fed)
    except CompileError as e:
        return Broken(f"{name}: nodes", f"[{e.code}] {e.message}")
    loaded = {v: seen.get(v) for v in (*values, *graph.weights.values())}
    for (node, v), tensor in zip(asked, got, strict=True):
        if v in doubtful:
            continue
        bound = one_node(node, v, binding)
        d = difference(values[v], tensor, bound, 2 * scale_of(values[v], node, loaded))
        if not d.ok and not _open_node(node, v, loaded, binding, tensor, d.tolerance):
            given = ", ".join("_" if o is None else _short(loaded[o]) for o in node.operands)
            return Broken(
                f"{name}: {node.op}",
                f"off by {d.max_error:.3g}, tolerance {d.tolerance:.3g} ({d.why}) {node.attrs}\n  of {given}\n"
                f"  expected {_short(values[v])}\n  got      {_short(tensor)}",
            )
    return None


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
    single, fed = isolate([node], _Seen(node.graph, values), binding)  # type: ignore[arg-type]  # what it asks of values
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


# -- all of them -------------------------------------------------------------------------------------


def guarded(check: Callable[[], Outcome], what: str) -> Outcome:
    """`check()`, or what it raised as a broken law: no law may end in an exception."""
    try:
        return check()
    except Exception as e:  # whatever is raised is what is looked for
        frame = traceback.extract_tb(e.__traceback__)[-1]
        text = f"{type(e).__name__}: {e}" if not isinstance(e, CompileError) else f"[{e.code}] {e.message}"
        return Outcome(Broken(f"{what}: crash", f"{text} ({frame.filename.rsplit('/', 2)[-1]}:{frame.lineno})"))


def check_all(
    case: Run, *, portable: bool = False, triton: bool = False, choice: bool = True
) -> Iterator[tuple[str, Outcome]]:
    """(judge, outcome) for each of "reference" (text, copies, passes; those of choice too, if wanted), "onnxruntime"
    (with standard operators only, if `portable`) and, if wanted, "triton"."""
    before = str(case.graph)
    after: list[Graph | None] = [None]

    def reference() -> Outcome:
        found = check_ir(case)
        if found.broken is None:
            found, after[0] = check_passes(case, of_choice() if choice else ())
        if found.broken is None and str(case.graph) != before:
            found = Outcome(Broken("input graph", "it was changed"))
        return found

    yield "reference", guarded(reference, "reference")
    options = {"portable": True} if portable else None
    graphs = [case.graph]
    if after[0] is not None and structural_difference(case.graph, after[0]) is not None:
        graphs.append(after[0])

    def onnxruntime() -> Outcome:
        outcome = Outcome()
        for graph in graphs:
            found = check_backend(graph, case.inputs, "onnxruntime", options)
            outcome = found if found.broken or found.skipped or not outcome.note else outcome
            if found.broken:
                break
        return outcome

    yield "onnxruntime", guarded(onnxruntime, "onnxruntime")
    if triton:
        yield "triton", guarded(lambda: check_backend(graphs[-1], case.inputs, "triton"), "triton")
