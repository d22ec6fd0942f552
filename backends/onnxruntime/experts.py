"""Lowerings of grouped experts, in several forms; which one is in `expert_forms.choose`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as onnx

from moec.backends.onnxruntime.backend import backend
from moec.backends.onnxruntime.blocks import rounded
from moec.backends.onnxruntime.emit import Emitter
from moec.backends.onnxruntime.expert_forms import choose
from moec.backends.onnxruntime.expert_spec import Spec, activation, bias_of
from moec.backends.onnxruntime.grouped import by_if, by_loop, by_split
from moec.backends.onnxruntime.moe_operators import moe_operator, qmoe_operator
from moec.backends.onnxruntime.reduction import reduce
from moec.backends.onnxruntime.tensor import count_ids
from moec.ir import Dim, Node
from moec.ir.ops.moe import routed


@backend.lowers("moe.experts", "quant.scaled_experts")
def experts(e: Emitter, node: Node) -> onnx.Value:
    spec = Spec.of(node)
    form = choose(e, spec)
    e.count(f"experts.{form}")
    x = e.cast(e.value(spec.x), spec.x.dtype, spec.dtype)
    if form == "moe":
        y = qmoe_operator(e, spec, x) if spec.nbits else moe_operator(e, spec, x)
    elif form == "dense":
        y = dense_experts(e, spec, x)
    else:
        y = sorted_experts(e, spec, x, form)
    return e.cast(y, spec.dtype, spec.x.dtype)


def _ids(e: Emitter, spec: Spec) -> onnx.Value:
    """The chosen experts [T, k]; out of range they must fail, and ScatterElements takes negative ones."""
    ids = e.value(spec.experts)
    if routed(spec.experts, spec.num):
        return ids
    return e.op("Where", e.op("Less", ids, np.int64(0)), np.int64(spec.num), ids)


def _rounded(e: Emitter, spec: Spec, x: onnx.Value, shape: Sequence[int | Dim]) -> onnx.Value:
    return x if spec.group is None else rounded(e, x, shape, spec.group)


def sorted_experts(e: Emitter, spec: Spec, x: onnx.Value, form: str) -> onnx.Value:
    """Rows sorted by expert, the products of each expert with its rows, rows put back and added up per token."""
    tokens, width = spec.x.shape
    k = spec.experts.shape[1]
    rows = tokens * k
    flat = e.op("Reshape", _ids(e, spec), np.array([-1]))
    counts = count_ids(e, flat, spec.num, rows)
    ids, order = e.op("TopK", flat, e.sizes.one(rows), outputs=2, axis=0, largest=0, sorted=1)
    x = e.op("Gather", _rounded(e, spec, x, (tokens, width)), e.op("Div", order, np.int64(k)), axis=0)
    if form == "unrolled":
        y = _in_two_steps(e, spec, x, counts, ids, rows)
    else:
        y = _one_by_one(e, spec, x, counts, form)
    y = e.op("Gather", y, e.op("ScatterElements", order, order, e.sizes.range(rows), axis=0), axis=0)
    y = e.reshape(y, (rows, width), (tokens, k, width))
    scale = e.cast(e.value(spec.weights), spec.weights.dtype, spec.dtype)
    y = e.op("Mul", y, e.op("Unsqueeze", scale, np.array([2])))
    return reduce(e, "ReduceSum", y, (1,), False)


def _in_two_steps(
    e: Emitter, spec: Spec, x: onnx.Value, counts: onnx.Value, ids: onnx.Value, rows: int | Dim
) -> onnx.Value:
    """The products of all experts, one activation for all rows, the products of all experts."""

    def biased(y: onnx.Value, which: int) -> onnx.Value:
        bias = bias_of(e, spec, which)
        return y if bias is None else e.op("Add", y, e.op("Gather", bias, ids, axis=0))

    gate_up, down = spec.matrices(e)
    h = activation(e, spec, biased(by_split(e, x, counts, spec.num, gate_up.product), 0))
    h = _rounded(e, spec, h, (rows, spec.hidden))
    return biased(by_split(e, h, counts, spec.num, down.product), 1)


def _one_by_one(e: Emitter, spec: Spec, x: onnx.Value, counts: onnx.Value, form: str) -> onnx.Value:
    """One expert after the other, each with its activation: behind an If, or in a Loop."""
    matrices = spec.matrices(e)
    biases = [bias_of(e, spec, which) for which in (0, 1)]
    for matrix in matrices:  # what bodies read
        matrix.ready()
        if form == "loop":
            matrix.stack(transpose=True)
    some = Dim("rows_of_an_expert")

    def product(y: onnx.Value, which: int, index: int | onnx.Value) -> onnx.Value:
        y, bias = matrices[which].product(y, index), biases[which]
        at = index if isinstance(index, onnx.Value) else np.int64(index)
        return y if bias is None else e.op("Add", y, e.op("Gather", bias, at, axis=0))

    def one(part: onnx.Value, index: int | onnx.Value) -> onnx.Value:
        h = activation(e, spec, product(part, 0, index))
        return product(_rounded(e, spec, h, (some, spec.hidden)), 1, index)

    if form == "loop":
        return by_loop(e, x, counts, one, spec.dtype)
    return by_if(e, x, counts, spec.num, one, int(spec.x.shape[1]), spec.dtype)


def dense_experts(e: Emitter, spec: Spec, x: onnx.Value) -> onnx.Value:
    """Every expert for every token, all in two products; what was not chosen is left out of the sum."""
    tokens, width = spec.x.shape
    num, f = spec.num, spec.hidden
    gate_up, down = (m.stack(transpose=True) for m in spec.matrices(e))

    def biased(y: onnx.Value, which: int) -> onnx.Value:
        bias = bias_of(e, spec, which)
        return y if bias is None else e.op("Add", y, e.op("Unsqueeze", bias, np.array([1])))

    h = activation(e, spec, biased(e.op("MatMul", _rounded(e, spec, x, (tokens, width)), gate_up), 0))
    y = biased(e.op("MatMul", _rounded(e, spec, h, (num, tokens, f)), down), 1)  # [E, T, d]
    weights, ids = e.cast(e.value(spec.weights), spec.weights.dtype, spec.dtype), _ids(e, spec)
    zeros = e.op("Expand", e.scalar(0, spec.dtype), e.sizes.vector((tokens, num)))
    ones = e.op("Expand", e.scalar(1, spec.dtype), e.sizes.vector(spec.experts.shape))
    share = e.op("ScatterElements", zeros, ids, weights, axis=1, reduction="add")
    chosen = e.op("Greater", e.op("ScatterElements", zeros, ids, ones, axis=1), e.scalar(0, spec.dtype))
    share, chosen = (e.op("Unsqueeze", e.op("Transpose", v, perm=[1, 0]), np.array([2])) for v in (share, chosen))
    y = e.op("Where", chosen, e.op("Mul", y, share), e.scalar(0, spec.dtype))
    return reduce(e, "ReduceSum", y, (0,), False)
