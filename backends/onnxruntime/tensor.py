"""Lowerings of `tensor` and `call`."""

from __future__ import annotations

import numpy as np
import onnx_ir as onnx

from moec.backends.onnxruntime.backend import backend
from moec.backends.onnxruntime.emit import Emitter, given
from moec.backends.onnxruntime.types import NARROW_INTEGERS, numpy_type, onnx_type
from moec.ir import Dim, DType, Node
from moec.ir.ops.reduction import normal_axis


@backend.lowers("tensor.constant")
def constant(e: Emitter, node: Node) -> onnx.Value:
    kind = node.attrs["type"]
    # through torch: it rounds to FP8 and 16-bit floats
    if kind.dtype.is_float:
        values = node.opdef.instance([], node.attrs).reference().double().numpy()
    else:
        values = np.array(node.attrs["value"])
    return e.constant(values.astype(numpy_type(kind.dtype)).reshape(kind.shape))


@backend.lowers("tensor.dim")
def dim(e: Emitter, node: Node) -> onnx.Value:
    return e.sizes.scalar(node.attrs["value"])


@backend.lowers("tensor.arange")
def arange(e: Emitter, node: Node) -> onnx.Value:
    start, end, step = node.attrs["start"], node.attrs["end"], node.attrs["step"]
    y = e.op("Range", e.sizes.scalar(start), e.sizes.scalar(end), np.int64(step))
    return e.cast(y, DType.I64, node.result.dtype)


@backend.lowers("tensor.full")
def full(e: Emitter, node: Node) -> onnx.Value:
    value = e.scalar(node.attrs["value"], node.result.dtype)
    return e.op("Expand", value, e.sizes.vector(node.attrs["shape"])) if node.attrs["shape"] else value


@backend.lowers("tensor.reshape")
def reshape(e: Emitter, node: Node) -> onnx.Value:
    (x,) = e.operands(node)
    return e.reshape(x, given(node)[0].shape, node.attrs["shape"])


@backend.lowers("tensor.transpose")
def transpose(e: Emitter, node: Node) -> onnx.Value:
    (x,), perm = e.operands(node), list(node.attrs["perm"])
    if perm == [0, 2, 1, 3] and ("untransposed", x) in e.memo:
        source: onnx.Value = e.memo["untransposed", x]
        return source
    return e.op("Transpose", x, perm=perm) if perm else x


@backend.lowers("tensor.expand")
def expand(e: Emitter, node: Node) -> onnx.Value:
    (x,) = e.operands(node)
    if given(node)[0].type == node.result.type:
        return x
    if 0 in node.attrs["shape"]:  # ONNX Runtime drops an Expand of ones to a constant shape with zeros
        nothing = e.op("Slice", e.op("Reshape", x, np.array([-1])), np.array([0]), np.array([0]), np.array([0]))
        return e.op("Reshape", nothing, e.sizes.vector(node.attrs["shape"]), allowzero=1)
    return e.op("Expand", x, e.sizes.vector(node.attrs["shape"]))


@backend.lowers("tensor.slice")
def slice_(e: Emitter, node: Node) -> onnx.Value:
    a = node.attrs
    (x,) = e.operands(node)
    bounds = e.sizes.one(a["start"]), e.sizes.one(a["end"])
    return e.op("Slice", x, *bounds, np.array([a["axis"]]), np.array([a["step"]]))


@backend.lowers("tensor.concat")
def concat(e: Emitter, node: Node) -> onnx.Value:
    return e.op("Concat", *e.operands(node), axis=node.attrs["axis"])


@backend.lowers("tensor.split")
def split(e: Emitter, node: Node) -> tuple[onnx.Value, ...]:
    (x,), sizes = e.operands(node), node.attrs["sizes"]
    if len(sizes) == 1:
        return (x,)
    return e.op("Split", x, e.sizes.vector(sizes), outputs=len(sizes), axis=node.attrs["axis"])


@backend.lowers("tensor.gather")
def gather(e: Emitter, node: Node) -> onnx.Value:
    x, index = given(node)
    if not e.compact(x):
        return e.op("Gather", *e.operands(node), axis=node.attrs["axis"])
    rows = e.op("Gather", e.stored(x, "", x.shape, lambda t: t), e.value(index), axis=node.attrs["axis"])
    return e.op("Cast", rows, to=onnx_type(x.dtype).value)  # of the rows alone, not of the table


@backend.lowers("tensor.gather_elements")
def gather_elements(e: Emitter, node: Node) -> onnx.Value:
    return e.op("GatherElements", *e.operands(node), axis=node.attrs["axis"])


@backend.lowers("tensor.scatter_elements")
def scatter_elements(e: Emitter, node: Node) -> onnx.Value:
    x, index, source = e.operands(node)
    axis, reduce = node.attrs["axis"], node.attrs["reduce"]
    result = e.op("ScatterElements", x, index, source, axis=axis, reduction=reduce)
    dtype = node.result.dtype
    if reduce not in ("max", "min") or not dtype.is_float:
        return result
    # the kernel compares, which NaN does not survive: where one came in, it goes out
    own, came = (e.cast(e.op("IsNaN", v), DType.BOOL, DType.I32) for v in (x, source))
    nan = e.op("ScatterElements", own, index, came, axis=axis, reduction="max")
    return e.op("Where", e.cast(nan, DType.I32, DType.BOOL), e.scalar(float("nan"), dtype), result)


