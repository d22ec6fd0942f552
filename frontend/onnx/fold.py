"""What is known while importing: nodes whose operands are constants, and sizes computed from sizes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from moec.frontend.onnx.assume import Fact, relation
from moec.frontend.onnx.context import KNOWN_LIMIT, ImportContext, Size
from moec.ir import CompileError, Dim, Value
from moec.ir.arrays import NUMPY
from moec.ir.ops.extern import schema_at, type_proto
from moec.ir.ops.extern_versions import evaluator_knows

_RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}
_BOUNDED = {"NonZero", "Unique", "Compress", "Gather", "Squeeze", "Unsqueeze", "Shape", "Size"}  # by their operands
Sizes = tuple[Size, ...]
_TYPES = {np.dtype(t) for t in NUMPY.values()}


def evaluated(
    c: ImportContext, proto: Any, domain: str, operands: Sequence[Value | None]
) -> list[np.ndarray | None] | None:
    """The results of a node all of whose operands are constants, if they are integers, booleans or few; else None."""
    if domain or proto.op_type in _RANDOM or not operands or any(a.HasField("g") for a in proto.attribute):
        return None
    if any(v is not None and v not in c.arrays for v in operands) or all(v is None for v in operands):
        return None
    from onnx.reference import ReferenceEvaluator

    if not evaluator_knows(proto.op_type, c.opset) or not _small(c, proto, operands):
        return None
    names = [f"x{i}" if v is not None else "" for i, v in enumerate(operands)]
    node = onnx.NodeProto.FromString(proto.SerializeToString())
    node.input[:] = names
    outs = [f"y{i}" if o else "" for i, o in enumerate(proto.output)]
    node.output[:] = outs
    feeds = {n: c.arrays[v] for n, v in zip(names, operands, strict=True) if v is not None}
    graph = onnx.helper.make_graph(
        [node],
        "fold",
        [onnx.helper.make_value_info(n, onnx.TypeProto()) for n in feeds],
        [onnx.helper.make_value_info(o, onnx.TypeProto()) for o in outs if o],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", c.opset)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            results = ReferenceEvaluator(model).run(None, feeds)
        except Exception:  # what it cannot evaluate is imported as any other node, which says what is wrong
            return None
    arrays: list[np.ndarray | None] = []
    found = iter(results)
    for o in outs:
        a = next(found) if o else None
        if isinstance(a, list | dict):
            return None
        a = None if a is None else np.asarray(a)
        if a is not None and (a.dtype not in _TYPES or a.size > (64 if a.dtype.kind not in "iub" else KNOWN_LIMIT)):
            return None
        arrays.append(a)
    return arrays


def _small(c: ImportContext, proto: Any, operands: Sequence[Value | None]) -> bool:
    """Whether the results are known to be small before they are computed."""
    if proto.op_type in _BOUNDED:
        return True
    schema = schema_at("", proto.op_type, c.opset)
    node = onnx.NodeProto.FromString(proto.SerializeToString())
    node.input[:] = [f"x{i}" if v is not None else "" for i, v in enumerate(operands)]
    types = {f"x{i}": type_proto(v.type) for i, v in enumerate(operands) if v is not None}
    data = {f"x{i}": onnx.numpy_helper.from_array(c.arrays[v]) for i, v in enumerate(operands) if v is not None}
    try:
        found = onnx.shape_inference.infer_node_outputs(
            schema, node, types, data, opset_imports=[onnx.helper.make_opsetid("", c.opset)]
        )
    except Exception:  # what is wrong with the node is said where it is imported
        return False
    for name in (o for o in proto.output if o):
        kind = found[name].tensor_type if name in found else None
        if kind is None or not kind.HasField("shape") or not all(d.HasField("dim_value") for d in kind.shape.dim):
            return False
        if math.prod(d.dim_value for d in kind.shape.dim) > KNOWN_LIMIT:
            return False
    return True


def sizes_of_result(
    c: ImportContext, op_type: str, operands: Sequence[Value | None], attrs: dict[str, Any]
) -> tuple[Size, ...] | None:
    """The elements of the first result as sizes, where all operands are known as sizes; else None."""
    if op_type == "Where":
        return _chosen(c, operands)
    known = [None if v is None else c.elements(v) for v in operands]
    first = operands[0] if operands else None
    if first is None or known[0] is None:
        return None
    x, others = known[0], known[1:]  # None where one is absent
    if any(k is None and v is not None for v, k in zip(operands, known, strict=True)):
        return None
    given = [k for k in others if k is not None]
    if len(x) + sum(map(len, given)) > KNOWN_LIMIT:
        return None
    try:
        match op_type:
            case "Identity" | "Squeeze" | "Unsqueeze" | "Reshape":
                return x
            case "Cast":
                return x if attrs.get("to") in (onnx.TensorProto.INT64, onnx.TensorProto.INT32) else None
            case "Concat":
                return sum(given, x)
            case "Gather" if given and all(isinstance(i, int) for i in given[0]):
                return tuple(x[i] for i in given[0] if isinstance(i, int))
            case "Slice" if len(given) >= 2:
                return _slice(x, *others)
            case "Add" | "Sub" | "Mul" | "Div" if given:
                return _arithmetic(op_type, x, given[0])
    except (IndexError, CompileError, ZeroDivisionError):
        return None
    return None


def _slice(x: Sizes, starts: Sizes | None, ends: Sizes | None, axes: Sizes | None = None,
           steps: Sizes | None = None) -> Sizes | None:  # fmt: skip
    found = [(1,) if at is None else at for at in (starts, ends, steps)]
    start, end, step = (at[0] if len(at) == 1 else None for at in found)
    if not (isinstance(start, int) and isinstance(end, int) and isinstance(step, int)) or axes not in (
        None,
        (0,),
        (-1,),
    ):
        return None
    return x[slice(start, end, step)] if step > 0 else None


def _chosen(c: ImportContext, operands: Sequence[Value | None]) -> tuple[Size, ...] | None:
    """Where of sizes by a constant."""
    condition = c.array(operands[0])
    sides = [None if v is None else c.elements(v) for v in operands[1:]]
    if condition is None or condition.ndim > 1 or sides[0] is None or sides[1] is None:
        return None
    chosen = condition.reshape(-1).tolist()
    n = max(len(chosen), *map(len, (sides[0], sides[1])))
    if any(len(side) not in (1, n) for side in (chosen, sides[0], sides[1])):
        return None
    columns = [[side[i % len(side)] for i in range(n)] for side in (chosen, sides[0], sides[1])]
    return tuple(a if which else b for which, a, b in zip(*columns, strict=True))


def _arithmetic(op_type: str, a: tuple[Size, ...], b: tuple[Size, ...]) -> tuple[Size, ...] | None:
    n = max(len(a), len(b))
    if len(a) not in (1, n) or len(b) not in (1, n):
        return None
    pairs = [(a[i % len(a)], b[i % len(b)]) for i in range(n)]
    if op_type == "Add":
        return tuple(p + q for p, q in pairs)
    if op_type == "Sub":
        return tuple(p - q for p, q in pairs)
    if op_type == "Mul":
        return tuple(p * q for p, q in pairs)
    # ONNX's division rounds to zero: the same as ours for what cannot be negative
    if all(
        isinstance(q, int) and q > 0 and (p.expr.is_nonnegative if isinstance(p, Dim) else p >= 0) for p, q in pairs
    ):
        return tuple(p // q for p, q in pairs)
    return None


def condition(c: ImportContext, op_type: str, operands: Sequence[Value | None], result: Value) -> Value | None:
    """The constant that a condition on sizes is; None where it is none, or is open (and then kept in `c.open`)."""
    first = operands[0] if operands else None
    if op_type == "Not" and first in c.open:
        of = c.open[first]
        c.open[result] = Fact(of.size, of.value, not of.equal)
    if op_type != "Equal" or len(operands) != 2 or result.type.rank > 1:
        return None
    a, b = (None if v is None or not v.dtype.is_integer else c.elements(v) for v in operands)
    if a is None or b is None:
        return None
    n = max(len(a), len(b)) if a and b else 0
    if not n or any(len(side) not in (1, n) for side in (a, b)):
        return None
    found = [relation(a[i % len(a)], b[i % len(b)]) for i in range(n)]
    answers = [c.facts.decides(f) if isinstance(f, Fact) else f for f in found]
    first_open = found[0]
    if n == 1 and answers[0] is None and isinstance(first_open, Fact):
        c.open[result] = first_open
    return None if None in answers else c.constant(np.array(answers, bool).reshape([n] * result.type.rank))
