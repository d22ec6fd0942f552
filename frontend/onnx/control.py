"""If, Loop and Scan: where their way is known while importing, the bodies' nodes take their place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir

from moec.frontend.onnx.assume import Facts, explore
from moec.frontend.onnx.extern import UNKNOWN
from moec.ir import CompileError, Dim, DType, TensorType, Value

if TYPE_CHECKING:
    from moec.frontend.onnx.importer import Importer

SAME = "moec.same"  # of an If that we wrote: its branches mean the same, and this is the plain one
MOST_ITERATIONS = 64  # unrolled; longer loops stay loops
MOST_NODES = 20_000  # of a model whose loops are unrolled


def inlined(importer: Importer, node: onnx_ir.Node, operands: list[Value | None]) -> list[Value | None] | None:
    """The results of a branch that is always taken, or of a loop unrolled; None where that is not known."""
    c = importer.context
    if node.op_type == "If":
        if node.metadata_props.get(SAME) in ("then_branch", "else_branch"):
            return list(_body(importer, node.attributes[node.metadata_props[SAME]].as_graph(), []))
        condition = c.array(operands[0])
        if condition is None or condition.size != 1:
            return None
        taken = node.attributes["then_branch" if bool(condition.reshape(-1)[0]) else "else_branch"].as_graph()
        return list(_body(importer, taken, []))
    if node.op_type == "Loop":
        return _loop(importer, node, operands)
    return _scan(importer, node, operands)


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
    if importer.count > MOST_NODES:
        raise CompileError(f"loops unroll to more than {MOST_NODES} nodes", code="size")
    results = [importer.value(v) for v in body.outputs]
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


def _scan(importer: Importer, node: onnx_ir.Node, operands: list[Value | None]) -> list[Value | None] | None:
    """A scan over a known, small number of rows: states first, then what is scanned, along axis 0 each."""
    c = importer.context
    plain = {"body", "num_scan_inputs"}
    given = {name: a for name, a in node.attributes.items() if name not in plain}
    if c.opset < 9 or any(any(a.value) for a in given.values()) or any(v is None for v in operands):
        return None
    body = node.attributes["body"].as_graph()
    states = len(operands) - node.attributes["num_scan_inputs"].as_int()
    state, scanned = [v for v in operands if v is not None][:states], [v for v in operands if v is not None][states:]
    rows = scanned[0].shape[0] if scanned and scanned[0].type.rank else None
    if not isinstance(rows, int) or not 0 < rows <= MOST_ITERATIONS or any(v.shape[0] != rows for v in scanned):
        return None
    collected: list[list[Value]] = [[] for _ in body.outputs[states:]]
    for i in range(rows):
        taken = [c.reshape(c.slice(v, 0, i, i + 1), v.shape[1:]) for v in scanned]
        results = _body(importer, body, [*state, *taken])
        state = results[:states]
        for kept, v in zip(collected, results[states:], strict=True):
            kept.append(c.reshape(v, (1, *v.shape)))
    return [*state, *(c.concat(kept, 0) for kept in collected)]


def body_types(importer: Importer, body: onnx_ir.Graph, arguments: list[TensorType]) -> list[TensorType]:
    """The types that a body gives for arguments of these types. Raises CompileError where it cannot be imported."""
    return explore(lambda facts: _body_types(importer, body, arguments, facts), {}, importer.facts)


def _body_types(importer: Importer, body: onnx_ir.Graph, arguments: list[TensorType], facts: Facts) -> list[TensorType]:
    from moec.frontend.onnx.importer import Importer

    scratch = Importer(importer.model, {}, importer.folder, facts)
    scratch.opsets, scratch.context.opset = importer.opsets, importer.opsets.get("", 1)
    scratch.context.taken = set(importer.context.taken)
    scratch.lists = {}  # sequences stay outside
    scratch.count = importer.count
    for outer, value in importer.env.items():
        if value in importer.context.arrays:
            scratch.env[outer] = scratch.context.constant(importer.context.arrays[value])
        else:
            scratch.env[outer] = scratch.graph.add_input(f"outer.{len(scratch.graph.inputs)}", value.type)
    values = [scratch.graph.add_input(f"argument.{i}", t) for i, t in enumerate(arguments)]
    return [v.type for v in _body(scratch, body, values)]


def declared(importer: Importer, node: onnx_ir.Node, operands: list[Value | None]) -> list[TensorType | None]:
    """Types of the results of If, Loop and Scan from their bodies; UNKNOWN sizes may differ from run to run."""
    types = [None if v is None else v.type for v in operands]

    def ranks(found: list[TensorType]) -> list[TensorType | None]:
        return [t.with_shape([UNKNOWN] * t.rank) for t in found]

    if node.op_type == "If":
        branches = [node.attributes[a].as_graph() for a in ("then_branch", "else_branch")]
        first, second = (ranks(body_types(importer, b, [])) for b in branches)
        return [a if a == b else None for a, b in zip(first, second, strict=True)]
    body = node.attributes["body"].as_graph()
    if node.op_type == "Loop":
        carried = [t for t in types[2:] if t is not None]
        arguments = [TensorType(DType.I64, ()), TensorType(DType.BOOL, ()), *carried]
        found = body_types(importer, body, arguments)[1:]
        states, rows = found[: len(carried)], found[len(carried) :]
        if states != carried:  # sizes grow from one iteration to the next
            return [*ranks(states), *ranks([t.with_shape([0, *t.shape]) for t in rows])]
        count = _iterations(importer, body, operands)
        return [*states, *(t.with_shape([UNKNOWN if count is None else count, *t.shape]) for t in rows)]
    count = node.attributes["num_scan_inputs"].as_int()
    given = [t for t in types if t is not None]
    states, scanned = given[:-count], given[-count:]
    found = body_types(importer, body, [*states, *(t.with_shape(t.shape[1:]) for t in scanned)])
    return [*ranks(found[: len(states)]), *ranks([t.with_shape([0, *t.shape]) for t in found[len(states) :]])]


def _iterations(importer: Importer, body: onnx_ir.Graph, operands: list[Value | None]) -> int | Dim | None:
    """How often a loop runs, where nothing ends it early; None where that is not known."""
    c = importer.context
    count, start = (operands[i] if i < len(operands) else None for i in (0, 1))
    sizes = None if count is None else c.elements(count)
    going = c.array(start)
    if sizes is None or len(sizes) != 1 or (going is None and start is not None) or not _keeps_going(body):
        return None
    return sizes[0] if going is None or bool(going.reshape(-1)[0]) else 0


def _keeps_going(body: onnx_ir.Graph) -> bool:
    """Whether the body's condition is the one it was given, or always true."""
    condition: onnx_ir.Value | None = body.outputs[0]
    while condition is not None and (maker := condition.producer()) is not None and maker.op_type == "Identity":
        condition = maker.inputs[0]
    if condition is body.inputs[1]:
        return True
    value = None if condition is None else onnx_ir.convenience.get_const_tensor(condition)
    return value is not None and bool(value.numpy().reshape(-1)[0])
