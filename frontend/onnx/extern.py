"""Operators as `extern` ops: attributes, and result types from ONNX's shape inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir

from moec.frontend.onnx.context import ImportContext
from moec.ir import CompileError, Dim, DType, TensorType, Value
from moec.ir.ops.extern import extern_op, graph_attr, inferred, op_name, schema_at, tensor_attr

Declared = TensorType | None
UNKNOWN = Dim("_")  # a size of a declared type that may be any


def attribute(name: str, attr: Any) -> Any:
    """An attribute of an onnx_ir node as one of an IR node. Raises CompileError for kinds that have no such form."""
    kind, value = attr.type, attr.value
    T = onnx_ir.AttributeType
    if kind == T.INT:
        return int(value)
    if kind == T.FLOAT:
        return float(np.float32(value))
    if kind == T.STRING:
        return str(value)
    if kind == T.INTS:
        return tuple(int(x) for x in value)
    if kind == T.FLOATS:
        return tuple(float(np.float32(x)) for x in value)
    if kind == T.STRINGS:
        return tuple(str(x) for x in value)
    if kind == T.TENSOR:
        return tensor_attr(value.numpy())
    if kind == T.GRAPH:
        return graph_attr(onnx_ir.to_proto(value))
    raise CompileError(f"attribute {name!r} is a {kind.name.lower()}, which is not supported", code="attribute")


def extern(
    c: ImportContext,
    domain: str,
    op_type: str,
    operands: Sequence[Value | None],
    attrs: dict[str, Any],
    used: Sequence[bool],
    declared: Sequence[Declared],
    captured: dict[str, Value],
) -> list[Value | None]:
    """Build an extern node. `used`: which outputs have a name; `declared`: what is known of their types where
    inference knows less, UNKNOWN sizes in them; `captured`: what the bodies read, by name. Raises CompileError where
    ONNX does not know the operator, refuses it, or a result is no tensor of known rank."""
    schema = schema_at(domain, op_type, c.opset)
    opdef = extern_op(op_name(domain, op_type))
    assert opdef is not None
    last = max((i for i, u in enumerate(used) if u), default=-1)
    # what is not optional has a name, whether it is used or not
    single = [o.option == o.option.__class__.Single for o in schema.outputs]
    used = [u or (i < last and i < len(single) and single[i]) for i, u in enumerate(used)]
    slots = tuple(i for i, u in enumerate(used) if u)
    has_body = any(isinstance(a, str) and a.startswith("graph:") for a in attrs.values())
    version = c.opset if has_body else schema.since_version
    op: Any = opdef.instance([], {"version": version, "slots": slots, "captures": tuple(captured), **attrs})
    for name in opdef.attrs:
        if not hasattr(op, name):
            setattr(op, name, None)
    values = [*operands, *captured.values()]
    own = operands[: len(operands)]
    data = {i: c.arrays[v] for i, v in enumerate(own) if v is not None and v in c.arrays}
    data = {i: a for i, a in data.items() if a.size <= 1024}
    types = [None if v is None else v.type for v in values]
    found = inferred(op, types, data)
    texts = {str(s): s for t in types if t is not None for s in t.shape if isinstance(s, Dim)}
    results = []
    for slot, (dtype, sizes) in zip(slots, found, strict=True):
        known = declared[slot]
        if dtype is None and known is not None:
            dtype = known.dtype
        if sizes is None:
            rank = known.rank if known is not None else _rank(op_type, operands, attrs)
            sizes = None if rank is None else [None] * rank
        if sizes is not None and known is not None and len(sizes) == known.rank:
            exact = [None if s == UNKNOWN else s for s in known.shape]
            sizes = [e if e is not None and not isinstance(s, int) else s for s, e in zip(sizes, exact, strict=True)]
        if dtype is None or sizes is None:
            raise c.refuse(f"the {'rank' if dtype else 'element type'} of result {slot} is known only at run time")
        shape = tuple(s if isinstance(s, Dim) else _size(c, s, texts) for s in sizes)
        results.append(TensorType(dtype, shape))
    given = {"version": version, "types": tuple(results), "slots": slots, "captures": tuple(captured), **attrs}
    node = c.graph.create(opdef, values, given, location=c.b.location)
    c.b.created.append(node)
    outs: list[Value | None] = [None] * len(used)
    for slot, v in zip(slots, node.results, strict=True):
        outs[slot] = v
    return outs


def _rank(op_type: str, operands: Sequence[Value | None], attrs: dict[str, Any]) -> int | None:
    """The rank of a result whose axes are known only at run time, where their number is known."""
    x, axes = operands[0], operands[1] if len(operands) > 1 else None
    if x is None or axes is None or axes.type.rank != 1:
        return None
    count = axes.shape[0]
    if op_type.startswith("Reduce"):
        kept = attrs.get("keepdims", 1)
        fewer = count if isinstance(count, int) and count > 0 else None
        return x.type.rank if kept else None if fewer is None else x.type.rank - fewer
    if op_type in ("Squeeze", "Unsqueeze") and isinstance(count, int):
        return x.type.rank + (count if op_type == "Unsqueeze" else -count)
    return None


def _size(c: ImportContext, size: Any, texts: dict[str, Dim]) -> int | Dim:
    if isinstance(size, int):
        return size
    if size is None:
        return c.fresh()
    if size not in texts:
        texts[size] = c.fresh()
    return texts[size]


def element_type(number: int) -> DType | None:
    """Our element type of ONNX's number, or None."""
    from moec.ir.ops.extern import onnx_dtypes

    return {v: k for k, v in onnx_dtypes().items()}.get(number)


def element_name(number: int) -> str:
    return (
        onnx.TensorProto.DataType.Name(number).lower() if number in onnx.TensorProto.DataType.values() else str(number)
    )
