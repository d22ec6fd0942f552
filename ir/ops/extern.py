"""`extern`: ONNX operators outside of our families, one op for each operator, made from ONNX's own schemas.

`extern.Conv` is ai.onnx's Conv, `extern.ml-Binarizer` that of ai.onnx.ml. A node keeps what the operator needs to run
anywhere: the opset whose schema it follows (`version`), its attributes, the types of its results, which ONNX's shape
inference gave when the node was made (sizes that it did not know are new symbols), which of the operator's outputs they
are (`slots`), and the names by which its bodies read the last operands (`captures`).
"""

from __future__ import annotations

import base64
import difflib
import json
import warnings
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch

from moec.ir.arrays import NUMPY, dtype_of, from_numpy, to_numpy
from moec.ir.errors import CompileError, require
from moec.ir.opdef import Attr, AttrSpec, OpDef, OptionalOperands
from moec.ir.types import DType, TensorType

if TYPE_CHECKING:
    import onnx
    from onnx.defs import OpSchema

# a prefix of the op name for each domain
DOMAINS = {"": "", "ai.onnx.ml": "ml-", "ai.onnx.preview.training": "training-", "ai.onnx.preview": "preview-"}
# what every extern op has beside the attributes of its operator
_OWN = ("version", "types", "slots", "captures")


def onnx_dtypes() -> dict[DType, int]:
    """ONNX's numbers of our element types."""
    from onnx import TensorProto as T

    return {
        DType.F64: T.DOUBLE, DType.F32: T.FLOAT, DType.F16: T.FLOAT16, DType.BF16: T.BFLOAT16,
        DType.F8E4M3: T.FLOAT8E4M3FN, DType.F8E5M2: T.FLOAT8E5M2, DType.I64: T.INT64, DType.I32: T.INT32,
        DType.I16: T.INT16, DType.I8: T.INT8, DType.U64: T.UINT64, DType.U32: T.UINT32, DType.U16: T.UINT16,
        DType.U8: T.UINT8, DType.BOOL: T.BOOL, DType.C64: T.COMPLEX64, DType.I4: T.INT4, DType.U4: T.UINT4,
        DType.I2: T.INT2, DType.U2: T.UINT2, DType.F8E4M3FNUZ: T.FLOAT8E4M3FNUZ, DType.F8E5M2FNUZ: T.FLOAT8E5M2FNUZ,
        DType.F8E8M0: T.FLOAT8E8M0,
    }  # fmt: skip


class Extern:
    """The class of every extern op; `opdef` is set on subclasses."""

    inputs: OptionalOperands
    version: Attr[int]
    types: Attr[tuple]
    slots: Attr[tuple]
    captures: Attr[tuple] = ()

    opdef: OpDef

    def infer(self) -> tuple[TensorType, ...]:
        require(all(isinstance(t, TensorType) for t in self.types), f"types {self.types} are no tensor types")
        require(len(self.types) == len(self.slots), f"{len(self.slots)} results, {len(self.types)} types")
        _check(self.opdef.name, tuple(self.inputs), _given(self))
        return self.types

    def reference(self) -> tuple[torch.Tensor, ...]:
        return evaluate(self, self.inputs)


def split_name(name: str) -> tuple[str, str]:
    """Domain and operator of an op name: ("ai.onnx.ml", "Binarizer") of `extern.ml-Binarizer`."""
    bare = name.removeprefix("extern.")
    for domain, prefix in DOMAINS.items():
        if prefix and bare.startswith(prefix):
            return domain, bare.removeprefix(prefix)
    return "", bare


def op_name(domain: str, op_type: str) -> str:
    """The reverse of `split_name`. Raises CompileError for a domain that ONNX has no schemas of."""
    domain = "" if domain == "ai.onnx" else domain
    if domain not in DOMAINS:
        raise CompileError(f"unknown operator {domain}.{op_type}", code="unknown-op")
    return f"extern.{DOMAINS[domain]}{op_type}"


@cache
def table() -> dict[tuple[str, str], list[OpSchema]]:
    """Every version of every operator that ONNX has, oldest first."""
    from onnx import defs

    found: dict[tuple[str, str], list[OpSchema]] = {}
    for schema in defs.get_all_schemas_with_history():
        found.setdefault((schema.domain, schema.name), []).append(schema)
    return {key: sorted(versions, key=lambda s: s.since_version) for key, versions in found.items()}


