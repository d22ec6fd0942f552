"""Checks of what a lowering from outside of moec emitted, before ONNX Runtime sees it.

A wrong shape would otherwise broadcast, and a wrong type be reported for a node that its author did not write. The
lowerings that ship are held against the reference by the tests instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import onnx as protobuf
import onnx_ir as onnx
from onnx import defs, helper, shape_inference

from moec.backends.onnxruntime.emit import MICROSOFT, Emitter
from moec.backends.onnxruntime.types import onnx_type
from moec.ir import CompileError, Dim, Node, Value

_SMALL = 64  # constants up to this size may hold a shape that inference reads


def check_emitted(
    e: Emitter, node: Node, nodes: Sequence[onnx.Node], results: Sequence[onnx.Value], opset: int
) -> None:
    """That the operators exist with their attributes, and that ONNX's own inference gives the IR's types.

    Operators without inference (those of com.microsoft) and values of unknown type are taken as they are. Raises
    CompileError naming the operator, or the result with its expected and its inferred type.
    """
    for emitted in nodes:
        _check_operator(emitted, opset)
    inferred = _infer(e, node, nodes, results, opset)
    for i, (v, out) in enumerate(zip(node.results, results, strict=True)):
        found = inferred.get(str(out.name))
        reason = None if found is None else _mismatch(v, found)
        if reason:
            raise CompileError(f"result {i} {reason}", code="lowering")


def _check_operator(node: onnx.Node, opset: int) -> None:
    if node.domain:
        return
    if not defs.has(node.op_type, opset):
        near = difflib.get_close_matches(node.op_type, {s.name for s in defs.get_all_schemas()}, 1)
        raise CompileError(
            f"ONNX has no operator {node.op_type!r} in opset {opset}",
            code="lowering",
            hint=f"did you mean {near[0]!r}?" if near else 'ONNX Runtime\'s own operators take domain="com.microsoft"',
        )
    known = defs.get_schema(node.op_type, opset).attributes
    for name in node.attributes:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise CompileError(
                f"ONNX {node.op_type} has no attribute {name!r}",
                code="lowering",
                hint=f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(known) or 'none'}",
            )


def _infer(
    e: Emitter, node: Node, nodes: Sequence[onnx.Node], results: Sequence[onnx.Value], opset: int
) -> dict[str, Any]:
    """Types by name; empty where the type of something that is read is not known."""
    operands = {str(e.value(v).name): _declared(e.value(v), v) for v in node.operands if v is not None}
    inside = {str(out.name) for n in nodes for out in n.outputs}
    inputs, constants = dict(operands), []
    for value in {x.name: x for n in nodes for x in n.inputs if x is not None and x.name not in inside}.values():
        name = str(value.name)
        if name in operands:
            continue
        if value.const_value is None:
            return {}
        tensor = value.const_value
        inputs[name] = helper.make_tensor_value_info(name, int(tensor.dtype), tensor.shape.numpy())
        if tensor.size <= _SMALL:
            constants.append(onnx.serde.serialize_tensor(tensor))
    outputs = [helper.make_empty_tensor_value_info(str(out.name)) for out in results if str(out.name) in inside]
    graph = helper.make_graph(
        [onnx.serde.serialize_node(n) for n in nodes], "lowering", list(inputs.values()), outputs, constants
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    try:
        done = shape_inference.infer_shapes(
            helper.make_model(graph, opset_imports=imports), check_type=True, strict_mode=True, data_prop=True
        ).graph
    except shape_inference.InferenceError as error:
        reason = str(error).split("\n")[0].removeprefix("[ShapeInferenceError] ").removeprefix("Inference error(s): ")
        raise CompileError(f"ONNX does not take it: {reason}", code="lowering") from None
    return {v.name: v.type.tensor_type for v in (*done.input, *done.value_info, *done.output)}


def _declared(emitted: onnx.Value, v: Value) -> protobuf.ValueInfoProto:
    shape = [s if isinstance(s, int) else str(s) if s.is_symbol else None for s in v.shape]
    return helper.make_tensor_value_info(str(emitted.name), int(onnx_type(v.dtype)), shape)


def _mismatch(v: Value, found: Any) -> str | None:
    """What is wrong with an inferred type, or None."""
    if not found.elem_type:
        return None
    want, got = onnx_type(v.dtype), onnx.DataType(found.elem_type)
    if want != got:
        return f"is {got.name} in ONNX, expected {want.name} for {v.type}"
    if not found.HasField("shape"):
        return None
    sizes = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in found.shape.dim]
    if len(sizes) != v.type.rank or any(map(_differ, sizes, v.shape)):
        shown = ", ".join("?" if s is None else str(s) for s in sizes)
        return f"has shape [{shown}], expected {v.type}"
    return None


def _differ(found: int | str | None, expected: int | Dim) -> bool:
    """Whether an inferred size can never be the expected one."""
    if isinstance(found, int):
        return found != expected
    symbol = isinstance(expected, Dim) and expected.is_symbol
    # inference makes up names of its own for sizes that it does not know
    return found is not None and symbol and not found.startswith("unk__") and found != str(expected)
