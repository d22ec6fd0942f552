"""If and Loop where their way is known while importing: the bodies' nodes take their place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir

from moec.ir import Value

if TYPE_CHECKING:
    from moec.frontend.onnx.importer import Importer

MOST_ITERATIONS = 64  # unrolled; longer loops stay loops


def inlined(importer: Importer, node: onnx_ir.Node, operands: list[Value | None]) -> list[Value | None] | None:
    """The results of a branch that is always taken, or of a loop unrolled; None where that is not known."""
    c = importer.context
    if node.op_type == "If":
        condition = c.array(operands[0])
        if condition is None or condition.size != 1:
            return None
        taken = node.attributes["then_branch" if bool(condition.reshape(-1)[0]) else "else_branch"].as_graph()
        return list(_body(importer, taken, []))
    if node.op_type == "Loop":
        return _loop(importer, node, operands)
    return None


def _body(importer: Importer, body: onnx_ir.Graph, arguments: list[Value]) -> list[Value]:
    """Import the nodes of a body; what it defines is forgotten, so that it can be imported again."""
    before = dict(importer.env)
    for v, argument in zip(body.inputs, arguments, strict=True):
        importer.env[v] = argument
    for name, v in body.initializers.items():
        assert v.const_value is not None
        importer.env[v] = importer.context.constant(v.const_value.numpy(), str(name))
    for i, node in enumerate(body):
        importer._node(node, i)
    results = [importer.env[v] for v in body.outputs]
    importer.env = before
    return results


def _loop(importer: Importer, node: onnx_ir.Node, operands: list[Value | None]) -> list[Value | None] | None:
    """A loop of a known, small number of iterations whose body never ends it early."""
    c = importer.context
    count, start = (operands[i] if i < len(operands) else None for i in (0, 1))
    trips, going = c.array(count), c.array(start)
    if trips is None or not 0 <= int(trips.reshape(-1)[0]) <= MOST_ITERATIONS:
        return None
    if start is not None and (going is None or not bool(going.reshape(-1)[0])):
        return None
    body = node.attributes["body"].as_graph()
    if not _keeps_going(body):
        return None
    carried: list[Any] = list(operands[2:])
    if any(v is None for v in carried):
        return None
    collected: list[list[Value]] = [[] for _ in body.outputs[1 + len(carried) :]]
    if collected and int(trips.reshape(-1)[0]) == 0:
        return None
    for i in range(int(trips.reshape(-1)[0])):
        index = c.constant(np.array(i, np.int64))
        results = _body(importer, body, [index, c.constant(np.array(True)), *carried])
        carried = results[1 : 1 + len(carried)]
        for rows, v in zip(collected, results[1 + len(carried) :], strict=True):
            rows.append(c.reshape(v, (1, *v.shape)))
    return [*carried, *(c.concat(rows, 0) for rows in collected)]


def _keeps_going(body: onnx_ir.Graph) -> bool:
    """Whether the body's condition is the one it was given, or always true."""
    condition = body.outputs[0]
    while condition.producer() is not None and condition.producer().op_type == "Identity":  # type: ignore[union-attr]
        condition = condition.producer().inputs[0]  # type: ignore[union-attr,assignment]
    if condition is body.inputs[1]:
        return True
    value = onnx_ir.convenience.get_const_tensor(condition)
    return value is not None and bool(value.numpy().reshape(-1)[0])
