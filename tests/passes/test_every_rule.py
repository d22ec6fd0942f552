"""Every pass that ships has text tests where it does something and where it leaves a graph alone; every rule fires."""

from __future__ import annotations

import contextlib
from functools import cache
from pathlib import Path

from moec import passes as shipped
from moec.ir import CompileError, parse
from moec.passes import Pass, Rewrite, RuleSet, parse_passes, run_pass
from moec.passes.base import snake_case
from moec.text_cases import read_cases

FILES = sorted((Path(__file__).parent.parent / "texts").glob("*.ir"))
WITHOUT_NAME = {"Pass", "Rewrite", "RuleSet"}
STANDS_FOR = {"LegaliseTo": "Legalise"}  # takes a backend, which has no text form


@cache
def outcomes() -> tuple[set[str], set[str], set[str]]:
    """(passes that changed a graph, passes that left one alone or refused it, rules that fired)."""
    changed: set[str] = set()
    kept: set[str] = set()
    fired: set[str] = set()
    for case in (c for f in FILES for c in read_cases(f)):
        graph = parse(case.graph)
        with contextlib.chdir(case.path.parent):  # where files of rules are named from
            steps = parse_passes(case.run)
        for p in steps:
            names = {STANDS_FOR.get(type(p).__name__, type(p).__name__)}
            try:
                after, record = run_pass(p, graph)
            except CompileError:
                kept |= names
                break
            if after != graph:
                changed |= names
            else:
                kept |= names | {type(r).__name__ for r in getattr(p, "rules", ())}
            kept |= names if record.refused else set()
            fired |= record.fired.keys()
            graph = after
    return changed, kept, fired


# acts on how weights are stored, which text does not say: tests/frontend/test_fp8_checkpoints.py
ON_STORED_WEIGHTS = {"UseStoredFP8"}


def passes_that_ship() -> dict[str, type[Pass]]:
    left_out = {*WITHOUT_NAME, *ON_STORED_WEIGHTS}
    found = {name: getattr(shipped, name) for name in shipped.__all__ if name not in left_out}
    return {name: c for name, c in found.items() if isinstance(c, type) and issubclass(c, Pass)}


def test_every_pass_has_texts_of_both_kinds():
    changed, kept, fired = outcomes()
    ship = passes_that_ship()
    assert len(ship) > 20
    changed |= {name for name in ship if snake_case(name) in fired}  # single rules, within their rule set
    assert not [name for name in ship if name not in changed], "no text test where the pass changes something"
    assert not [name for name in ship if name not in kept], "no text test where the pass leaves the graph alone"


def test_every_rule_fires_in_a_text():
    fired = outcomes()[2]
    rules: list[Rewrite] = []
    for c in passes_that_ship().values():
        if issubclass(c, RuleSet):
            rules += c().rules
        elif issubclass(c, Rewrite):
            rules.append(c())
    assert len(rules) > 60
    assert not sorted({r.name for r in rules} - fired), "rules that no text test makes fire"