@cache
def extern_op(name: str) -> OpDef | None:
    """The op of one operator, with the attributes of all its versions; None where ONNX has no such operator."""
    versions = table().get(split_name(name))
    if versions is None:
        return None
    attrs = {
        "version": AttrSpec("version", int),
        "types": AttrSpec("types", tuple),
        "slots": AttrSpec("slots", tuple),
        "captures": AttrSpec("captures", tuple, ()),
    }
    for schema in versions:
        assert not set(_OWN) & set(schema.attributes), schema.name
        attrs |= {a: AttrSpec(a, Any, None) for a in schema.attributes}
    doc = (versions[-1].doc or "").strip()
    cls = type(versions[-1].name, (Extern,), {"__doc__": doc, "__module__": __name__})
    opdef = OpDef(name, cls, (("inputs", "optional variadic"),), attrs, doc, results=None, binds=("types",))
    cls.opdef = opdef  # type: ignore[attr-defined]  # as the decorator of other ops does
    return opdef


def schema_of(name: str, version: int) -> OpSchema:
    """The schema of an op in an opset. Raises CompileError as `schema_at`."""
    return schema_at(*split_name(name), version)


def schema_at(domain: str, op_type: str, opset: int) -> OpSchema:
    """The schema that holds in an opset. Raises CompileError for an operator that is not in it."""
    domain = "" if domain == "ai.onnx" else domain
    versions = table().get((domain, op_type))
    shown = f"{domain}.{op_type}" if domain else op_type
    if versions is None:
        near = difflib.get_close_matches(op_type, {n for d, n in table() if d == domain}, 1)
        raise CompileError(
            f"unknown operator {shown}", code="unknown-op", hint=f"did you mean {near[0]!r}?" if near else None
        )
    fitting = [s for s in versions if s.since_version <= opset]
    if not fitting:
        raise CompileError(
            f"{shown} is not in opset {opset}; it came with {versions[0].since_version}", code="unknown-op"
        )
    if fitting[-1].deprecated:
        raise CompileError(f"{shown} was removed from ONNX in opset {fitting[-1].since_version}", code="unknown-op")
    return fitting[-1]


# -- attributes ---------------------------------------------------------------------------------------


def tensor_attr(array: Any) -> tuple:
    """An array as an attribute: its type, then its elements."""
    dtype = dtype_of(array)
    values = array.astype(np_exact(dtype)).reshape(-1).tolist()
    return TensorType(dtype, tuple(array.shape)), tuple(values)


def np_exact(dtype: DType) -> Any:
    """A NumPy type whose elements are Python numbers and hold every value of `dtype`."""
    import numpy as np

    return np.float64 if dtype.is_float else NUMPY[dtype]


def graph_attr(graph: Any) -> str:
    """A body (GraphProto) as an attribute."""
    return "graph:" + base64.b64encode(graph.SerializeToString(deterministic=True)).decode()


def proto_attr(name: str, value: Any, schema: OpSchema) -> onnx.AttributeProto:
    """An attribute as ONNX wants it."""
    import numpy as np
    from onnx import GraphProto, helper, numpy_helper
    from onnx.defs import OpSchema as S

    kind = schema.attributes[name].type
    if kind == S.AttrType.TENSOR:
        type, values = value
        array = np.array(values, dtype=np_exact(type.dtype)).astype(NUMPY[type.dtype]).reshape(type.shape)
        return helper.make_attribute(name, numpy_helper.from_array(array, name))
    if kind == S.AttrType.GRAPH:
        return helper.make_attribute(name, GraphProto.FromString(base64.b64decode(value.removeprefix("graph:"))))
    if isinstance(value, tuple):
        numbers = {S.AttrType.INTS: 7, S.AttrType.FLOATS: 6, S.AttrType.STRINGS: 8}
        return helper.make_attribute(name, list(value), attr_type=numbers[kind])
    return helper.make_attribute(name, value)


# -- one operator as a model --------------------------------------------------------------------------


