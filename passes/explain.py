"""Why a rule did not fire: the best partial match, from the same matcher."""

from __future__ import annotations

from moec.ir import Graph
from moec.ir.printer import excerpt
from moec.passes.matcher import Failure, Matcher
from moec.passes.rewrite import Match, Rewrite, compiled_pattern, source_of


def explain(rule: Rewrite, graph: Graph, at: str | None = None) -> str:
    """The rule's matches in `graph`, or its best partial match with the node where it failed.

    `at` limits the search to nodes of a module path ("layers.3.mlp").
    """
    pattern = compiled_pattern(rule)
    root = pattern.roots[0].node.opdef
    head = f"{rule.name} ({source_of(rule)})"
    nodes = [n for n in graph.find(root.name, unique=True) if at is None or n.location.under(at)]
    where = f" in {at}" if at else ""
    if not nodes:
        return f"{head}: there is no {root.name}{where}, the root of its pattern"
    best = Failure()
    fires, refused = [], []
    for node in nodes:
        failure = Failure()
        matched = False
        for bindings in Matcher(pattern, failure).at(node):
            matched = True
            m = Match(bindings, pattern)
            verdict = rule.when(m)
            if verdict is None:
                fires.append(node)
                break
            refused.append((node, verdict))
        if not matched and failure.matched > best.matched:
            best = failure
    lines = [f"{head}: {len(nodes)} candidates ({root.name}){where}, {len(fires)} match, {len(refused)} refused"]
    for node, verdict in refused[:5]:
        spot = verdict.at.location if verdict.at is not None and verdict.at.location else node.location
        lines.append(f"  refused at {spot.describe()}: {verdict.reason}")
    lines += [f"  fires at {node.location.describe()}" for node in fires[:5]]
    if not fires and not refused and best.node is not None:
        lines.append(f"  best partial match: {best.matched} of {len(pattern.nodes)} nodes, then at")
        lines.append(f"  {best.node.op}, {best.node.location.describe()}")
        lines += [f"    expected {best.expected}", f"    found    {best.found}"]
        lines += [f"    {row}" for row in excerpt(best.node).splitlines()]
    return "\n".join(lines)
