"""Every rule that fires on a real family's graph, broken by one hundredth, is found and shown by a small graph."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import moec
from moec.ir.cases import with_data
from moec.passes import Pipeline, Rewrite, RuleSet, default_pipeline
from moec.passes.rewrite import limited

GRAPH = Path(__file__).parents[1] / "graphs" / "mixtral.sdpa.grouped.prefill.ir"
# rules whose results hold no floats that matter: shapes, indices, masks
WITHOUT_NUMBERS = ("shape", "mask", "cast", "conjunct", "gather", "where", "neutral", "concat", "reshape")


def broken(rule: Rewrite) -> Rewrite:
    """The rule with 0.01 added to its first float result (a factor would be lost where weights are normalised)."""
    cls = type(rule)

    def replace(self, b, m):
        new = cls.replace(self, b, m)
        results = list(new) if isinstance(new, list | tuple) else [new]
        at = next((i for i, v in enumerate(results) if v.dtype.is_float), None)
        if at is None:
            return new
        results[at] = b.op("math.add", [results[at], 0.01])
        return tuple(results) if isinstance(new, list | tuple) else results[0]

    broken_cls = dataclasses.dataclass(frozen=True)(type(f"Broken{cls.__name__}", (cls,), {"replace": replace}))
    return broken_cls(**{f.name: getattr(rule, f.name) for f in dataclasses.fields(rule) if f.init})


def fired() -> list[tuple[int, Rewrite]]:
    """(place of the rule set in the pipeline, rule), once for each class, as they fire."""
    graph, found = moec.parse(GRAPH.read_text("utf-8")), {}
    for i, p in enumerate(default_pipeline().passes):
        with limited(None) as applied:
            graph = p.run(graph)
        for a in applied.applications if isinstance(p, RuleSet) else ():
            if not any(word in a.name for word in WITHOUT_NUMBERS):
                found.setdefault(type(a.rule), (i, a.rule))
    return list(found.values())


FIRED = fired()


def test_the_graph_meets_rules_of_every_kind():
    assert len(FIRED) >= 6


@pytest.mark.parametrize(("place", "rule"), FIRED, ids=[r.name for _, r in FIRED])
def test_a_broken_rule_is_found(place, rule):
    passes = list(default_pipeline().passes)
    mutant = broken(rule)
    rules = passes[place].rules
    passes[place] = dataclasses.replace(passes[place], rules=tuple(mutant if r == rule else r for r in rules))
    graph = with_data(moec.parse(GRAPH.read_text("utf-8")))
    culprit = moec.bisect(graph, passes=Pipeline(tuple(passes)), seconds=10)
    assert culprit.culprit == mutant
    assert culprit.pass_index == place
    assert culprit.minimised is not None
    assert len(culprit.minimised.graph) <= 30
