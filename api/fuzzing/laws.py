"""The laws that every graph obeys, whatever it computes: text, copies, passes, and backends against the reference."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from moec.fuzzing.agreement import check_backend, identical, undefined
from moec.fuzzing.graphs import Run
from moec.fuzzing.outcome import Broken, Outcome
from moec.fuzzing.spread import spread
from moec.graph_text import canonical_text
from moec.ir import CompileError, Graph, Value, parse
from moec.ir.compare import difference as structural_difference
from moec.ir.equivalence import Difference, Oracle
from moec.ir.interpreter import bind_inputs
from moec.ir.interpreter import run as evaluate_graph
from moec.ir.runtime_sizes import measured
from moec.judging import attempt
from moec.passes import Pass, default_pipeline
from moec.passes.pipeline import run_pass


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
        if not identical(a, b):
            return Outcome(Broken("text", f"output {name!r} of the graph that was read is another"))
    return Outcome()


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
    if identical(want, got):
        return True
    open_ = spread(before, apart.case.inputs)
    return open_ is not None and open_[i].explains(want, got, 0.0)


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
