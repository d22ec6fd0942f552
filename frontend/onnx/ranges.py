"""Between which numbers the elements of an integer tensor lie, and tensors all of whose elements are one number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moec.frontend.onnx.context import ImportContext, Size
from moec.ir import Dim, DType, Value
from moec.ir.types import broadcast

_SAME = {"tensor.reshape", "tensor.transpose", "tensor.expand", "tensor.slice", "tensor.gather", "tensor.split"}
_INDICES = {"math.sort", "math.topk"}  # their second results
_DEEPEST = 32


def bounds(c: ImportContext, v: Value, depth: int = 0) -> tuple[Size, Size] | None:
    """(least, greatest) that the elements of v may be; None where that is not known."""
    known, sizes = c.array(v), c.elements(v)
    if known is not None and known.dtype.kind in "iu" and known.size:
        return int(known.min()), int(known.max())
    if sizes is not None and len(sizes) == 1:
        return sizes[0], sizes[0]
    node = v.producer
    if node is None or not v.dtype.is_integer or depth > _DEEPEST:
        return None
    first = next((o for o in node.operands if o is not None), None)
    if node.op in _INDICES and v.index == 1 and first is not None:
        return 0, first.shape[node.attrs["axis"]] - 1
    if node.op == "math.argmax" and first is not None:
        return 0, first.shape[node.attrs["axis"]] - 1
    if node.op == "tensor.nonzero" and first is not None:
        return 0, first.type.numel
    if node.op == "tensor.concat":
        return _joined([bounds(c, o, depth + 1) if o is not None else None for o in node.operands])
    if node.op == "tensor.arange" and isinstance(node.attrs["start"], int) and node.attrs["step"] > 0:
        return node.attrs["start"], node.attrs["end"] - 1
    if node.op == "math.cast" and first is not None and first.dtype.is_integer and v.dtype.bits >= 32:
        return bounds(c, first, depth + 1)
    if (node.op in _SAME or (node.op in _INDICES and v.index == 0)) and first is not None:
        return bounds(c, first, depth + 1)
    return None


def _joined(parts: list[tuple[Size, Size] | None]) -> tuple[Size, Size] | None:
    """Bounds of all of these, which are not negative (what is at most one of several sizes is at most their sum)."""
    highest: Size = 0
    for part in parts:
        if part is None or not isinstance(part[0], int) or part[0] < 0:
            return None
        highest = highest + part[1] if isinstance(part[1], Dim) or isinstance(highest, Dim) else max(highest, part[1])
    return 0, highest


def never_negative(c: ImportContext, v: Value) -> bool:
    found = bounds(c, v)
    return found is not None and isinstance(found[0], int) and found[0] >= 0


def within(c: ImportContext, v: Value, count: int) -> bool:
    """Whether all elements are 0 … count − 1."""
    low, high = bounds(c, v) or (None, None)
    return isinstance(low, int) and isinstance(high, int) and low >= 0 and high < count


# -- one number everywhere ------------------------------------------------------------------------------------------

_COMPARED = ("Less", "LessOrEqual", "Greater", "GreaterOrEqual")
_LOGIC = {"Equal": np.equal, "And": np.logical_and, "Or": np.logical_or, "Xor": np.logical_xor}


def uniform(c: ImportContext, v: Value | None) -> Any:
    """The number that every element of v is; None where that is not known."""
    if v in c.uniform:
        return c.uniform[v]
    known = c.array(v)
    same = known is not None and known.size and (known == known.reshape(-1)[0]).all()
    return known.reshape(-1)[0].item() if known is not None and same else None


def simplified(c: ImportContext, op_type: str, operands: Sequence[Value | None], attrs: dict[str, Any]) -> Value | None:
    """What an operator is that one number everywhere, or the signs of integers, decide: exporters write a division that
    rounds down as one to zero and a correction, which is none for what is never negative. None where nothing is
    known."""
    values = [v for v in operands if v is not None]
    if len(values) != len(operands) or not 1 <= len(values) <= 2:
        return None
    numbers = [uniform(c, v) for v in values]
    found: Any = None
    if op_type in _COMPARED and len(values) == 2:
        found = _compared(c, op_type, values)
    elif op_type in _LOGIC and len(values) == 2 and (values[0].dtype is DType.BOOL or op_type == "Equal"):
        absorbing = {"And": False, "Or": True}.get(op_type)
        if None not in numbers:
            found = bool(_LOGIC[op_type](*numbers))
        elif absorbing is not None and absorbing in [n for n in numbers if n is not None]:
            found = absorbing
    elif op_type == "Not" and numbers[0] is not None:
        found = not numbers[0]
    elif op_type == "Cast" and values[0] in c.uniform and isinstance(numbers[0], bool) and attrs.get("to") in (6, 7):
        return _filled(c, values, int(numbers[0]), DType.I32 if attrs["to"] == 6 else DType.I64)
    elif op_type in ("Add", "Sub") and values[1] in c.uniform and numbers[1] == 0:
        return values[0] if values[0].shape == broadcast(values[0].shape, values[1].shape) else None
    return None if found is None else _filled(c, values, found, DType.BOOL)


def _compared(c: ImportContext, op_type: str, values: list[Value]) -> bool | None:
    """A comparison of numbers between bounds that do not overlap."""
    left, right = (bounds(c, v) for v in values)
    if left is None or right is None:
        return None
    if op_type in ("Greater", "LessOrEqual"):
        left, right = right, left
    strict = op_type in ("Less", "Greater")
    # now: left < right, or not left < right
    if _at_least(left[0], right[1]):
        return not strict
    return strict if _at_least(right[0] - 1, left[1]) else None


def _at_least(a: Size, b: Size) -> bool:
    """Whether a ≥ b whatever the symbols are."""
    more = a - b
    return more >= 0 if isinstance(more, int) else bool(more.expr.is_nonnegative)


def _filled(c: ImportContext, values: list[Value], number: Any, dtype: DType) -> Value:
    shape = values[0].shape
    for v in values[1:]:
        shape = broadcast(shape, v.shape)
    result = c.full(shape, number, dtype)
    c.uniform[result] = number
    return result