@backend.lowers("tensor.index_put")
def index_put(e: Emitter, node: Node) -> onnx.Value:
    x, index, source = e.operands(node)
    xv, iv, sv = given(node)
    wanted = (*iv.shape, *xv.shape[1:])
    if sv.shape != wanted:
        source = e.op("Expand", source, e.sizes.vector(wanted))
    rows = e.op("Unsqueeze", e.cast(index, iv.dtype, DType.I64), np.array([-1]))
    return e.op("ScatterND", x, rows, source, reduction="add" if node.attrs["accumulate"] else "none")


@backend.lowers("tensor.write")
def write(e: Emitter, node: Node) -> onnx.Value:
    """In place where the buffer's memory is that of the result, see `OnnxExecutable.run_into`."""
    x, rows, at = e.operands(node)
    xv, rv, _ = given(node)
    axis = normal_axis(node.attrs["axis"], xv.type.rank)
    if axis and not e.options.portable and e.positive(*xv.shape, *rv.shape):
        rows_at = e.op("Expand", at, e.sizes.one(xv.shape[0]))
        return e.op("TensorScatter", x, rows, rows_at, axis=axis)
    start = e.op("Unsqueeze", at, np.array([0]))
    end = e.op("Add", start, e.sizes.one(rv.shape[axis]))
    along = np.array([axis])
    before = e.op("Slice", x, np.array([0]), start, along)
    after = e.op("Slice", x, end, e.sizes.one(xv.shape[axis]), along)
    return e.op("Concat", before, rows, after, axis=axis)


@backend.lowers("tensor.nonzero")
def nonzero(e: Emitter, node: Node) -> onnx.Value:
    (x,), dtype = e.operands(node), given(node)[0].dtype
    if dtype is DType.F64:  # no kernel
        x = e.op("Not", e.op("Equal", x, e.scalar(0, dtype)))
    elif dtype in NARROW_INTEGERS:
        x = e.cast(x, dtype, DType.I32)
    if not given(node)[0].type.rank:  # ONNX counts a scalar as [1]: one index, which the IR does not have
        found = e.op("NonZero", e.op("Reshape", x, np.array([1])))
        return e.op("Slice", e.op("Transpose", found, perm=[1, 0]), np.array([0]), np.array([0]), np.array([1]))
    return e.op("Transpose", e.op("NonZero", x), perm=[1, 0])


_MOST_INLINE = 1 << 16  # elements of a constant that is written into the model


def count_ids(e: Emitter, flat: onnx.Value, bins: int, rows: int | Dim | None = None) -> onnx.Value:
    """How often each of 0 … bins−1 occurs in i64[R] (all in range): i64[bins]. `rows`: R, where it is known."""
    key = ("ones", flat if rows is None else e.sizes.resolve(rows))
    if key not in e.memo:
        e.memo[key] = e.op("Expand", np.int64(1), e.op("Shape", flat) if rows is None else e.sizes.one(rows))
    ones = e.memo[key]
    zeros = np.zeros(bins, np.int64) if bins <= _MOST_INLINE else e.op("Expand", np.int64(0), np.array([bins]))
    return e.op("ScatterElements", zeros, flat, ones, axis=0, reduction="add")


@backend.lowers("tensor.histc")
def histc(e: Emitter, node: Node) -> onnx.Value:
    (x,), bins = e.operands(node), node.attrs["bins"]
    flat = e.cast(e.op("Reshape", x, np.array([-1])), given(node)[0].dtype, DType.I64)
    valid = e.op("And", e.op("GreaterOrEqual", flat, np.int64(0)), e.op("Less", flat, np.int64(bins)))
    counts = count_ids(e, e.op("Where", valid, flat, np.int64(bins)), bins + 1)  # strays go to one more bin
    return e.op("Slice", counts, np.array([0]), np.array([bins]), np.array([0]))


@backend.lowers("tensor.one_hot")
def one_hot(e: Emitter, node: Node) -> onnx.Value:
    (index,) = e.operands(node)
    depth = node.attrs["depth"]
    columns = np.arange(depth) if depth <= _MOST_INLINE else e.op("Range", np.int64(0), np.int64(depth), np.int64(1))
    return e.cast(e.op("Equal", e.op("Unsqueeze", index, np.array([-1])), columns), DType.BOOL, DType.I64)


@backend.lowers("tensor.pad")
def pad(e: Emitter, node: Node) -> onnx.Value:
    (x,), dtype = e.operands(node), node.result.dtype
    if not node.attrs["before"]:
        return x
    wide = DType.I32 if dtype is DType.I16 else dtype
    pads = e.sizes.vector((*node.attrs["before"], *node.attrs["after"]))
    y = e.op("Pad", e.cast(x, dtype, wide), pads, e.scalar(node.attrs["value"], wide))
    return e.cast(y, wide, dtype)


@backend.lowers("call.graph")
def call(e: Emitter, node: Node) -> tuple[onnx.Value, ...]:
    """Inlined: ONNX Runtime optimises across calls, and inlines functions itself."""
    from moec.backends.onnxruntime.lower import emit_nodes

    callee = e.functions[node.attrs["callee"]]
    with e.sizes.bound(dict(node.attrs["dims"])), e.call(node.attrs["callee"]):
        for v, operand in zip(callee.inputs, given(node), strict=True):
            e.bind(v, e.value(operand))
        emit_nodes(e, callee)
        return tuple(e.value(v) for v in callee.outputs)
