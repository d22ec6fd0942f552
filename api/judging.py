"""What a pass did to a graph: the graph, or what is wrong with it."""

from __future__ import annotations

import copy
import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

from moec.ir import CompileError, Graph, Location, run
from moec.ir.cases import Case, with_data
from moec.ir.compare import difference as structural_difference
from moec.ir.compare import interface_difference
from moec.ir.equivalence import Difference, Oracle, not_finite
from moec.ir.extremes import may_overflow
from moec.ir.interpreter import bind_inputs
from moec.ir.promote import promote
from moec.passes.base import Analysis, Pass

# a pass that quantises changes numbers by design; more than this, relative to the root mean square of an output,
# is no rounding any more (a scale that is off by two gives 1, unrelated numbers 1.4)
LOSSY = 0.5

Kind = Literal["crash", "endless", "input changed", "invalid", "signature", "execution", "numbers"]


@dataclass(frozen=True)
class Fault:
    """What is wrong: the pass raised (`crash`), or its rules do not end (`endless`), it changed its input, its result
    does not verify (`invalid`), has other inputs or outputs (`signature`), fails when it is run
    (`execution`), or gives other values (`numbers`, with the `difference`). `rule`: named by the error itself, as is
    the `hint`."""

    kind: Kind
    message: str
    rule: Pass | None = None
    location: Location = field(default_factory=Location)
    difference: Difference | None = None
    hint: str = ""

    def like(self, other: Fault) -> bool:
        """The same kind of fault, by the same rule where both name one; a crash with the same message up to sizes."""
        same_rule = self.rule is None or other.rule is None or type(self.rule) is type(other.rule)
        same_text = self.kind != "crash" or _gist(self.message) == _gist(other.message)
        return self.kind == other.kind and same_rule and same_text

    def __str__(self) -> str:
        return str(self.difference) if self.difference is not None else self.message


def _gist(message: str) -> str:
    return re.sub(r"\[[^\]]*\]|[-\d.]+", "", message)


def attempt(p: Pass | Analysis, graph: Graph) -> tuple[Graph | None, Fault | None]:
    """The verified result of a pass (of an analysis, the graph), or its fault. The graph is left as it is, whatever
    the pass does."""
    given = graph.clone()
    try:
        result = p.run(given)
        result = given if isinstance(p, Analysis) else result
    except CompileError as e:
        rule = getattr(e, "rule", None)
        kind: Kind = "endless" if e.code == "endless" else "crash"
        return None, Fault(kind, e.message, rule, e.location or Location(), hint=e.hint or "")
    except Exception as e:  # whatever a pass raises is what is looked for
        frame = traceback.extract_tb(e.__traceback__)[-1]
        return None, Fault("crash", f"{type(e).__name__}: {e} ({frame.filename}:{frame.lineno})")
    if not isinstance(result, Graph):
        return None, Fault("crash", f"run() returned {type(result).__name__}, not a Graph")
    try:
        changed = structural_difference(graph, given)
        if changed is not None:
            return None, Fault("input changed", f"the pass changed its input graph itself: {changed}")
        result.verify()
    except CompileError as e:
        return None, Fault("invalid", e.message, location=e.location or Location(), hint=e.hint or "")
    except Exception as e:  # a graph so broken that it cannot be looked at
        return None, Fault("invalid", f"the graph it returns is broken: {type(e).__name__}: {e}")
    return result, None


