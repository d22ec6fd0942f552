"""Text tests: a file of graphs with the passes to run on them and what must come out.

    // Two residual adds that share nothing.
    // RUN: fuse_norm{max=1}, dead_code
    graph(%x: f32[T, 8], …) -> (%y: f32[T, 8]) {
      …
    }
    // CHECK: graph(%x: f32[T, 8], …) -> (%y: f32[T, 8]) {
    // CHECK:   %0: f32[T, 8] = norm.add_rms(…)
    // CHECK: }
    // -----
    // RUN: fuse_norm
    …

Cases are separated by `// -----`. Lines of a case, in any order around its graph:

    RUN: passes        passes and rules by name with their options, as on the command line, from left to right; your
                       own as `module:Class` or `file.py:Class`, with the path from the folder of the text file
    CHECK: line        the whole resulting graph, line by line
    UNCHANGED          the passes leave the graph as it is
    REFUSED: text      a rule gives a reason that holds `text`; the graph stays unless there are CHECK lines
    ERROR: text        a pass fails with an error that holds `text`
    TOLERANCE: number  what the results may differ by, relative to their largest magnitude (default: nothing that
                       float64 shows); for passes that round

Other comment lines are for the reader. Besides the text, every case is checked as `check_pass` does: the result
verifies and means the same, the passes change nothing when run again, the input stays.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from moec.checks import apply_checked, check_idempotent, check_meaning, why_not
from moec.graph_text import canonical_text, graph_diff, text_diff
from moec.ir import CompileError, Graph, parse
from moec.ir.cases import with_data
from moec.passes import Pass
from moec.passes.spec import parse_passes

_SEPARATOR = re.compile(r"// -{3,}\s*$")
_DIRECTIVE = re.compile(r"//\s*([A-Z][A-Z-]+)(?::(.*)|\s*)$")
_KNOWN = ("RUN", "CHECK", "UNCHANGED", "REFUSED", "ERROR", "TOLERANCE")


@dataclass
class TextCase:
    """One case: its lines in the file (`start` is the number of the first, from 0) and what they say."""

    path: Path
    start: int
    lines: list[str]
    run: str = ""
    graph: str = ""
    checks: list[str] = field(default_factory=list)
    unchanged: bool = False
    refused: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    tolerance: float | None = None
    title: str = ""

    @property
    def where(self) -> str:
        return f"{self.path}:{self.start + 1}"


@dataclass(frozen=True)
class Outcome:
    """What a case gave: None and no problem where it passed; `accept` are the lines that `--accept` writes in the
    place of its CHECK and UNCHANGED lines (None: the failure is not one of the text)."""

    problem: str | None = None
    accept: tuple[str, ...] | None = None


def read_cases(path: Path, text: str | None = None) -> list[TextCase]:
    """The cases of a file. Raises AssertionError naming file and line on an unknown or malformed line."""
    cases: list[TextCase] = []
    start, lines = 0, (path.read_text("utf-8") if text is None else text).splitlines()
    for end in [i for i, line in enumerate(lines) if _SEPARATOR.match(line)] + [len(lines)]:
        if any(line.strip() for line in lines[start:end]):
            cases.append(_read_case(path, start, lines[start:end]))
        start = end + 1
    return cases


def _read_case(path: Path, start: int, lines: list[str]) -> TextCase:
    case = TextCase(path, start, lines)
    graph: list[str] = []
    for i, line in enumerate(lines):
        match = _DIRECTIVE.match(line)
        if match is None:
            graph.append(line)
            if line.startswith("//") and not case.title:
                case.title = line[2:].strip()
            continue
        graph.append("")  # errors of the parser count the lines of the case
        word, rest = match.group(1), match.group(2)
        at = f"{path}:{start + i + 1}"
        if word not in _KNOWN:
            near = difflib.get_close_matches(word, _KNOWN, 1)
            raise AssertionError(f"{at}: unknown line {word!r}; " + (f"did you mean {near[0]}?" if near else _list()))
        if (rest is None) != (word == "UNCHANGED") or (word in ("RUN", "REFUSED", "ERROR") and not rest.strip()):
            raise AssertionError(f"{at}: write // {'UNCHANGED' if word == 'UNCHANGED' else word + ': …'}")
        _take(case, word, rest or "", at)
    case.graph = "\n".join(graph)
    if not case.run:
        raise AssertionError(f"{case.where}: the case has no // RUN: line")
    if case.unchanged and case.checks:
        raise AssertionError(f"{case.where}: the case has both CHECK and UNCHANGED")
    if case.errors and (case.checks or case.unchanged or case.refused):
        raise AssertionError(f"{case.where}: a case with ERROR has no result to CHECK")
    return case


def _take(case: TextCase, word: str, rest: str, at: str) -> None:
    match word:
        case "RUN":
            case.run = f"{case.run}, {rest.strip()}" if case.run else rest.strip()
        case "CHECK":
            case.checks.append(rest.removeprefix(" ").rstrip())
        case "UNCHANGED":
            case.unchanged = True
        case "REFUSED":
            case.refused.append(rest.strip())
        case "ERROR":
            case.errors.append(rest.strip())
        case "TOLERANCE":
            try:
                case.tolerance = float(rest.split()[0])
            except (ValueError, IndexError):
                raise AssertionError(f"{at}: write // TOLERANCE: 0.05") from None


def _list() -> str:
    return f"one of {', '.join(_KNOWN)}"


def run_case(case: TextCase) -> Outcome:
    """Run one case. All problems are in the outcome; nothing is written."""
    try:
        passes = _parse_run(case)
        graph = with_data(parse(case.graph))
    except CompileError as e:
        return Outcome(f"{case.where}: {e}")
    try:
        return _judge(case, passes, graph)
    except AssertionError as e:
        return Outcome(f"{case.where}: {e}")


def _parse_run(case: TextCase) -> tuple[Pass, ...]:
    """The passes; files of rules are named from the folder of the text file, wherever pytest was started."""
    with contextlib.chdir(case.path.parent):
        return parse_passes(case.run)


def _judge(case: TextCase, passes: tuple[Pass, ...], graph: Graph) -> Outcome:
    if case.errors:
        return _judge_error(case, passes, graph)
    result, reasons = graph, []
    for p in passes:
        before = result
        result, record = apply_checked(p, before)
        if case.refused:
            reasons.append(why_not(p, before, record))
    missing = [r for r in case.refused if not any(r in given for given in reasons)]
    if missing:
        return Outcome(f"{case.where}: no rule refuses because of {missing[0]!r}; given is\n" + "\n".join(reasons))
    check_meaning(case.run, graph, result, case.tolerance)
    check_idempotent(case.run, passes, result)
    start, got = canonical_text(graph), canonical_text(result)
    new = ("// UNCHANGED",) if got == start else tuple(f"// CHECK: {line}".rstrip() for line in got.splitlines())
    if case.checks:
        # compared as graphs are printed, so that a hand-written expectation may number and order values as it likes
        wanted = _expected_text(case)
        if wanted != got:
            return Outcome(f"{case.where}: {case.run} gives another graph than expected\n{text_diff(wanted, got)}", new)
    elif case.unchanged or case.refused:
        if got != start:
            return Outcome(f"{case.where}: {case.run} changes the graph\n{graph_diff(graph, result)}", new)
    else:
        return Outcome(
            f"{case.where}: the case expects nothing; run pytest with --accept to write down\n" + "\n".join(new), new
        )
    return Outcome()


def _expected_text(case: TextCase) -> str:
    text = "\n".join(case.checks) + "\n"
    try:
        return canonical_text(parse(text))
    except CompileError:
        return text  # it cannot be equal: the diff shows where


def _judge_error(case: TextCase, passes: tuple[Pass, ...], graph: Graph) -> Outcome:
    try:
        for p in passes:
            graph = p.run(graph)
    except CompileError as e:
        missing = [text for text in case.errors if text not in str(e)]
        return Outcome(f"{case.where}: the error does not say {missing[0]!r}\n{e}") if missing else Outcome()
    return Outcome(f"{case.where}: {case.run} runs, expected is an error with {case.errors[0]!r}")


def accept(path: Path, changes: Iterable[tuple[TextCase, tuple[str, ...]]]) -> None:
    """Rewrite the file: the CHECK and UNCHANGED lines of each case become the given lines, in the place of the first
    of them (at the end of the case where there was none); every other line stays."""
    lines = path.read_text("utf-8").splitlines()
    for case, new in sorted(changes, key=lambda c: -c[0].start):
        kept = [line for line in case.lines if not _is_expectation(line)]
        first = next((i for i, line in enumerate(case.lines) if _is_expectation(line)), None)
        if first is not None:
            at = sum(not _is_expectation(line) for line in case.lines[:first])
        else:
            at = len("\n".join(kept).rstrip("\n").split("\n"))
        lines[case.start : case.start + len(case.lines)] = [*kept[:at], *new, *kept[at:]]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _is_expectation(line: str) -> bool:
    match = _DIRECTIVE.match(line)
    return match is not None and match.group(1) in ("CHECK", "UNCHANGED")
