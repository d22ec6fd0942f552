"""Experts as one operator of ONNX Runtime: com.microsoft.MoE, and QMoE for stored integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as onnx

from moec.backends.onnxruntime import nbits
from moec.backends.onnxruntime.emit import MICROSOFT, Emitter
from moec.backends.onnxruntime.expert_spec import Spec, bias_of
from moec.backends.onnxruntime.reduction import reduce
from moec.ir import DType, Value

# log of "not chosen" for com.microsoft.MoE: its softmax makes exactly 0 of it in f32
NOT_CHOSEN = -1e4


def unsuitable(e: Emitter, spec: Spec) -> str | None:
    """Why neither operator can compute this node; None where one can."""
    if e.options.portable:
        return "it is not a standard operator"
    if spec.dtype is not DType.F32 or spec.group is not None:
        return "it computes in f32 only, without rounding activations"
    if spec.node.attrs["activation"] != "silu":
        return f"its activation is silu, not {spec.node.attrs['activation']}"
    if spec.hidden == 0 or spec.x.shape[1] == 0:
        return "the experts are empty"
    if spec.nbits and spec.nbits_block is None:
        return f"blocks of {spec.block[1]} do not divide rows of {spec.x.shape[1]} and {spec.hidden}"
    source: Value = spec.weights
    while source.producer is not None and source.producer.op == "math.cast":
        (inner,) = source.producer.operands
        assert inner is not None
        source = inner
    route = source.producer
    if route is None or route.op != "moe.route" or route.attrs["scale"] <= 0:
        return "it takes positive weights of distinct experts, known only behind moe.route"
    return None


def _swiglu(spec: Spec) -> dict[str, Any]:
    """What both operators are told about k and the activation."""
    known = {"k": int(spec.experts.shape[1]), "activation_type": "swiglu", "swiglu_fusion": 1}
    if spec.limit is None:
        return known | {"activation_alpha": 1.0, "activation_beta": 0.0}
    attrs = spec.node.attrs
    limited = {"activation_alpha": attrs["alpha"], "activation_beta": attrs["up_offset"], "swiglu_limit": spec.limit}
    return known | limited


def moe_operator(e: Emitter, spec: Spec, x: onnx.Value) -> onnx.Value:
    """com.microsoft.MoE takes logits: the log of each chosen weight makes its softmax give weight / sum,
    and the result is scaled by the sum."""
    tokens = spec.x.shape[0]
    gate_up, down = spec.matrices(e, interleave=True)
    weights = e.cast(e.value(spec.weights), spec.weights.dtype, DType.F32)
    floor = e.scalar(np.finfo(np.float32).tiny, DType.F32)
    logs = e.op("Log", e.op("Max", weights, floor))
    none = e.op("Expand", e.scalar(NOT_CHOSEN, DType.F32), e.sizes.vector((tokens, spec.num)))
    logits = e.op("ScatterElements", none, e.value(spec.experts), logs, axis=1)
    biases = [bias_of(e, spec, which, interleave=True) for which in (0, 1)]
    y = e.op(
        "MoE",
        *(x, logits, gate_up.stack(transpose=False), biases[0], down.stack(transpose=False), biases[1]),
        domain=MICROSOFT,
        normalize_routing_weights=1,
        **_swiglu(spec),
    )
    return e.op("Mul", y, reduce(e, "ReduceSum", weights, (-1,), True))


def qmoe_operator(e: Emitter, spec: Spec, x: onnx.Value) -> onnx.Value:
    """com.microsoft.QMoE takes the k largest of what it is given, here the weights of the chosen experts among zeros,
    and adds up with these weights; those of 1e-8 at most it leaves out, and of NaN it makes numbers."""
    size = spec.nbits_block
    assert size is not None
    assert spec.scales is not None
    weights = e.cast(e.value(spec.weights), spec.weights.dtype, DType.F32)
    none = e.op("Expand", e.scalar(0.0, DType.F32), e.sizes.vector((spec.x.shape[0], spec.num)))
    routing = e.op("ScatterElements", none, e.value(spec.experts), weights, axis=1)
    stored: list[onnx.Value] = []
    for codes, scale, matrix in zip((spec.gate_up, spec.down), spec.scales, spec.matrices(e, True), strict=True):
        key = ".all" if matrix.rows is None else ".all.reordered"
        packed, scales = nbits.operands(e, codes, scale, spec.block, size, rows=matrix.rows, key=key, flat=True)
        stored += packed, scales
    biases = [bias_of(e, spec, which, interleave=True) for which in (0, 1)]
    nothing = (None,) * 6  # a third matrix, zero points
    y = e.op(
        "QMoE",
        *(x, routing, stored[0], stored[1], biases[0], stored[2], stored[3], biases[1], *nothing, routing),
        domain=MICROSOFT,
        normalize_routing_weights=0,
        expert_weight_bits=spec.gate_up.dtype.bits,
        block_size=size,
        weights_prepacked=0,
        accuracy_level=nbits.LEVEL,
        **_swiglu(spec),
    )
    return nbits.carrying(e, y, weights, int(spec.weights.shape[1]))
