"""Pipelines: passes in order, verified, timed and recorded; the default one is a readable list below."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moec.ir import ArgumentValueError, CompileError, Graph, Placement, Quantization
from moec.ir.compare import interface_difference
from moec.passes.base import Analysis, Pass, Record, active_record
from moec.passes.clean.canonicalise import Canonicalise
from moec.passes.clean.cleanup import CommonSubexpressions, DeadCode, FoldConstants
from moec.passes.clean.fold_scalars import FoldScalars
from moec.passes.clean.narrow_rows import NarrowRows
from moec.passes.clean.simplify_positions import SimplifyPositions
from moec.passes.clean.simplify_transposes import SimplifyTransposes
from moec.passes.dump import Dump
from moec.passes.fuse.fuse_attention import FuseAttention
from moec.passes.fuse.fuse_mlp import FuseMLP
from moec.passes.fuse.fuse_norm import FuseNorm
from moec.passes.fuse.fuse_rope import FuseRoPE
from moec.passes.moe.raise_moe import RaiseMoE
from moec.passes.moe.raise_unrolled import RaiseUnrolledExperts
from moec.passes.place import PlaceExperts
from moec.passes.quantize import QuantizeWeights
from moec.passes.rewrite import Rewrite, RuleError, limited, source_of
from moec.passes.rewriting.explain import explain
from moec.passes.stored_fp8 import UseStoredFP8


@dataclass(frozen=True)
class Phase:
    """A named part of a pipeline."""

    name: str
    passes: tuple[Pass | Analysis, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", _listed(self.passes))
        _check_passes(self.passes)


@dataclass(frozen=True)
class Pipeline:
    """Passes, analyses and phases of them, in order. Editing returns a new pipeline.

    Places are named by `Pass.name` or `Phase.name`; a pass that occurs in several phases by "phase.pass".
    """

    steps: tuple[Pass | Analysis | Phase, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _listed(self.steps))
        _check_passes([s for s in self.steps if not isinstance(s, Phase)])
        twice = {n for n in self.phases if self.phases.count(n) > 1}
        if twice:
            raise ArgumentValueError(f"two phases are called {', '.join(sorted(twice))}", code="pipeline")

    @property
    def phases(self) -> list[str]:
        return [s.name for s in self.steps if isinstance(s, Phase)]

    @property
    def passes(self) -> tuple[Pass | Analysis, ...]:
        """All passes in the order in which they run."""
        return tuple(p for _, p in self._flat())

    @property
    def names(self) -> list[str]:
        return [p.name for p in self.passes]

    def _flat(self) -> list[tuple[str, Pass | Analysis]]:
        """(phase or "", pass) in order."""
        flat: list[tuple[str, Pass | Analysis]] = []
        for s in self.steps:
            flat += [(s.name, p) for p in s.passes] if isinstance(s, Phase) else [("", s)]
        return flat

    # -- editing -----------------------------------------------------------------------------------

    def insert_before(self, name: str, *passes: Pass | Analysis) -> Pipeline:
        """With passes before a pass, in its phase, or before a phase. Raises ArgumentValueError."""
        return self._edit(name, lambda at: (*passes, at))

    def insert_after(self, name: str, *passes: Pass | Analysis) -> Pipeline:
        """With passes after a pass, in its phase, or after a phase. Raises ArgumentValueError."""
        return self._edit(name, lambda at: (at, *passes))

    def replace_pass(self, name: str, *passes: Pass | Analysis) -> Pipeline:
        """With passes in place of a pass or phase. Raises ArgumentValueError."""
        return self._edit(name, lambda at: passes)

    def extend_phase(self, name: str, *passes: Pass | Analysis) -> Pipeline:
        """With passes at the end of a phase. Raises ArgumentValueError."""
        if name not in self.phases:
            raise ArgumentValueError(
                f"no phase {name!r} in the pipeline",
                code="pipeline",
                hint=f"phases: {', '.join(self.phases) or 'none'}",
            )
        return self._edit(name, lambda phase: (replace(phase, passes=(*phase.passes, *passes)),))

    def drop(self, name: str) -> Pipeline:
        """Without every pass of that name ("phase.pass": without that one), or without that phase.
        Raises ArgumentValueError."""
        places = set(self._places(name))
        return self._rebuilt(lambda place, step: () if place in places else (step,))

    def append(self, *passes: Pass | Analysis) -> Pipeline:
        return replace(self, steps=(*self.steps, *passes))

    def _edit(self, name: str, change: Callable[[Any], tuple[Any, ...]]) -> Pipeline:
        places = self._places(name)
        if len(places) > 1:
            names = [f"{self.steps[i].name}.{name}" if k is not None else name for i, k in places]
            hint = f"say {' or '.join(names)}" if len({name, *names}) > len(names) else "edit its `steps`"
            raise ArgumentValueError(f"{name!r} occurs {len(places)} times in the pipeline", code="pipeline", hint=hint)
        return self._rebuilt(lambda place, step: change(step) if place == places[0] else (step,))

    def _rebuilt(self, change: Callable[[Any, Any], tuple[Any, ...]]) -> Pipeline:
        """Every pass and phase replaced by what `change` makes of its place and itself."""
        steps: list[Any] = []
        for i, s in enumerate(self.steps):
            for new in change((i, None), s):
                if isinstance(new, Phase) and new is s:
                    inner = [p for k, old in enumerate(s.passes) for p in change((i, k), old)]
                    new = replace(s, passes=tuple(inner))
                steps.append(new)
        return replace(self, steps=tuple(steps))

    def _places(self, name: str) -> list[tuple[int, int | None]]:
        """(step, index in the phase or None) of what is called `name`."""
        found: list[tuple[int, int | None]] = []
        for i, s in enumerate(self.steps):
            if s.name == name:
                found.append((i, None))
            elif isinstance(s, Phase):
                found += [(i, k) for k, p in enumerate(s.passes) if name in (p.name, f"{s.name}.{p.name}")]
        if not found:
            known = [*self.phases, *self.names]
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"passes: {', '.join(known)}"
            raise ArgumentValueError(f"no pass {name!r} in the pipeline", code="pipeline", hint=hint)
        return found

    # -- running -----------------------------------------------------------------------------------

    def run(
        self, graph: Graph, *, dump: str | Path | Dump | None = None, progress: Callable[[str], None] | None = None
    ) -> tuple[Graph, list[Record]]:
        """Run all passes, verifying after each. `dump` is a folder for numbered `.ir` files, a `.diff` for each
        pass that changed something, and `replay.html`, which steps through them; `progress` is called with each
        pass's name. Raises CompileError naming the pass that failed; the dump holds what came before."""
        out = Dump(Path(dump), graph) if isinstance(dump, str | Path) else dump
        records: list[Record] = []
        met: list[tuple[str, Graph]] = []  # by each pass, for as long as somebody may ask
        flat = list(self._flat())
        asking = [i for i, (phase, p) in enumerate(flat) if _explains_itself(p, phase)]
        for i, (phase, p) in enumerate(flat):
            if progress:
                progress(p.name)
            after, record = run_pass(p, graph)
            record.phase = phase
            again = any(r.name == p.name and r.fired for r in records)
            if _explains_itself(p, phase) and not (record.fired or again):
                assert isinstance(p, Rewrite)
                record.unfired = explain(p, graph) + _earlier(p, met)
            records.append(record)
            if out is not None:
                out.add(record, graph, after)
            if asking and i < asking[-1]:
                met.append((f"{phase}.{p.name}" if phase else p.name, graph))
            graph = after
        return graph, records


