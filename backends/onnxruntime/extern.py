"""Lowering of `extern`: an ONNX operator is itself.

bf16 values are f32 here, as everywhere in this backend; f16 and FP8 ones are narrowed before the operator and widened
after it.
"""

from __future__ import annotations

from typing import Any

import onnx as protobuf
import onnx_ir as onnx

from moec.backends.onnxruntime.backend import backend
from moec.backends.onnxruntime.emit import Emitter, given
from moec.backends.onnxruntime.opsets import Requirement, body_operators, converted
from moec.backends.onnxruntime.types import ONNX, STORED, carrier
from moec.ir import DType, Node
from moec.ir.ops.extern import node_proto, output_names, schema_of, split_name, type_proto

_DECIDES_TYPES = ("to", "dtype", "output_dtype", "stash_type", "softmax_precision")  # attributes


@backend.lowers("extern.*")
def extern(e: Emitter, node: Node) -> tuple[onnx.Value, ...]:
    op: Any = node.opdef.instance(node.operands, node.attrs)
    domain, op_type = split_name(node.op)
    operands = given(node)
    wide = _computes_wide(node)
    values = [None if v is None else _narrowed(e, v, wide) for v in operands]
    own = len(operands) - len(op.captures)
    names = ["" if v is None else f"x{i}" for i, v in enumerate(operands[:own])]
    outs = output_names(op.slots)
    proto = node_proto(op, names, outs)
    outside = {name: v for name, v in zip(op.captures, values[own:], strict=True) if v is not None}
    bodies = [a.g for a in proto.attribute if a.HasField("g")]
    need = Requirement(domain, op_type, op.version, tuple(o for g in bodies for o in body_operators(g)))
    nodes = [proto]
    if not domain and e.opset is not None and not need.range()[0] <= e.opset <= need.range()[1]:
        kinds = [type_proto(_carried(v.type, wide)) for v in operands[:own] if v is not None]
        made = [_carried(r.type, wide) for r in node.results]
        nodes = converted(
            proto,
            [protobuf.helper.make_value_info(n, t) for n, t in zip([n for n in names if n], kinds, strict=True)],
            [
                protobuf.helper.make_value_info(n, type_proto(t))
                for n, t in zip([n for n in outs if n], made, strict=True)
            ],
            op.version,
            e.opset,
        )
    else:
        e.foreign.append(need)
    known = {n: v for n, v in zip(names, values[:own], strict=True) if v is not None}
    for n in nodes:
        known |= e.operator(n, known, outside)
    return tuple(_widened(e, known[o], v, wide) for o, v in zip([o for o in outs if o], node.results, strict=True))


def _carried(type: Any, wide: bool) -> Any:
    return type.with_dtype(DType.F32) if wide and type.dtype is DType.BF16 else type


def _is_stored(v: Any, wide: bool) -> bool:
    """Whether the operator gets the value in another type than its carrier's."""
    return v.dtype in STORED and not (wide and v.dtype is DType.BF16)


def _narrowed(e: Emitter, v: Any, wide: bool) -> onnx.Value:
    x = e.value(v)
    return e.op("Cast", x, to=STORED[v.dtype].value) if _is_stored(v, wide) else x


def _widened(e: Emitter, x: onnx.Value, v: Any, wide: bool) -> onnx.Value:
    return e.op("Cast", x, to=ONNX[carrier(v.dtype)].value) if _is_stored(v, wide) else x


def _computes_wide(node: Node) -> bool:
    """Whether the operator takes f32 where the node has bf16: ONNX Runtime has next to no bf16 kernels."""
    schema = schema_of(node.op, node.attrs["version"])
    constraints = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    for params, values in ((schema.inputs, node.operands), (schema.outputs, node.results)):
        for i, v in enumerate(values):
            if v is None or v.dtype is not DType.BF16 or not params:
                continue
            kind = params[min(i, len(params) - 1)].type_str
            if "tensor(float)" not in constraints.get(kind, [kind]):
                return False
    return all(a not in schema.attributes for a in _DECIDES_TYPES)
