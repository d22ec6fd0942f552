"""Why a rule did not fire: the best partial match, from the same matcher."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from moec.ir import ArgumentTypeError, Graph, Node
from moec.ir.printer import excerpt
from moec.passes.rewrite import Rewrite, RuleSet
from moec.passes.rewriting.bindings import Failure
from moec.passes.rewriting.engine import compiled_patterns, source_of, verdict
from moec.passes.rewriting.match import Match, Refused
from moec.passes.rewriting.matcher import Matcher


def explain(rule: Rewrite | RuleSet, graph: Graph, at: str | None = None) -> str:
    """The rule's matches in `graph`, or its best partial match with the node where it failed: what the
    pattern expected there, what it found, and the source of both. A RuleSet explains each of its rules.

    `at` limits the search to nodes of a module path ("layers.3.mlp"). Raises ArgumentTypeError for anything
    but a rule and a graph.
    """
    if not isinstance(graph, Graph):
        raise ArgumentTypeError(
            f"explain takes a Graph, got {type(graph).__name__}",
            code="arguments",
            hint="moec.trace(model, args) gives it",
        )
    if isinstance(rule, RuleSet):
        return "\n\n".join(explain(r, graph, at) for r in rule.rules)
    if not isinstance(rule, Rewrite):
        hint = f"write {rule.__name__}()" if isinstance(rule, type) else None
        hint = f"moec.passes.parse_pass({rule!r}) gives the rule of that name" if isinstance(rule, str) else hint
        raise ArgumentTypeError(f"{rule!r} is not a Rewrite or RuleSet", code="arguments", hint=hint)
    patterns = compiled_patterns(rule)
    where = f" in {at}" if at else ""
    head = f"{rule.name} ({source_of(rule)})"
    roots = list(dict.fromkeys(p.roots[0].node.opdef.name for p in patterns))
    found = {op: _nodes(graph, op, at) for op in roots}
    if not any(found.values()):
        text = f"{head}: there is no {' or '.join(roots)}{where}, the root of its pattern"
        return text + (_modules_near(graph, at) if at else "")
    fires: list[Node] = []
    refused: list[tuple[Node, Refused]] = []
    best, size = Failure(), 0
    for pattern in patterns:
        for node in found[pattern.roots[0].node.opdef.name]:
            failure = Failure()
            said: Refused | None = None
            matched = False
            for bindings in Matcher(pattern, failure).at(node):
                matched = True
                said = verdict(rule, Match(bindings, pattern))
                if said is None:
                    fires.append(node)
                    break
            if said is not None:
                refused.append((node, said))
            if not matched and failure.matched > best.matched:
                best, size = failure, len(pattern.nodes)
    count = sum(map(len, found.values()))
    head += f": {count} candidates ({', '.join(roots)}){where}, {len(fires)} match, {len(refused)} refused"
    lines = [head]
    for node, said in refused[:5]:
        spot = said.at.location if said.at is not None and said.at.location else node.location
        lines.append(f"  refused at {spot.describe()}: {said.reason}")
    lines += [f"  fires at {node.location.describe()}" for node in fires[:5]]
    if not fires and not refused and best.node is not None:
        lines += _partial(rule, best, size)
    return "\n".join(lines)


def _nodes(graph: Graph, op: str, at: str | None) -> list[Node]:
    return [n for n in graph.find(op, unique=True) if at is None or n.location.under(at)]


def _partial(rule: Rewrite, best: Failure, size: int) -> Sequence[str]:
    assert best.node is not None
    node = best.value.producer if best.value is not None and best.value.producer is not None else best.node
    return [
        f"  best partial match: {min(best.matched, size)} of {size} nodes, then at",
        f"  {node.op}, {node.location.describe()}",
        f"    expected {best.expected}   (pattern at {_pattern_source(rule)})",
        f"    found    {best.found}",
        *(f"    {row}" for row in excerpt(node).splitlines()),
    ]


def _pattern_source(rule: Rewrite) -> str:
    method = type(rule).pattern
    try:
        return f"{inspect.getsourcefile(method)}:{inspect.getsourcelines(method)[1]}"
    except (OSError, TypeError):
        return source_of(rule)


def _modules_near(graph: Graph, at: str) -> str:
    """Module paths that the graph does have, where `at` names none."""
    modules = {f.module for n in graph.nodes for f in n.location.frames if f.module}
    if any(m == at or m.startswith(at + ".") for m in modules):
        return ""
    import difflib

    near = difflib.get_close_matches(at, modules, 3)
    return f"\n  no node lies in {at!r}" + (f"; did you mean {', '.join(near)}?" if near else "")