def _explains_itself(p: Pass | Analysis, phase: str | None) -> bool:
    """Whether the report says why it fired nowhere: a rule, but none of the default pipeline, where most find
    nothing."""
    ours = phase and type(p).__module__.startswith("moec.")
    return isinstance(p, Rewrite) and not ours and p.max != 0


def _earlier(rule: Rewrite, met: Sequence[tuple[str, Graph]]) -> str:
    """Where a rule that fired nowhere would have fired, had it stood before one of the passes."""
    for name, graph in reversed(met):
        try:
            with limited(1) as log:
                rule.run(DeadCode().run(graph))  # what a fusion left behind is no place
        except CompileError:  # it is about to be placed elsewhere; its mistakes are told there
            pass
        if log.applications:
            return f"\n  it matches before {name}: Pipeline.insert_before({name!r}, …) puts it there"
    return ""


def _listed(passes: Any) -> tuple[Any, ...]:
    """One pass alone is a list of it."""
    if isinstance(passes, str) or not isinstance(passes, Iterable):  # a class and a function are refused by name
        return (passes,)
    return tuple(passes)


def _check_passes(passes: Iterable[Any]) -> None:
    for p in passes:
        if isinstance(p, Pass | Analysis):
            continue
        hint = None
        if isinstance(p, str):
            hint = f"text is read by moec.passes.parse_passes({p!r})"
        elif isinstance(p, type) and issubclass(p, Pass | Analysis):
            hint = f"write {p.__name__}()"
        elif callable(p):
            hint = "a pass is an object of a class: class Mine(Pass) with def run(self, graph)"
        raise ArgumentValueError(f"{p!r} is not a Pass", code="pipeline", hint=hint)


