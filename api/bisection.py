"""`moec.bisect`: which pass, which rule, which application of it made a program wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moec.backend_fault import blame
from moec.backends import Backend, get_backend
from moec.culprit import Culprit
from moec.ir import Graph, Placement, Quantization
from moec.ir.cases import with_data
from moec.ir.compare import difference
from moec.ir.extremes import may_overflow, with_large_weights
from moec.judging import Fault, FiniteJudge, Judge, attempt, is_lossy
from moec.passes.base import Analysis, Pass
from moec.passes.pipeline import Pipeline, build_pipeline
from moec.passes.rewrite import Rewrite, RuleSet
from moec.passes.rewriting.engine import Application, limited, source_of
from moec.progress import progress
from moec.reproduce import reproduce
from moec.sources import acquire

Step = Callable[[str], None]
Outcome = tuple[Graph | None, Fault | None]  # a state, or what was raised on the way to it
States = Callable[[int], Outcome]


def bisect(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    backend: str | Backend = "reference",
    dynamic_shapes: Any = None,
    passes: Iterable[Pass | Analysis] | Pipeline | None = None,
    quantize: str | Quantization | None = None,
    placement: Placement | None = None,
    out: str | Path | None = None,
    seconds: float = 60.0,
) -> Culprit:
    """Find what makes a compiled program wrong or its compilation fail.

    model, args, kwargs, dynamic_shapes, passes, quantize, placement: as in `moec.compile`; for a Graph, args are the
        tensors of its inputs (seeded ones take their place where there are none, and where a weight has no data).
    backend: where every pass is innocent, the program on this backend is compared with the reference.
    out: a folder for `culprit.ir` (and `culprit.safetensors` where seeded inputs do not show the fault).
    seconds: how long to look for a smaller graph; 0 for not at all.

    The truth is the traced graph in the reference interpreter, at the given args and at seeded inputs of several sizes,
    floats promoted to float64 on both sides (`moec.ir.equivalence`), and once in its own dtypes; where exponentials are
    left in the end, also whether it stays finite on large inputs and with large weights. The passes are
    searched by halving, then the applications of rules within the guilty pass, each time between a state that is
    right and one that is not: the first of several wrong rules is found, whatever the others do. A pass that
    quantises changes numbers by design: it is only accused of an error beyond half of an output's norm
    (`moec.judging.LOSSY`), and what follows it is held against the quantised graph.

    Raises CompileError where the traced graph itself does not run in the reference. A pass that never returns is not
    found (rules that never end are: the engine stops them).
    """
    with progress("bisect") as step:
        step("trace")
        target, pipeline = get_backend(backend), build_pipeline(passes, quantize, placement)
        example, named = ((), None) if isinstance(model, Graph) else (args, kwargs)
        graph, signature = acquire(model, example, named, dynamic_shapes)
        inputs = signature.flatten(args, kwargs) if args or kwargs else None
        graph.verify()
        graph = with_data(graph)
        search = _Search(graph, pipeline.passes, inputs, step)
        found = search.run()
        if not found and may_overflow(search.stages[-1]):
            step("with large weights")
            large = _Search(with_large_weights(graph), pipeline.passes, inputs, step, judge=FiniteJudge)
            culprit = large.run()
            if culprit.fault is not None and culprit.fault.kind == "numbers":  # refusals of such weights are none
                search, found = large, culprit
        if not found and target.name != "reference" and search.inputs is not None:
            step(f"compare with {target.name}")
            found = blame(target, search.stages[-1], search.inputs)
        found.notices[:0] = search.notices if found else [*search.notices, *search.idle()]
        if found and seconds > 0:
            step("minimise")
            suspects = [p for p in (*search.suspects, found.culprit, found.pass_) if p is not None]
            suspects = list({id(p): p for p in suspects}.values())  # options may not be hashable
            folder = Path(out) if out is not None else None
            reproduce(found, suspects, search.inputs, seconds, folder, target)
        return found


@dataclass
class _Search:
    graph: Graph
    passes: Sequence[Pass | Analysis]
    inputs: Sequence[torch.Tensor] | None
    step: Step
    notices: list[str] = field(default_factory=list)
    suspects: list[Pass | Analysis] = field(default_factory=list)  # what may show the fault by itself
    judge: type[Judge] = Judge

    def run(self) -> Culprit:
        self.stages = [self.graph]
        broken: Fault | None = None
        for p in self.passes:
            self.step(f"pass {p.name}")
            result, broken = attempt(p, self.stages[-1])
            if result is None:
                break
            self.stages.append(result)
        last = len(self.stages) - 1
        start = 0
        lossy = [i for i in range(last) if is_lossy(self.stages[i], self.stages[i + 1])]
        for end in (*lossy, last):
            judge = self.judge(self.stages[start], self.inputs, self.notices)
            self._use_seeded_inputs(judge)
            self.step(f"judge passes {start + 1} to {end}")
            wrong = judge.examine(self.stages[end])
            if wrong is not None:
                guilty, fault = self._first(judge, start, end, wrong, lambda i: (self.stages[i], None))
                return self._within(judge, guilty - 1, fault)
            if end in lossy:
                start = end + 1
                name = self.passes[end].name
                self.notices.append(f"{name} quantises: judged loosely, and what follows against its result")
                too_far = self.judge(self.stages[end], self.inputs).examine_loosely(self.stages[start])
                if too_far is not None:
                    return self._pass_culprit(end, too_far)
        if broken is not None:
            return self._within(judge, last, broken)
        return Culprit("none")

    def idle(self) -> list[str]:
        """What is to be said of passes of the user's own that changed nothing."""
        steps = zip(self.passes, self.stages, self.stages[1:], strict=False)
        return [
            f"{p.name} ({source_of(p)}) changes nothing here"
            for p, before, after in steps
            if isinstance(p, Pass) and not type(p).__module__.startswith("moec.") and difference(before, after) is None
        ]

    def _use_seeded_inputs(self, judge: Judge) -> None:
        if self.inputs is None:
            self.inputs = judge.own.inputs

    def _first(
        self, judge: Judge, good: int, bad: int, fault: Fault, at: Callable[[int], Outcome]
    ) -> tuple[int, Fault]:
        """(the first wrong of good+1 … bad, its fault), by halving. Only what showed the fault is looked at, until
        the last state that seems right is held against everything."""
        while True:
            quick, low = judge.narrowed(fault), good
            while bad - low > 1:
                middle = (low + bad) // 2
                self.step(f"between {low} and {bad}")
                found = _fault_of(quick, at(middle))
                if found is None:
                    low = middle
                else:
                    bad, fault = middle, found
            earlier = _fault_of(judge, at(low)) if low > good else None
            if earlier is None:
                return bad, fault
            bad, fault = low, earlier

    # -- inside a pass -----------------------------------------------------------------------------

    def _within(self, judge: Judge, index: int, fault: Fault) -> Culprit:
        """The application of a rule in pass `index` after which its result is wrong (or that raised)."""
        p, graph = self.passes[index], self.stages[index]
        self.step(f"applications of {p.name}")

        @cache
        def trial(limit: int | None) -> tuple[Graph | None, Fault | None, list[Application]]:
            with limited(limit) as applied:
                return *attempt(p, graph), applied.applications

        whole, raised, applications = trial(None)
        count = len(applications)
        if raised is None and fault.kind in ("crash", "endless"):
            self.notices.append("the pass raised in one run and not in the next: it is not deterministic")
        # without an application, a rule or rule set changes nothing
        by_itself = None if isinstance(p, Rewrite | RuleSet) or not count else _fault_of(judge, trial(0)[:2])
        if not count or by_itself is not None:
            return self._pass_culprit(index, by_itself or fault, trial(0)[0])
        if fault.kind == "endless":
            number, loop = _loop(applications)
            self.suspects = [RuleSet(loop)]
        elif whole is not None or trial(count)[0] is None:
            number, fault = self._first(judge, 0, count, raised or fault, lambda n: trial(n)[:2])
        else:  # it raised between applications: in a pattern or a `when`
            return self._pass_culprit(index, fault, trial(count)[0])
        before = trial(number - 1)[0]
        after, _, there = trial(number)
        application = applications[number - 1]
        if there[-1].name != application.name or there[-1].location != application.location:
            self.notices.append("rules are applied in another order in every run; the application may be another one")
        return Culprit(
            "rule",
            application.rule,
            p,
            index,
            number,
            count,
            fault,
            application.location,
            before,
            after,
        )

    def _pass_culprit(self, index: int, fault: Fault, after: Graph | None = None) -> Culprit:
        p, before = self.passes[index], self.stages[index]
        rule = fault.rule
        if rule is None and index + 1 < len(self.stages):
            after = self.stages[index + 1]
        return Culprit(
            "rule" if rule is not None else "pass",
            rule or p,
            p,
            index,
            fault=fault,
            location=fault.location,
            before=after if rule is not None and after is not None else before,
            after=after if rule is None else None,
        )


def _fault_of(judge: Judge, outcome: Outcome) -> Fault | None:
    graph, raised = outcome
    return raised if graph is None else judge.examine(graph)


def _loop(applications: Sequence[Application]) -> tuple[int, tuple[Rewrite, ...]]:
    """(the number of the application that begins what the last ones repeat, the rules of the loop)."""
    names = [(a.name, a.root) for a in applications]
    period = next((p for p in range(1, 50) if names[-p:] * 3 == names[-3 * p :]), 1)
    start = len(names) - period
    while start > 0 and names[start - 1] == names[start - 1 + period]:
        start -= 1
    return start + 1, tuple(dict.fromkeys(a.rule for a in applications[start : start + period]))
