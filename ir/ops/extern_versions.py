"""Which meaning of an operator ONNX's reference evaluator has: it keeps classes for few of the older ones and takes the
newest for all others, without a word. Those of Softmax and its like, which old models are full of, are here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.ir.errors import CompileError
from moec.ir.ops.extern import table

if TYPE_CHECKING:
    from onnx import NodeProto
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


def older_operators(node: NodeProto, opset: int) -> list[type]:
    """Classes for the evaluator of what it would take for something newer in a node and its bodies. Raises CompileError
    for what there is no class of."""
    rows = _of_rows() if opset < 13 else {}
    for name in _operators(node):
        if name not in rows and not evaluator_knows(name, opset):
            raise CompileError(
                f"{name} meant something else in opset {opset} than what ONNX's reference evaluator computes",
                code="execution",
            )
    return list(rows.values())


def _operators(node: NodeProto) -> Iterator[str]:
    if node.domain in ("", "ai.onnx"):
        yield node.op_type
    for a in node.attribute:
        for graph in ([a.g] if a.HasField("g") else []) + list(a.graphs):
            for inner in graph.node:
                yield from _operators(inner)


@cache
def _of_rows() -> dict[str, type]:
    """Until opset 12: over all axes from `axis` on, which is 1 where it is not said."""
    from onnx.reference.op_run import OpRun

    def operator(name: str, of: Callable[[np.ndarray], np.ndarray]) -> type:
        def run(self: Any, x: np.ndarray, axis: int | None = None) -> tuple[np.ndarray]:
            said = [a.i for a in self.onnx_node.attribute if a.name == "axis"]  # another default is filled in
            axis = said[0] if said else 1
            axis += x.ndim if axis < 0 else 0
            rows = x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))
            return (of(rows).astype(x.dtype).reshape(x.shape),)

        return type(name, (OpRun,), {"op_domain": "", "_run": run})

    return {
        "Softmax": operator("Softmax", lambda x: np.exp(_log_softmax(x))),
        "LogSoftmax": operator("LogSoftmax", _log_softmax),
        "Hardmax": operator("Hardmax", lambda x: np.arange(x.shape[1]) == x.argmax(1)[:, None]),
    }


def _log_softmax(x: np.ndarray) -> np.ndarray:
    below = x - x.max(1, keepdims=True, initial=-np.inf)
    return np.asarray(below - np.log(np.exp(below).sum(1, keepdims=True)))
