"""What `moec.bisect` found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moec.comparing import Divergence
from moec.ir import Graph, Location
from moec.ir.printer import print_graph, shorten
from moec.judging import Fault
from moec.minimise import Minimised
from moec.passes.base import Analysis, Pass
from moec.passes.dump import Names, compare_lines, hunks, listing
from moec.passes.rewrite import source_of

_LINES = 40


@dataclass(eq=False)
class Culprit:
    """What is to blame; false where nothing is.

    kind: "rule" (one application of one rule), "pass", "backend", or "none".
    culprit: the rule, pass or analysis, None for a backend; `pass_` the pass that it is in, `pass_index` its place in
        the pipeline (from 0). `source`: file:line of the culprit's class.
    application, applications: which application of rules within the pass it is (from 1), and how many there were;
        None where it is no application (the pass's own code, or a rule's pattern or `when`).
    fault: what is wrong. `before`, `after`: the graph before and after that application (`after` None where it
        raised). `location`: the part of the model that it is in.
    backend, divergence: the backend and the first node at which it leaves its tolerance.
    minimised: a small graph on which `shown_by` (the culprit, or the pass that it is in) has the same fault, or None
        where no part showed it; `path` where it was saved.
    repro: one line (a command, or Python where no command can name the rule) that shows the fault again.
    notices: what was left out, and why.
    """

    kind: Literal["none", "rule", "pass", "backend"]
    culprit: Pass | Analysis | None = None
    pass_: Pass | Analysis | None = None
    pass_index: int | None = None
    application: int | None = None
    applications: int = 0
    fault: Fault | None = None
    location: Location = field(default_factory=Location)
    before: Graph | None = None
    after: Graph | None = None
    backend: str | None = None
    divergence: Divergence | None = None
    minimised: Minimised | None = None
    shown_by: Pass | Analysis | None = None
    path: Path | None = None
    repro: str = ""
    notices: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return self.kind != "none"

    @property
    def source(self) -> str:
        return source_of(self.culprit) if self.culprit is not None else ""

    @property
    def name(self) -> str:
        """The culprit's name: of the rule, the pass or the backend."""
        return self.culprit.name if self.culprit is not None else self.backend or ""

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if not self:
            yield "nothing is wrong: every pass keeps the meaning of the graph"
        else:
            yield f"{self.kind} {self.name}" + (f" ({self.source})" if self.source else "")
            yield from self._place()
            yield from self._what()
            yield from self._changes()
            yield from self._small()
        for notice in self.notices:
            yield f"note: {notice}"

    def _place(self) -> Iterator[str]:
        if self.pass_ is not None and self.pass_index is not None:
            yield f"  in         pass {self.pass_.name}, number {self.pass_index + 1} of the pipeline"
        if self.application is not None:
            yield f"  at         application {self.application} of {self.applications} in that pass"
        if self.location:
            yield f"  location   {self.location.describe()}"

    def _what(self) -> Iterator[str]:
        if self.divergence is not None:
            yield f"  wrong      {self.divergence}"
        elif self.fault is not None:
            yield f"  wrong      {self.fault.kind}: {self.fault}"
            if self.fault.hint:
                yield f"  hint       {self.fault.hint}"
            d = self.fault.difference
            if d is not None and d.case is not None:
                sizes = ", ".join(f"{n}={s}" for n, s in d.case.binding.items())
                if sizes and sizes not in d.case.label:
                    yield f"  sizes      {sizes}"

    def _changes(self) -> Iterator[str]:
        if self.before is None:
            return
        names = Names(self.before)
        lines = listing(self.before, names)
        if self.after is None:
            near = [i for i, n in enumerate(self.before.nodes, 1) if self.location and n.location == self.location]
            if near:
                yield "  before"
                yield from (f"    {shorten(lines[i])}" for i in near[:_LINES])
            return
        rows = list(hunks(list(compare_lines(lines, listing(self.after, Names(self.after, names))))))
        yield "  before (-) and after (+)"
        yield from (f"    {shorten(row)}" for row in rows[:_LINES])
        if len(rows) > _LINES:
            yield f"    … {len(rows) - _LINES} more lines"

    def _small(self) -> Iterator[str]:
        if self.minimised is not None:
            g = self.minimised.graph
            where = f" in {self.path}" if self.path is not None else ""
            sizes = (_count(len(g), "node"), _count(len(g.inputs), "input"), _count(len(g.weights), "weight"))
            yield f"  minimised  {', '.join(sizes)}{where}"
            if self.path is None:
                yield from (f"    {shorten(line)}" for line in print_graph(g, locations=False).splitlines()[:_LINES])
        if self.repro:
            yield f"  repro      {self.repro}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")
