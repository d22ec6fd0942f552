"""Where two backends first part: values inside, in order, past near-tied routing; then which node is to blame."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from moec.backends import BACKENDS, Backend, get_backend
from moec.comparing.contenders import Contender, Fresh
from moec.comparing.execute import binding_of
from moec.comparing.nodes import NodeResult, isolate
from moec.comparing.result import Divergence
from moec.comparing.routing import RoutingFlip
from moec.comparing.store import Store, Values
from moec.difference import difference
from moec.ir import Node, Value
from moec.ir.arrays import copied
from moec.tolerance import Bound, Tolerance, end_to_end, given_bound, one_node, scale_of

Step = Callable[[str], None]


@dataclass
class Localised:
    """What was found of one contender. `reference`: what its outputs are to be compared with, which is another run
    than the plain one where routing was pinned; `bounds`: of the reference's values, end to end."""

    reference: Values
    bounds: Mapping[Value, Bound]
    flips: list[RoutingFlip] = field(default_factory=list)
    rows: list[NodeResult] = field(default_factory=list)
    first: Divergence | None = None


def localise(
    guide: Contender,
    plain: Values,
    other: Contender,
    theirs: Store,
    pairs: Mapping[Value, Value],
    inputs: Sequence[torch.Tensor],
    tolerance: Tolerance,
    folder: Path,
) -> Localised:
    """Compare the values of `other` (in `theirs`) with those of a plain run of `guide`. pairs: values of the guide's
    graph and of the other's that are the same."""
    assert other.legal is not None
    got = Values(other.legal, theirs)
    known = {mine: yours for mine, yours in pairs.items() if mine in plain and yours in got}
    bounds = bounds_of(plain, tolerance)
    found = Localised(plain, bounds)
    routed = [n for n in plain.graph.nodes if n.op == "moe.route" and n.results[1] in known]
    differing = [n for n in routed if not torch.equal(plain.get(n.results[1]), got.get(known[n.results[1]]))]
    if differing and isinstance(guide, Fresh) and guide.interprets:
        names = {mine: f"v{got.index[yours]}" for mine, yours in known.items() if yours.weight is None}
        chosen = {n.results[1]: names[n.results[1]] for n in routed if n.results[1] in names}
        logits = {v: names[v] for n in routed if (v := n.operands[0]) is not None and v in names}
        store, found.flips = guide.run_pinned(
            inputs, folder, other.name, chosen, logits, theirs, lambda node: _margin(node, plain, bounds)
        )
        found.reference = Values(plain.graph, store, plain.legal_for)
    for node in plain.graph.nodes:
        operands = {v: found.reference.get(v) for v in node.operands if v is not None and v in found.reference}
        for v in node.results:
            if v not in known or node.op == "tensor.constant":
                continue
            expected = found.reference.get(v)
            d = difference(expected, got.get(known[v]), bounds[v], scale_of(expected, node, operands))
            found.rows.append(NodeResult(other.name, node.op, node.location.describe(), node, d))
            if not d.ok and found.first is None:
                where = node.location.describe()
                found.first = Divergence(other.name, node, where, d.max_error, d.tolerance, d.why)
    return found


def bounds_of(values: Values, tolerance: Tolerance) -> dict[Value, Bound]:
    """End-to-end bounds of a graph's values, under a tolerance that the user may have given."""
    bounds = end_to_end(values.graph, binding_of(values))
    return {v: given_bound(b, tolerance, v.producer) for v, b in bounds.items()}


def _margin(node: Node, values: Values, bounds: Mapping[Value, Bound]) -> float:
    """What rounding may move selection scores by, where the other's logits are not known."""
    logits = node.operands[0]
    assert logits is not None
    relative = bounds[logits].relative if logits in bounds else 0.0
    return 2 * relative * max(1.0, scale_of(values.get(logits), None, {}))


def blame(
    found: Localised, other: Contender, theirs: Store, pairs: Mapping[Value, Value], tolerance: Tolerance, step: Step
) -> Divergence:
    """The node at fault for `found.first`: of what leads to it, the first that is out of tolerance on the reference's
    own operands; where none is, the one at which it was seen."""
    first = found.first
    assert first is not None
    if other.settings is None or other.legal is None:
        return first
    suspects = _suspects(first.node, found.reference, Values(other.legal, theirs), pairs)
    for row in other.nodes(found.reference, suspects, tolerance, step):
        if not row.ok:
            return divergence_of(row, found.reference)
    return replace(first, case=_case(first.node, found.reference))


def divergence_of(row: NodeResult, values: Values, moves: bool = False) -> Divergence:
    """A node that is out of tolerance by itself, as a divergence. moves: see `isolate`."""
    d = row.difference
    why = row.problem or d.why
    # a contender is called "onnxruntime #2", "onnxruntime untuned", "compiled onnxruntime"
    name = next((n for n in row.backend.split() if n in BACKENDS), None)
    case = _case(row.node, values, None if name is None else get_backend(name), moves)
    return Divergence(row.backend, row.node, row.location, d.max_error, d.tolerance, why, True, case)


def _case(node: Node, values: Values, backend: Backend | None = None, moves: bool = False):
    graph, fed = isolate([node], values, binding_of(values), backend, moves)
    return graph, tuple(copied(t) for t in fed)


def _suspects(node: Node, reference: Values, got: Values, pairs: Mapping[Value, Value]) -> list[Node]:
    """The node and what leads to it, up to values that agree as closely as one op of equal operands does."""
    binding = binding_of(reference)
    chosen: set[Node] = set()
    waiting = [node]
    while waiting:
        n = waiting.pop()
        if n in chosen or not all(v is None or v in reference for v in n.operands):
            continue
        chosen.add(n)
        for v in n.operands:
            if v is not None and v.producer is not None and not _close(v, reference, got, pairs, binding):
                waiting.append(v.producer)
    return [n for n in reference.graph.nodes if n in chosen]


def _close(v: Value, reference: Values, got: Values, pairs: Mapping[Value, Value], binding: Mapping[str, int]) -> bool:
    other = pairs.get(v)
    if v.producer is None or other is None or other not in got or v not in reference:
        return False
    expected = reference.get(v)
    bound = one_node(v.producer, v, binding)
    close = Bound(bound.relative / 4, "", typical=bound.typical / 4)
    return difference(expected, got.get(other), close, scale_of(expected, None, {})).ok