def node_proto(op: Any, names: list[str], outputs: list[str]) -> onnx.NodeProto:
    """The operator of an instance (or attributes) with these names; an absent operand is named ""."""
    from onnx import helper

    schema = schema_of(op.opdef.name, op.version)
    domain, op_type = split_name(op.opdef.name)
    node = helper.make_node(op_type, names, outputs, domain=domain)
    given = {a: getattr(op, a, None) for a in schema.attributes}
    for name, value in given.items():
        if value is not None:
            node.attribute.append(proto_attr(name, value, schema))
    return node


def output_names(slots: tuple[int, ...], stem: str = "y") -> list[str]:
    """Names of an operator's outputs up to the last that is a result; those between are named ""."""
    return [f"{stem}{i}" if i in slots else "" for i in range(max(slots, default=-1) + 1)]


def operand_names(op: Any, count: int) -> tuple[list[str], list[str]]:
    """(names of the operator's inputs, names of the values that its bodies read)."""
    own = count - len(op.captures)
    return [f"x{i}" for i in range(own)], list(op.captures)


def evaluate(op: Any, operands: Any) -> tuple[torch.Tensor, ...]:
    """Run one operator in ONNX's reference evaluator."""
    names, captured = operand_names(op, len(operands))
    feeds = {}
    types = {}
    for name, t in zip([*names, *captured], operands, strict=True):
        if t is not None:
            feeds[name], types[name] = to_numpy(t), TensorType.of(t)
    names = [n if n in feeds else "" for n in names]
    kinds = tuple((n, (t.dtype, t.rank)) for n, t in types.items())
    evaluator = _evaluator(op.opdef.name, tuple(names), _given(op), kinds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of overflow and division by zero, which the operators define
        try:
            results = evaluator.run(None, feeds)
        except Exception as e:  # whatever ONNX's evaluator does is said with the operator
            raise CompileError(
                f"{op.opdef.name} failed in ONNX's reference evaluator: {type(e).__name__}: {e}", code="execution"
            ) from e
    found = []
    for result, declared in zip(results, op.types, strict=True):
        if isinstance(result, list | dict) or result is None:
            raise CompileError(f"{op.opdef.name} gave a {type(result).__name__}, no tensor", code="execution")
        if op.opdef.name == "extern.Loop" and result.shape == (0,) and declared.rank > 1:
            result = result.reshape([s if isinstance(s, int) else 0 for s in (0, *declared.shape[1:])])
        t = from_numpy(result)
        # numpy promotes scalars and halves now and then; a wider float is the same number before its rounding
        found.append(t.to(declared.dtype.torch) if _is_widened(t, declared) else t)
    return tuple(found)


def _is_widened(t: torch.Tensor, declared: TensorType) -> bool:
    return DType.of(t.dtype).is_float and declared.dtype.is_float and DType.of(t.dtype).bits > declared.dtype.bits


def _given(op: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((k, v) for k, v in sorted(vars(op).items()) if k in op.opdef.attrs and v is not None)


class _Fields:
    """An op's attributes without its operands."""

    def __init__(self, opdef: OpDef, attrs: dict[str, Any]):
        vars(self).update(attrs, opdef=opdef)


@lru_cache(maxsize=512)
def _evaluator(name: str, names: tuple[str, ...], attrs: tuple, types: tuple) -> Any:
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    opdef = extern_op(name)
    assert opdef is not None
    op = _Fields(opdef, dict(attrs))
    kinds = onnx_dtypes()
    inputs = [helper.make_tensor_value_info(n, kinds[d], [None] * rank) for n, (d, rank) in types]
    outs = output_names(op.slots)  # type: ignore[attr-defined]  # set from the attributes
    results = [
        helper.make_tensor_value_info(o, kinds[t.dtype], [None] * t.rank)
        for o, t in zip([o for o in outs if o], op.types, strict=True)  # type: ignore[attr-defined]  # set from the attributes
    ]
    node = node_proto(op, list(names), outs)
    graph = helper.make_graph([node], "extern", inputs, results)
    opsets = opset_imports(name, op.version)  # type: ignore[attr-defined]  # set from the attributes
    from moec.ir.ops.extern_loop import Loop
    from moec.ir.ops.extern_versions import older_operators

    older = older_operators(node, opsets[-1].version)
    return ReferenceEvaluator(helper.make_model(graph, opset_imports=opsets), new_ops=[Loop, *older])


def opset_imports(name: str, version: int) -> list[Any]:
    """The opset in which the operator has this version, and for bodies and functions one of ai.onnx."""
    from onnx import helper

    domain, _ = split_name(name)
    imports = [helper.make_opsetid(domain, version)]
    if domain:
        imports.append(helper.make_opsetid("", 22))
    return imports


# -- types ----------------------------------------------------------------------------------------------


def type_proto(type: TensorType) -> onnx.TypeProto:
    from onnx import helper

    return helper.make_tensor_type_proto(
        onnx_dtypes()[type.dtype], [s if isinstance(s, int) else str(s) for s in type.shape]
    )


def inferred(op: Any, types: Any, data: dict[int, Any] | None = None) -> list[tuple[DType | None, list[Any] | None]]:
    """What ONNX's inference says of each result: its dtype (or None) and its sizes: numbers, the texts of symbols, None
    for unknown ones (or None where the rank is unknown). `data`: arrays of operands that are constant.

    Raises CompileError where the operands or attributes are wrong.
    """
    from onnx import numpy_helper, shape_inference

    schema = schema_of(op.opdef.name, op.version)
    names, captured = operand_names(op, len(types))
    by_name = dict(zip([*names, *captured], types, strict=True))
    names = [n if by_name[n] is not None else "" for n in names]
    outs = output_names(op.slots)
    node = node_proto(op, names, outs)
    protos = {n: type_proto(t) for n, t in by_name.items() if t is not None}
    tensors = {f"x{i}": numpy_helper.from_array(a, f"x{i}") for i, a in (data or {}).items()}
    try:
        found = shape_inference.infer_node_outputs(
            schema, node, protos, tensors, opset_imports=opset_imports(op.opdef.name, op.version)
        )
    except Exception as e:  # ONNX raises classes of its own without a common base
        raise CompileError(f"ONNX's inference refuses it: {str(e).strip()}", code="type") from None
    kinds = {v: k for k, v in onnx_dtypes().items()}
    result: list[tuple[DType | None, list[Any] | None]] = []
    for o in (o for o in outs if o):
        kind = found[o].WhichOneof("value") if o in found else None
        if kind not in (None, "tensor_type"):
            raise CompileError(f"result {o} is a {str(kind).removesuffix('_type')}, no tensor", code="unsupported-op")
        tensor = found[o].tensor_type if o in found else None
        dtype = None
        if tensor is not None and tensor.elem_type:
            if tensor.elem_type not in kinds:
                raise CompileError(f"result {o} has elements of ONNX type {tensor.elem_type}", code="dtype")
            dtype = kinds[tensor.elem_type]
        sizes = None
        if tensor is not None and tensor.HasField("shape"):
            sizes = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim]
        result.append((dtype, sizes))
    return result


@lru_cache(maxsize=4096)
def _check(name: str, types: tuple, attrs: tuple) -> None:
    """Arity, attributes, and that the declared types are none that ONNX's inference rules out."""
    opdef = extern_op(name)
    assert opdef is not None
    op: Any = _Fields(opdef, dict(attrs))
    schema = schema_of(name, op.version)
    count = len(types) - len(op.captures)
    require(schema.min_input <= count <= schema.max_input, f"{count} inputs, version {op.version} of the operator "
            f"takes {schema.min_input} to {schema.max_input}")  # fmt: skip
    for key in opdef.attrs:
        given = getattr(op, key, None) is not None and key not in _OWN
        require(not given or key in schema.attributes, f"version {op.version} has no attribute {key!r}")
    for (dtype, sizes), declared in zip(inferred(op, types), op.types, strict=True):
        require(dtype in (None, declared.dtype), f"the result is {declared}, ONNX's inference says {dtype}")
        if sizes is not None:
            wrong = len(sizes) != declared.rank or any(
                isinstance(s, int) and isinstance(d, int) and s != d for s, d in zip(sizes, declared.shape, strict=True)
            )
            require(not wrong, f"the result is {declared}, ONNX's inference says {json.dumps(sizes)}")
