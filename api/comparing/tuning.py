"""What is wrong with a program only as a backend tunes it: a pass that changes the meaning, or a node that it made.

Nodes are named in the program without tuning, where each is one of the model's. Where that program is right and the
tuned one is not, the tuned graph is run in the reference. There it either means something else, and passes are taken
away until it does not; or it means the same, and the nodes that only it has are run on the backend by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from moec.comparing.contenders import Contender
from moec.comparing.localise import divergence_of
from moec.comparing.nodes import NodeResult
from moec.comparing.result import Divergence
from moec.comparing.store import Store, Values
from moec.ir import Graph, Node, Value
from moec.tolerance import Tolerance

Step = Callable[[str], None]


def examine(
    other: Contender, plain: Values, theirs: Store, folder: Path, tolerance: Tolerance, step: Step
) -> tuple[list[NodeResult], Divergence | None]:
    """The nodes that only the tuned program of `other` has, judged by themselves, and the first thing that is wrong.
    plain: the guide's values, of the graph as the model has it, with routing of its own; theirs: a run of `other`."""
    step(f"tuning of {other.name}")
    values, rows = other.interpret(None, plain, theirs, folder / "all", tolerance)
    wrong = next((r for r in rows if not r.ok), None)
    if wrong is not None:
        return _changed(other, plain, theirs, folder, tolerance, wrong)
    own = _made(other)
    rows = other.nodes(values, [n for n in values.graph.nodes if n in own], tolerance, step, moves=True)
    bad = next((r for r in rows if not r.ok), None)
    return rows, None if bad is None else replace(divergence_of(bad, values, True), tuning=_by(other, bad.node))


def tuned_by(other: Contender) -> str:
    """The backend's tuning passes by name."""
    assert other.settings is not None
    return ", ".join(p.name for p in other.settings.tuning_passes)


def _changed(
    other: Contender, plain: Values, theirs: Store, folder: Path, tolerance: Tolerance, wrong: NodeResult
) -> tuple[list[NodeResult], Divergence]:
    """The first pass after which the graph is another in the reference, and the node whose value that is."""
    assert other.settings is not None
    passes = other.settings.tuning_passes
    guilty = passes[-1]
    for count in range(1, len(passes)):
        rows = other.interpret(count, plain, theirs, folder / f"after-{count}", tolerance)[1]
        earlier = next((r for r in rows if not r.ok), None)
        if earlier is not None:
            wrong, guilty = earlier, passes[count - 1]
            break
    d = wrong.difference
    found = Divergence(other.name, wrong.node, wrong.location, d.max_error, d.tolerance, d.why, True)
    return [wrong], replace(found, tuning=guilty.name, meaning=True)


def _made(other: Contender) -> set[Node]:
    """The nodes of the tuned program that it would not have without tuning."""
    assert other.untuned is not None
    assert other.legal is not None
    assert other.untuned.legal is not None
    before = _forms(other.untuned.legal)
    return {n for n in other.legal.nodes if n.op != "tensor.constant" and _form(n) not in before}


def _by(other: Contender, node: Node) -> str:
    """The pass after which the node is as it is in the end."""
    assert other.settings is not None
    passes, form = other.settings.tuning_passes, _form(node)
    for count, p in enumerate(passes[:-1], 1):
        if form in _forms(other.tuned(count)):
            return p.name
    return passes[-1].name


def _forms(graph: Graph) -> set[tuple]:
    return {_form(n) for n in graph.nodes}


def _form(node: Node) -> tuple:
    """What a node is to a lowering: its types, weights, and transposes that its operands come from."""

    def source(v: Value | None) -> tuple:
        if v is None:
            return ()
        moved = v.producer is not None and v.producer.op == "tensor.transpose"
        return (v.weight.name if v.weight is not None else str(v.type), moved)

    results = tuple(str(r.type) for r in node.results)
    return node.op, node.location, repr(node.attrs), tuple(map(source, node.operands)), results