def run_pass(p: Pass | Analysis, graph: Graph) -> tuple[Graph, Record]:
    """One pass with its record, its result verified, or one analysis, whose result is in the record. Raises
    CompileError naming the pass where it fails, changes its input, or returns no valid graph."""
    record = Record(p.name, nodes_before=len(graph))
    token = active_record.set(record)
    before = fingerprint(graph)
    start = time.perf_counter()
    try:
        result = p.run(graph)
        if fingerprint(graph) != before:
            raise CompileError("changed its input graph", code="pass", hint="work on graph.clone() and return that")
        if isinstance(p, Analysis):
            record.result, result = result, graph
        elif not isinstance(result, Graph):
            raise CompileError(
                f"returned {type(result).__name__}, not a Graph", code="pass", hint="is a return missing in run()?"
            )
        else:
            result.verify()
            _check_interface(graph, result)
    except CompileError as e:
        where = "" if isinstance(e, RuleError) else f" ({source_of(p)})"
        e.args = (f"pass {p.name}{where}: {e.message}",)
        e.message = e.args[0]
        raise
    except Exception as e:  # whatever the author's code raises is reported as the pass's
        message = f"pass {p.name} ({source_of(p)}): raised {type(e).__name__}: {e}"
        raise CompileError(message, code="pass") from e
    finally:
        active_record.reset(token)
    record.seconds = time.perf_counter() - start
    record.nodes_after = len(result)
    return result, record


def _check_interface(before: Graph, after: Graph) -> None:
    """That a call still finds its arguments and results by name. Raises CompileError."""
    names = [([v.name for v in g.inputs], g.output_names) for g in (before, after)]
    if names[0] != names[1]:
        raise CompileError(
            interface_difference(before, after) or "its inputs or outputs have other names",
            code="pass",
            hint="a pass keeps the inputs and outputs of a graph",
        )


def fingerprint(graph: Graph) -> int:
    """Changes when nodes, operands, attributes, types, weights, inputs or outputs of this very graph do."""
    rows = [
        hash((n.op, *map(id, n.operands), *n.attrs, *map(id, n.attrs.values()), *(id(r.type) for r in n.results)))
        for g in (graph, *graph.functions.values())
        for n in g.nodes
    ]
    ends = [
        (tuple(map(id, g.inputs)), tuple(map(id, g.outputs)), tuple(g.output_names), _weight_ids(g))
        for g in (graph, *graph.functions.values())
    ]
    return hash((tuple(rows), tuple(ends)))


def _weight_ids(graph: Graph) -> tuple[tuple[str, int, int], ...]:
    return tuple((name, id(v), id(v.weight)) for name, v in graph.weights.items())


def default_pipeline(quantize: Quantization | str | None = None, placement: Placement | None = None) -> Pipeline:
    """What `moec.compile` runs with passes=None."""
    quantization = Quantization.of(quantize)
    # single numbers only: the fusions look for masks, tables and transposed weights as they were written
    clean = (DeadCode(), Canonicalise(), FoldConstants(limit=8), CommonSubexpressions(), SimplifyPositions())
    # rotary embedding before norms: the sum that ends it is no residual
    fuse = (FuseRoPE(), FuseNorm(), FuseAttention(), RaiseMoE(), RaiseUnrolledExperts(), FuseMLP())
    tidy = (
        FoldConstants(),
        FoldScalars(),
        SimplifyTransposes(),
        NarrowRows(),
        Canonicalise(),
        CommonSubexpressions(),
        DeadCode(),
    )
    # what a checkpoint stores in FP8 stays as it is, also without `quantize`; as integers it is stored anew
    stored = UseStoredFP8(activations=quantization is None or quantization.activations is not None)
    quantized: tuple[Pass, ...] = (stored,)
    if quantization is not None:
        weights = QuantizeWeights(quantization)
        quantized = (stored, weights) if quantization.weights == "f8e4m3fn" else (weights, stored)
    phases = [Phase("clean", clean), Phase("fuse", fuse), Phase("tidy", tidy), Phase("quantize", quantized)]
    if placement is not None:
        phases.append(Phase("place", (PlaceExperts(placement),)))
    return Pipeline(tuple(phases))


def build_pipeline(
    passes: Pipeline | Iterable[Pass | Analysis] | None,
    quantize: Quantization | str | None = None,
    placement: Placement | None = None,
) -> Pipeline:
    """From `moec.compile`'s arguments: a list is appended to the default pipeline, a Pipeline replaces it."""
    if isinstance(passes, Pipeline):
        if quantize is not None or placement is not None:
            raise ArgumentValueError(
                "quantize= and placement= belong to the default pipeline; a Pipeline of your own holds its passes",
                code="pipeline",
                hint="moec.passes.default_pipeline(quantize=…, placement=…).append(…)",
            )
        return passes
    return default_pipeline(quantize, placement).append(*_listed(passes or ()))
