"""Sequences whose length is known while importing: they are lists of values then, and leave no trace in the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moec.frontend.onnx.context import ImportContext
from moec.ir import Value

OPERATORS = {
    "SequenceEmpty", "SequenceConstruct", "SequenceInsert", "SequenceErase", "SequenceAt", "SequenceLength",
    "SplitToSequence", "ConcatFromSequence",
}  # fmt: skip
Item = Value | list[Value]


def build(c: ImportContext, op_type: str, operands: Sequence[Item | None], attrs: dict[str, Any]) -> Item:
    """The result of an operator on sequences: a list where it is one. Raises CompileError for what is known only at run
    time."""
    first = operands[0] if operands else None
    rest = [v if isinstance(v, Value) else None for v in operands[1:]]
    if op_type == "SequenceEmpty":
        return []
    if op_type == "SequenceConstruct":
        return [_tensor(c, v) for v in operands]
    if op_type == "SplitToSequence":
        return _split(c, _tensor(c, first), rest[0] if rest else None, attrs.get("axis", 0), attrs.get("keepdims", 1))
    if not isinstance(first, list):
        raise c.refuse("of anything but a sequence")
    if op_type == "SequenceLength":
        return c.constant(np.array(len(first), np.int64))
    if op_type == "ConcatFromSequence":
        return _concat(c, first, attrs.get("axis", 0), attrs.get("new_axis", 0))
    if op_type == "SequenceInsert":
        place = rest[1] if len(rest) > 1 else None
        at = len(first) if place is None else _position(c, place, len(first), len(first))
        return [*first[:at], _tensor(c, operands[1]), *first[at:]]
    where = rest[0] if rest else None
    at = len(first) - 1 if where is None else _position(c, where, len(first), len(first) - 1)
    if not 0 <= at < len(first):
        raise c.refuse(f"position {at} of {len(first)}", code="type")
    return first[at] if op_type == "SequenceAt" else [*first[:at], *first[at + 1 :]]


def _tensor(c: ImportContext, v: Item | None) -> Value:
    if not isinstance(v, Value):
        raise c.refuse("a sequence, no tensor")
    return v


def _position(c: ImportContext, v: Value, length: int, last: int) -> int:
    """A position up to `last`; a negative one is counted from the end."""
    at = int(c.scalar(v, "the position"))
    if not -length <= at <= last:
        raise c.refuse(f"position {at} of {length}", code="type")
    return at + length if at < 0 else at


def _split(c: ImportContext, x: Value, sizes: Value | None, axis: int, keep: int) -> list[Value]:
    axis = c.norm_axis(axis, x.type.rank)
    extent = x.shape[axis]
    if not isinstance(extent, int):
        raise c.refuse(f"into pieces of an axis of unknown size {extent}")
    if sizes is None:
        pieces = [1] * extent
    else:
        given = c.ints(sizes, "split") or ()
        if sizes.type.rank:
            pieces = list(given)
        elif not given or given[0] < 1:
            raise c.refuse(f"into pieces of {given}", code="type")
        else:
            pieces = [min(given[0], extent - i) for i in range(0, extent, given[0])]
    if sum(pieces) != extent:
        raise c.refuse(f"pieces {pieces} of {extent}", code="type")
    parts, start = [], 0
    for size in pieces:
        parts.append(c.slice(x, axis, start, start + size))
        start += size
    if sizes is None and not keep:
        parts = [c.reshape(p, [s for i, s in enumerate(p.shape) if i != axis]) for p in parts]
    return parts


def _concat(c: ImportContext, items: list[Value], axis: int, new_axis: int) -> Value:
    if not items:
        raise c.refuse("of nothing", code="type")
    if new_axis:
        at = c.norm_axis(axis, items[0].type.rank + 1)
        items = [c.reshape(v, (*v.shape[:at], 1, *v.shape[at:])) for v in items]
        return c.concat(items, at)
    return c.concat(items, c.norm_axis(axis, items[0].type.rank))