class Judge:
    """What a graph means, to hold others against: its outputs in the reference on the given inputs and on seeded
    ones, floats promoted to float64, so that what a legitimate fusion rounds differently is no difference."""

    def __init__(self, truth: Graph, inputs: Sequence[torch.Tensor] | None, notices: list[str] | None = None):
        self.truth, self.inputs, self.notices = truth, inputs, notices

    @cached_property
    def oracles(self) -> list[Oracle]:
        """On the given inputs, and on seeded ones where the graph runs on them."""
        given = [Oracle(self.truth, inputs=self.inputs)] if self.inputs is not None else []
        try:
            return [*given, Oracle(self.truth)]
        except CompileError as e:
            if not given:
                raise
            text = f"judged on the given inputs only; seeded ones do not run: {e.message}"
            if self.notices is not None and text not in self.notices:
                self.notices.append(text)
            return given

    @cached_property
    def own(self) -> Case:
        """The case that graphs run on in their own dtypes, where a run may fail or overflow that float64 lets pass."""
        if self.inputs is None:
            return self.oracles[0].cases[0]
        return Case("the given inputs", bind_inputs(self.truth, self.inputs), tuple(self.inputs))

    @cached_property
    def expected(self) -> list[torch.Tensor]:
        """The outputs of that run."""
        return run(with_data(self.truth), self.own.inputs)

    def narrowed(self, fault: Fault) -> Judge:
        """A quick judge that looks only where the fault was seen."""
        case = fault.difference.case if fault.difference is not None else None
        quick = Judge(self.truth, self.inputs)
        quick.own, quick.expected, quick.oracles = self.own, self.expected, []
        for oracle in self.oracles:
            one = copy.copy(oracle)
            one.references = [r for r in oracle.references if r.case is case]
            quick.oracles.append(one)
        return quick

    def examine(self, graph: Graph) -> Fault | None:
        """What is wrong with a graph that should mean the same."""
        for oracle in self.oracles:
            found = oracle.difference(graph)
            if found is not None:
                kind: Kind = "numbers" if found.output else "execution" if found.case else "signature"
                return Fault(kind, found.reason, difference=found)
        got = self._own_run(graph)
        if isinstance(got, Fault):
            return got
        for name, a, b in zip(graph.output_names, self.expected, got, strict=True):
            if _finite(a) and not _finite(b):
                dtype = str(b.dtype).removeprefix("torch.")
                return Fault("numbers", f"output {name!r} overflows in {dtype} ({self.own.label})")
        return None

    def examine_loosely(self, graph: Graph) -> Fault | None:
        """The same for a graph that was quantised: only an error beyond LOSSY is one."""
        got = self._own_run(graph)
        if isinstance(got, Fault):
            return got
        for name, a, b in zip(graph.output_names, self.expected, got, strict=True):
            if not a.is_floating_point() or not a.numel():
                continue
            x, y = a.to(torch.float64), b.to(torch.float64)
            error = float((x - y).norm() / x.norm()) if bool(x.any()) else float(y.norm())
            if not error <= LOSSY:
                message = f"output {name!r} is off by {error:.2g} of its norm, more than rounding to 8 bits explains"
                return Fault("numbers", f"{message} (allowed: {LOSSY}; {self.own.label})")
        return None

    def _own_run(self, graph: Graph) -> list[torch.Tensor] | Fault:
        try:
            return run(graph, self.own.inputs)
        except CompileError as e:
            return Fault("execution", f"{e.message} ({self.own.label})", location=e.location or Location())


class FiniteJudge(Judge):
    """Of a graph whose weights are far larger than those of the model: whether others stay finite where it does. Their
    values say nothing, it is too ill-conditioned for that."""

    @cached_property
    def own(self) -> Case:
        return super().own if self.inputs is not None else Oracle(self.truth).usual

    @cached_property
    def _promoted(self) -> Graph:
        return promote(with_data(self.truth))

    def narrowed(self, fault: Fault) -> Judge:
        return self

    def examine(self, graph: Graph) -> Fault | None:
        if not may_overflow(graph) or interface_difference(self.truth, graph) is not None:
            return None
        case = Case(f"{self.own.label}, float matrices times 10⁴", self.own.binding, self.own.inputs)
        found = not_finite(self._promoted, promote(with_data(graph)), case)
        return None if found is None else Fault("numbers", found.reason, difference=found)

    def examine_loosely(self, graph: Graph) -> Fault | None:
        return None


def _finite(x: torch.Tensor) -> bool:
    # torch has no isfinite for every 8-bit float
    return bool((x.to(torch.float64) if x.is_floating_point() else x).isfinite().all())


def fault_of(p: Pass | Analysis, graph: Graph, inputs: Sequence[torch.Tensor] | None = None) -> Fault | None:
    """What one pass does wrong to a graph."""
    result, fault = attempt(p, graph)
    if result is None or structural_difference(graph, result) is None:
        return fault
    return Judge(graph, inputs).examine(result)


def is_lossy(before: Graph, after: Graph) -> bool:
    """Whether a pass stored numbers in fewer bits: its result has more ops of the `quant` family."""

    def quantised(g: Graph) -> int:
        return sum(n.opdef.family == "quant" for fn in (g, *g.functions.values()) for n in fn.nodes)

    return quantised(after) > quantised(before)
