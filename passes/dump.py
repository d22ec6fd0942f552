"""Dumps: the IR after every pass, what each changed, and a page that steps through them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from moec.ir import ArgumentValueError, Graph, Node, Value
from moec.ir.printer import print_attr, print_node, symbol
from moec.passes.base import Record
from moec.passes.replay import Step, page

_CONTEXT = 3


class Dump:
    """A folder with `00_input.ir`, then for each pass `01_name.ir` and, where it changed something, `01_name.diff`;
    `replay.html` is rewritten after each."""

    def __init__(self, folder: Path, graph: Graph):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ArgumentValueError(f"cannot dump into {folder}: {e.strerror}", code="arguments") from e
        for old in [*folder.glob("[0-9][0-9]_*.ir"), *folder.glob("[0-9][0-9]_*.diff"), folder / "replay.html"]:
            old.unlink(missing_ok=True)  # of an earlier, perhaps longer run
        self.folder = folder
        self.steps: list[Step] = []
        self.names = Names(graph)
        (folder / "00_input.ir").write_text(str(graph), "utf-8")

    def add(self, record: Record, before: Graph, after: Graph) -> None:
        """The step from `before`, the graph of the last call (or the input), to `after`."""
        old = self.names
        self.names = old if after is before else Names(after, old)
        rows = list(compare_lines(listing(before, old), listing(after, self.names)))
        stem = f"{len(self.steps) + 1:02d}_{record.name}"
        (self.folder / f"{stem}.ir").write_text(str(after), "utf-8")
        if any(mark != " " for mark, _ in rows):
            (self.folder / f"{stem}.diff").write_text("\n".join(hunks(rows)) + "\n", "utf-8")
        self.steps.append(Step.of(record, rows))
        (self.folder / "replay.html").write_text(page(self.steps), "utf-8")


class Names:
    """A name per value. A value keeps the name that it has in an earlier graph, where it is computed in the same way
    or stands for the same traced value, so that listings differ only where graphs do."""

    def __init__(self, graph: Graph, earlier: Names | None = None):
        self.next: int = earlier.next if earlier else 0
        self.by_meaning: dict[tuple, list[str]] = {}
        self.by_origin: dict[str, str] = {}
        self.of: dict[Value, str] = {}
        for g in (graph, *graph.functions.values()):
            self._name_all(g, earlier)

    def __call__(self, v: Value | None) -> str:
        if v is None:
            return "_"
        return f"@{symbol(v.weight.name)}" if v.weight is not None else self.of.get(v, "%?")

    def _name_all(self, graph: Graph, earlier: Names | None) -> None:
        for v in graph.inputs:
            self.of[v] = f"%{symbol(v.name or '')}"
        taken: set[str] = set()
        for node in graph.nodes:
            meaning = (graph.name, node.op, *map(self, node.operands), *(print_attr(a) for a in node.attrs.values()))
            for r in node.results:
                name = self._kept(earlier, (*meaning, r.index), r, taken) if earlier else None
                if name is None:
                    name, self.next = f"%{self.next}", self.next + 1
                taken.add(name)
                self.of[r] = name
                self.by_meaning.setdefault((*meaning, r.index), []).append(name)
                self.by_origin.update((f"{graph.name}:{o}", name) for o in r.origins)

    @staticmethod
    def _kept(earlier: Names, meaning: tuple, v: Value, taken: set[str]) -> str | None:
        known: list[str | None] = [*earlier.by_meaning.get(meaning, ())]
        known += [earlier.by_origin.get(f"{meaning[0]}:{o}") for o in sorted(v.origins)]
        return next((k for k in known if k is not None and k not in taken), None)


def listing(graph: Graph, names: Names) -> list[str]:
    """Lines of a graph and its functions for reading: where nodes come from as comments, no weights."""
    lines = []
    for keyword, g in (("graph", graph), *(("function", f) for f in graph.functions.values())):
        title = keyword if g.name == keyword else f"{keyword} {g.name}"
        lines.append(f"{title}({', '.join(f'{names(v)}: {v.type}' for v in g.inputs)})")
        lines += [_line(n, names) for n in g.nodes]
        pairs = zip(g.output_names, g.outputs, strict=True)
        lines += [f"  return {name} = {names(v)}: {v.type}" for name, v in pairs]
    return lines


def _line(node: Node, names: Names) -> str:
    module = node.location.module
    return f"  {print_node(node, names, locations=False)}" + (f"  // {module}" if module else "")


def compare_lines(before: list[str], after: list[str]) -> Iterator[tuple[str, str]]:
    """(mark, line) of both listings: " " in both, "-" only before, "+" only after."""
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for tag, a0, a1, b0, b1 in matcher.get_opcodes():
        if tag == "equal":
            yield from ((" ", line) for line in before[a0:a1])
        else:
            yield from (("-", line) for line in before[a0:a1])
            yield from (("+", line) for line in after[b0:b1])


def hunks(rows: list[tuple[str, str]]) -> Iterator[str]:
    """The changed lines with their surroundings; a row of dots for what is left out."""
    changed = [i for i, (mark, _) in enumerate(rows) if mark != " "]
    near = {k for i in changed for k in range(i - _CONTEXT, i + _CONTEXT + 1)}
    shown = True
    for i, (mark, line) in enumerate(rows):
        if i in near:
            yield f"{mark}{line}"
            shown = True
        elif shown:
            yield " ⋯"
            shown = False
