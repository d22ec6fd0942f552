"""Is a rule right? What it makes of a graph, what it leaves alone, and whether the meaning stays.

    def test_fuse_swiglu():
        check_rewrite(FuseSwiGLU(), BEFORE, AFTER)

Graphs are given as `Graph` or as text. Every failure is an AssertionError that names the rule and its file:line;
`__tracebackhide__` has pytest show the line of the test, not those of this file.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from moec.graph_text import canonical_text, graph_diff
from moec.ir import CompileError, Graph, parse
from moec.ir.cases import with_data
from moec.ir.weight import Weight, digest
from moec.meaning import Meaning, accusation, overflow_with_large_weights
from moec.passes import Pass, Record, Rewrite, RuleSet, explain, run_pass
from moec.passes.rewriting.engine import source_of

# weights up to this many bytes are checked for changes of their data
_DIGEST_LIMIT = 64 << 20


def check_rewrite(
    rule: Pass, before: Graph | str, after: Graph | str, *, tolerance: float | None = None, seed: int = 0
) -> Graph:
    """`rule` turns `before` into `after`, and both mean the same. Returns the result.

    The result is compared as text (node order, locations, origins and unused weights do not count); applied to its
    own result the rule changes nothing; `before` is left as it was; and result and `before` give the same outputs,
    see `check_pass`. Raises AssertionError with the rule's file:line and a diff, or with `moec.explain` where the
    rule does not fire.
    """
    __tracebackhide__ = True
    head = describe(rule)
    source, wanted = with_data(_graph(before, "before", head), seed), _graph(after, "after", head)
    start, expected = (canonical_text(g, unused_weights=False) for g in (source, wanted))
    if start == expected:
        raise AssertionError(f"{head}: before and after are the same graph; to show that it stays, use check_unchanged")
    result, record = _checked(rule, source, tolerance, seed)
    got = canonical_text(result, unused_weights=False)
    if got == start:
        raise AssertionError(f"{head} changes nothing\n{indent(why_not(rule, source, record))}")
    if got != expected:
        changes = graph_diff(wanted, result, ("expected", "got"), unused_weights=False)
        raise AssertionError(f"{head} gives another graph than expected\n{changes}")
    return result


def check_unchanged(rule: Pass, graph: Graph | str, because: str | None = None) -> None:
    """`rule` leaves `graph` as it is, and says `because` (part of a reason that `when` refuses with, or of what
    `moec.explain` prints). Raises AssertionError with the diff, or with the reasons that were given instead."""
    __tracebackhide__ = True
    head = describe(rule)
    source = with_data(_graph(graph, "the graph", head))
    start = canonical_text(source)
    result, record = apply_checked(rule, source)
    got = canonical_text(result)
    if got != start:
        fired = ", ".join(f"{n} × {k}" for k, n in record.fired.items())
        changes = graph_diff(source, result)
        raise AssertionError(f"{head} changes the graph{f' ({fired})' if fired else ''}\n{changes}")
    if because is not None:
        reasons = why_not(rule, source, record)
        if because not in reasons:
            raise AssertionError(
                f"{head} leaves the graph alone, but not because of {because!r}; it says\n{indent(reasons)}"
            )


def check_pass(pass_: Pass, graph: Graph | str, *, tolerance: float | None = None, seed: int = 0) -> Graph:
    """`pass_` gives a graph that verifies and means the same, changes nothing when applied to its own result (or
    refuses, where its class says `once = True`), and leaves its input as it was. Returns the result.

    The meaning: both graphs run in the interpreter with floats in float64 (see `moec.ir.promote` for what keeps
    its dtype) on seeded inputs, under at least three sizes of the dims (all 1, odd and distinct, larger; 0 where the
    graph runs there), and where experts are chosen also with tied logits and all tokens sent to one expert. Weights
    without data get seeded data. `tolerance` is relative to the largest magnitude of an output: for passes that
    round, such as quantisation. Warns where a single rule fires nowhere. Raises AssertionError naming the pass's
    file:line.
    """
    __tracebackhide__ = True
    head = describe(pass_)
    source = with_data(_graph(graph, "the graph", head), seed)
    result, record = _checked(pass_, source, tolerance, seed)
    if isinstance(pass_, Rewrite) and not record.fired:
        warnings.warn(f"{head} fires nowhere in this graph, so nothing was compared", stacklevel=2)
    elif not record.fired and canonical_text(source) == canonical_text(result):
        warnings.warn(f"{head} changes nothing in this graph, so nothing was compared", stacklevel=2)
    return result


# -- steps, which the text tests share -------------------------------------------------------------


def apply_checked(p: Pass, graph: Graph) -> tuple[Graph, Record]:
    """Result and record of one pass. Raises AssertionError where it fails or changes its input, the data of its
    weights included; the pass works on a copy, so that `graph` stays as it is all the same."""
    __tracebackhide__ = True
    head = describe(p)
    data = _data(graph)
    try:
        result, record = run_pass(p, graph.clone())
    except CompileError as e:
        raise AssertionError(f"{head} fails\n{indent(str(e))}") from e
    changed = [name for name, d in _data(graph).items() if data.get(name) != d]
    if changed:
        raise AssertionError(f"{head} changes the data of weight {changed[0]!r} in place")
    return result, record


def check_meaning(head: str, before: Graph, after: Graph, tolerance: float | None = None, seed: int = 0) -> None:
    """Both give the same outputs, see `check_pass`; `head` starts the message. Raises AssertionError with the first
    difference, and where nothing can be compared."""
    __tracebackhide__ = True
    meaning = meaning_of(head, before, tolerance, seed)
    difference = meaning.difference(after)
    if difference is not None:
        raise AssertionError(f"{head} changes the meaning: {difference}\n{graph_diff(before, after)}")
    _check_says_something(head, meaning)


def meaning_of(head: str, graph: Graph, tolerance: float | None, seed: int) -> Meaning:
    """What a graph means. Raises AssertionError where it does not run."""
    __tracebackhide__ = True
    try:
        return Meaning(graph, tolerance, seed)
    except CompileError as e:
        hint = "references run in float64 here; an op that knows other floats only refuses it in infer()"
        raise AssertionError(f"{head}: the graph itself does not run\n{indent(str(e))}\n  ({hint})") from e


def _check_says_something(head: str, meaning: Meaning) -> None:
    __tracebackhide__ = True
    vacuous = meaning.oracle.vacuous()
    if vacuous:
        raise AssertionError(
            f"{head}: output {vacuous[0]!r} of the graph is mostly NaN or empty in every case, so that little is "
            "compared; give a graph that means something on normal or positive inputs"
        )


def check_idempotent(head: str, passes: Sequence[Pass], result: Graph) -> None:
    """Run again on their result, the passes change nothing. Passes with a `max` of applications are not asked to;
    those that say `once = True` (a class attribute) may refuse instead. Raises AssertionError with the diff."""
    __tracebackhide__ = True
    if any(getattr(p, "max", None) is not None for p in passes):
        return
    again = result
    for p in passes:
        try:
            again, _ = run_pass(p, again)
        except CompileError as e:
            if getattr(p, "once", False):
                return
            raise AssertionError(f"{head} fails on its own result\n{indent(str(e))}") from e
    first, second = canonical_text(result), canonical_text(again)
    if first != second:
        raise AssertionError(f"{head} changes its own result when run again\n{graph_diff(result, again)}")


def why_not(rule: Pass, graph: Graph, record: Record) -> str:
    """All that is known of why a rule did not fire: refusals, and the best partial match of every rule in it."""
    reasons = list(dict.fromkeys(str(r) for r in record.refused))
    rules: list[Any] = [rule] if isinstance(rule, Rewrite | RuleSet) else list(getattr(rule, "rules", ()))
    reasons += [explain(r, graph) for r in rules if isinstance(r, Rewrite | RuleSet)]
    return "\n".join(reasons) or "nothing: no rule of it came near"


def describe(rule: Any) -> str:
    """The rule and its file:line. Raises AssertionError for anything but a pass."""
    __tracebackhide__ = True
    if isinstance(rule, type):
        raise AssertionError(f"{rule.__name__} is a class; give an instance, {rule.__name__}()")
    if not isinstance(rule, Pass):
        raise AssertionError(f"{rule!r} is not a Pass or Rewrite")
    kind = "rule" if isinstance(rule, Rewrite) else "pass"
    return f"{kind} {rule.name} ({source_of(rule)})"


def indent(text: str) -> str:
    return "\n".join("  " + row for row in text.splitlines())


def _checked(rule: Pass, graph: Graph, tolerance: float | None, seed: int) -> tuple[Graph, Record]:
    """The result of the rule with everything checked but what it looks like."""
    __tracebackhide__ = True
    head = describe(rule)
    result, record = apply_checked(rule, graph)
    meaning = meaning_of(head, graph, tolerance, seed)
    difference = meaning.difference(result)
    if difference is not None:
        why = accusation(rule, graph, result, meaning.difference)
        raise AssertionError(f"{head} changes the meaning: {difference}\n{why}")
    _check_says_something(head, meaning)
    overflow = overflow_with_large_weights(rule, graph, result, seed)
    if overflow is not None:
        large, fault = overflow
        wrong, _ = run_pass(rule, large.clone())
        raise AssertionError(
            f"{head} changes the meaning where weights are large (float matrices times 10⁴): {fault(wrong)}\n"
            f"{accusation(rule, large, wrong, fault)}"
        )
    check_idempotent(head, [rule], result)
    return result, record


def _data(graph: Graph) -> dict[str, str]:
    found: dict[str, str] = {}
    for function, g in (("", graph), *graph.functions.items()):
        for name, v in g.weights.items():
            size = v.type.nbytes
            if v.weight is not None and v.weight.source is not None and isinstance(size, int) and size < _DIGEST_LIMIT:
                found[f"{function}.{name}" if function else name] = _digest(v.weight)
    return found


def _digest(weight: Weight) -> str:
    try:
        return digest(weight.load())
    except CompileError as e:
        if e.code != "weight-changed":
            raise
        return "changed"


def _graph(graph: Graph | str, what: str, head: str) -> Graph:
    __tracebackhide__ = True
    try:
        if isinstance(graph, str):
            return parse(graph)
        graph.verify()
    except CompileError as e:
        raise AssertionError(f"{head}: {what} is not a valid graph\n{indent(str(e))}") from e
    return graph
