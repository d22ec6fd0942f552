"""Outputs of each token's chosen experts, taken from those of all experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from moec.ir import Value
from moec.passes.moe.axes import Axis, Named, Piece, flattened
from moec.passes.moe.combine import num_experts
from moec.passes.moe.stacked_mlp import NotExpertsError, moved
from moec.passes.moe.structure import counts_up, producer, through
from moec.passes.rewrite import Match
from moec.passes.rewriting.match_values import scalar_constant

F = TypeVar("F")


def either_way(m: Match, find: Callable[[Match, Value, Value], F]) -> F:
    """What is found where outputs `m.y` are multiplied by `m.factors`, or the two the other way round. Raises the
    NotExpertsError that came nearer."""
    refusals = []
    for y, factors in ((m.y, m.factors), (m.factors, m.y)):
        try:
            return find(m, y, factors)
        except NotExpertsError as e:
            refusals.append(e)
    raise max(refusals, key=lambda e: e.near)


def picked_outputs(v: Value) -> tuple[Value, Value, Value] | None:
    """(outputs of all experts, expert ids [..., k], the index) where v takes those of each token's experts."""
    elements, rows = producer(v, "tensor.gather_elements"), producer(v, "tensor.gather")
    if elements is not None:
        outputs, index = elements.operands
        ids = moved(_unwrapped(moved(index)))
        return (outputs, ids, index) if ids is not None and ids.type.rank >= 2 else None
    if rows is None or rows.attrs["axis"] != 0 or rows.operands[0].weight is not None:
        return None
    table, index = rows.operands
    total = producer(index, "math.add")
    outputs = through(table, "tensor.reshape")
    for base, ids in (total.operands, total.operands[::-1]) if total is not None else ():
        scaled = producer(base, "math.mul")
        for count, factor in (scaled.operands, scaled.operands[::-1]) if scaled is not None else ():
            tokens = through(count, "tensor.reshape")
            number = scalar_constant(factor)
            if number is None or outputs is None or ids.type.rank != 2 or not counts_up(tokens):
                continue
            first = count.shape == (ids.shape[0], 1) and table.shape == (ids.shape[0] * number, outputs.shape[-1])
            if first and outputs.type.rank == 3 and outputs.shape[:2] == (ids.shape[0], number):
                return outputs, ids, index
    return None


def _unwrapped(index: Value | None) -> Value | None:
    """Expert ids without a remainder that changes none of them."""
    rest = producer(index, "math.mod")
    ids, divisor = (moved(rest.operands[0]), scalar_constant(rest.operands[1])) if rest is not None else (None, None)
    num = num_experts(ids) if ids is not None else None
    return ids if num is not None and isinstance(divisor, int) and num <= divisor else index


def name_picked(names: Named, tokens: Axis, num: Any, v: Value, experts: Value) -> None:
    """Names the gathered outputs [tokens, choice, out]. Raises NotExpertsError where other axes are gathered."""
    node = v.producer
    assert node is not None
    outputs, index = node.operands
    axes = names.axes(outputs)
    names.name(experts, tokens, "choice", experts.shape[-1])
    taken = names.axes(index) if node.op == "tensor.gather_elements" else None
    expert, choice, channel = Piece("expert", num), Piece("choice", experts.shape[-1]), Piece("out", v.shape[-1])
    if node.op == "tensor.gather" and axes is not None and flattened(axes) == (*tokens, expert, channel):
        names.known[v] = (*(names.known[experts] or ()), (channel,))
        return
    if axes is not None and taken is not None:
        at = node.attrs["axis"] % len(axes)
        others = [a in (b, ()) or b == () or b[0].name == "*" for a, b in zip(axes, taken, strict=True)]
        wanted = () if choice.size == 1 else (choice,)
        if axes[at] == (expert,) and taken[at] == wanted and all(o for i, o in enumerate(others) if i != at):
            names.known[v] = tuple(wanted if i == at else a for i, a in enumerate(axes))
            return
    raise NotExpertsError("what is gathered is not each token's chosen experts", v, near=True)
