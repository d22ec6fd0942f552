"""Which meaning of an operator ONNX's reference evaluator has: it keeps classes for few of the older ones and takes the
newest for all others, without a word."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from moec.ir.ops.extern import table

if TYPE_CHECKING:
    from onnx.defs import OpSchema

_WITHOUT_EFFECT = {"consumed_inputs"}  # attributes of opset 1 that say what may be overwritten
# an attribute that came later, whose default is not what there was before
_CHANGED = {("Resize", 10), ("RoiAlign", 10)}


@cache
def evaluator_knows(op_type: str, opset: int) -> bool:
    """Whether the evaluator gives an operator of ai.onnx the meaning that it has in an opset."""
    from onnx.reference.ops import load_op

    versions = table().get(("", op_type), [])
    now = [s for s in versions if s.since_version <= opset]
    if not now:
        return False
    try:
        found, newest = (load_op("", op_type, s.since_version) for s in (now[-1], versions[-1]))
    except Exception:  # it raises classes of its own for what it does not have: the body of a function, if any, is run
        return True
    if found is not newest:  # a class of its own
        return True
    return (op_type, now[-1].since_version) not in _CHANGED and _said_alike(now[-1], versions[-1])


def _said_alike(old: OpSchema, new: OpSchema) -> bool:
    """Whether what a node says under the old schema says the same under the new: an axis by another default, or
    operands aligned by attributes, were another operator."""
    before, after = _attributes(old), _attributes(new)
    operands = [i.name for i in new.inputs[: len(old.inputs)]] == [i.name for i in old.inputs]
    return len(old.inputs) <= len(new.inputs) and operands and all(after.get(n) == a for n, a in before.items())


def _attributes(schema: OpSchema) -> dict[str, Any]:
    from onnx.helper import get_attribute_value

    return {
        name: (a.type, get_attribute_value(a.default_value) if a.default_value.name else None)
        for name, a in schema.attributes.items()
        if name not in _WITHOUT_EFFECT
    }
