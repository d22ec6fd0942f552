"""Lowerings of grouped experts, in three forms (see `choose`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as onnx
import torch

from moec.backends.onnxruntime import nbits
from moec.backends.onnxruntime.backend import backend
from moec.backends.onnxruntime.blocks import rounded
from moec.backends.onnxruntime.elementwise import gelu_of, silu_of
from moec.backends.onnxruntime.emit import MICROSOFT, Emitter
from moec.backends.onnxruntime.grouped import ExpertWeights, grouped_product
from moec.backends.onnxruntime.reduction import reduce
from moec.backends.onnxruntime.tensor import count_ids
from moec.backends.onnxruntime.types import carrier
from moec.ir import DType, Graph, Node, Value
from moec.ir.ops.moe import routed

# sessions with more MatMul chains than this take minutes to load
UNROLL_LIMIT = 2048
# log of "not chosen" for com.microsoft.MoE: its softmax makes exactly 0 of it in f32
NOT_CHOSEN = -1e4


@dataclass(frozen=True, eq=False)
class Spec:
    """What `moe.experts` and `quant.scaled_experts` have in common. Products run in `dtype`."""

    node: Node
    x: Value
    weights: Value
    experts: Value
    gate_up: Value
    down: Value
    scales: tuple[Value, Value] | None
    biases: tuple[Value | None, Value | None]
    block: tuple[int, int]
    group: int | None
    dtype: DType

    @staticmethod
    def of(node: Node) -> Spec:
        at = node.operand
        x, weights, experts, gate_up, down = (at(n) for n in ("x", "weights", "experts", "gate_up", "down"))
        biases = at("gate_up_bias"), at("down_bias")
        if node.op == "quant.scaled_experts":
            scales = at("gate_up_scale"), at("down_scale")
            a = node.attrs
            return Spec(node, x, weights, experts, gate_up, down, scales, biases, a["block"], a["group"], DType.F32)
        return Spec(node, x, weights, experts, gate_up, down, None, biases, (1, 1), None, carrier(x.dtype))

    @property
    def num(self) -> int:
        return int(self.gate_up.shape[0])

    @property
    def hidden(self) -> int:
        """Width of the gate (f)."""
        return int(self.down.shape[2])

    @property
    def nbits(self) -> bool:
        """Whether the weights are stored integers, which products take as they are."""
        return self.scales is not None and nbits.stored_experts(self.node)

    @property
    def nbits_block(self) -> int | None:
        """The block of com.microsoft.QMoE, which is one for both matrices and divides both of their widths."""
        widths = [int(v.shape[2]) for v in (self.gate_up, self.down)]
        found = [nbits.block_size(width, self.block[1]) for width in widths]
        size = None if None in found else min(b for b in found if b is not None)
        return size if size is not None and not any(width % size for width in widths) else None

    @property
    def interleaved(self) -> bool:
        return bool(self.node.attrs.get("interleaved", False))

    @property
    def limit(self) -> float | None:
        return self.node.attrs.get("limit")

    def matrices(self, e: Emitter, interleave: bool = False) -> tuple[ExpertWeights, ExpertWeights]:
        """gate_up (gate rows first, or interleaved) and down."""
        order = None
        if self.interleaved != interleave:
            order = torch.arange(2 * self.hidden).reshape((2, -1) if interleave else (-1, 2)).T.reshape(-1)
        scales = self.scales or (None, None)
        as_stored = self.nbits and not e.options.portable
        return (
            ExpertWeights(e, self.gate_up, scales[0], self.block, order, nbits=as_stored),
            ExpertWeights(e, self.down, scales[1], self.block, None, nbits=as_stored),
        )


@backend.lowers("moe.experts", "quant.scaled_experts")
def experts(e: Emitter, node: Node) -> onnx.Value:
    spec = Spec.of(node)
    form = choose(e, spec)
    e.count(f"experts.{form}")
    x = e.cast(e.value(spec.x), spec.x.dtype, spec.dtype)
    if form == "moe":
        y = qmoe_operator(e, spec, x) if spec.nbits else moe_operator(e, spec, x)
    else:
        y = sorted_experts(e, spec, x, unroll=form == "unrolled")
    return e.cast(y, spec.dtype, spec.x.dtype)


def choose(e: Emitter, spec: Spec) -> str:
    """ "unrolled": a chain of MatMuls per expert on its own initialisers (fastest), while the whole graph has
    at most UNROLL_LIMIT experts; beyond, "moe": com.microsoft.MoE where it computes the same; else "loop". For integer
    weights "moe" is com.microsoft.QMoE, and comes first: it is faster for few rows (bench/RESULTS.md)."""
    wanted = e.options.experts
    if wanted == "moe" and (why := _not_moe(e, spec)):
        raise e.refuse(spec.node, f"experts='moe' is not possible: {why}")
    if wanted != "auto":
        return wanted
    if spec.nbits and _not_moe(e, spec) is None:
        return "moe"
    if e.options.compact:  # the other forms take all experts at once, in f32
        return "unrolled"
    if _count(e.graph, e.memo) <= UNROLL_LIMIT:
        return "unrolled"
    return "loop" if _not_moe(e, spec) else "moe"


def _count(graph: Graph, memo: dict) -> int:
    """Experts of the whole graph, once per call path."""
    if "experts" not in memo:
        nodes = graph.find("moe.experts") + graph.find("quant.scaled_experts")
        memo["experts"] = sum(int(n.operand("gate_up").shape[0]) for n in nodes)
    return memo["experts"]


def _not_moe(e: Emitter, spec: Spec) -> str | None:
    """Why com.microsoft.MoE cannot compute this node; None where it can."""
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


def sorted_experts(e: Emitter, spec: Spec, x: onnx.Value, *, unroll: bool) -> onnx.Value:
    """Rows sorted by expert, one product per expert and matrix, rows put back and added up per token."""
    tokens, width = spec.x.shape
    k = spec.experts.shape[1]
    rows = tokens * k
    gate_up, down = spec.matrices(e)
    flat = e.op("Reshape", e.value(spec.experts), np.array([-1]))
    if not routed(spec.experts, spec.num):
        # ids must fail where they are out of range; ScatterElements takes negative ones
        flat = e.op("Where", e.op("Less", flat, np.int64(0)), np.int64(spec.num), flat)
    counts = count_ids(e, flat, spec.num, rows)
    ids, order = e.op("TopK", flat, e.sizes.one(rows), outputs=2, axis=0, largest=0, sorted=1)
    if spec.group is not None:
        x = rounded(e, x, (tokens, width), spec.group)
    x = e.op("Gather", x, e.op("Div", order, np.int64(k)), axis=0)
    h = _biased(e, grouped_product(e, x, counts, gate_up, unroll), 0, ids, spec)
    h = activation(e, spec, h)
    if spec.group is not None:
        h = rounded(e, h, (rows, spec.hidden), spec.group)
    y = _biased(e, grouped_product(e, h, counts, down, unroll), 1, ids, spec)
    y = e.op("Gather", y, e.op("ScatterElements", order, order, e.sizes.range(rows), axis=0), axis=0)
    y = e.reshape(y, (rows, width), (tokens, k, width))
    scale = e.cast(e.value(spec.weights), spec.weights.dtype, spec.dtype)
    y = e.op("Mul", y, e.op("Unsqueeze", scale, np.array([2])))
    return reduce(e, "ReduceSum", y, (1,), False)


def _biased(e: Emitter, y: onnx.Value, which: int, ids: onnx.Value, spec: Spec) -> onnx.Value:
    """Adds each row's expert's bias, that of gate_up (0) or of down (1)."""
    bias = _bias(e, spec, which, interleave=False)
    return y if bias is None else e.op("Add", y, e.op("Gather", bias, ids, axis=0))


def _bias(e: Emitter, spec: Spec, which: int, interleave: bool) -> onnx.Value | None:
    """A bias [E, …]; that of gate_up in the order of `Spec.matrices`."""
    bias = spec.biases[which]
    if bias is None:
        return None
    value = e.cast(e.value(bias), bias.dtype, spec.dtype)
    if which == 1 or spec.interleaved == interleave:
        return value
    order = torch.arange(2 * spec.hidden).reshape((2, -1) if interleave else (-1, 2)).T.reshape(-1)
    return e.op("Gather", value, order.numpy(), axis=1)


def activation(e: Emitter, spec: Spec, h: onnx.Value) -> onnx.Value:
    """Gate and up side by side [R, 2f] → [R, f]."""
    f, dtype, kind = spec.hidden, spec.dtype, spec.node.attrs["activation"]
    gate, up = e.op("Split", h, np.array([f, f]), outputs=2, axis=-1)
    if spec.limit is not None:
        gate = e.op("Min", gate, e.scalar(spec.limit, dtype))
        up = e.op("Max", e.op("Min", up, e.scalar(spec.limit, dtype)), e.scalar(-spec.limit, dtype))
        gate = silu_of(e, gate, dtype, alpha=spec.node.attrs["alpha"])
        offset = spec.node.attrs["up_offset"]
        return e.op("Mul", gate, e.op("Add", up, e.scalar(offset, dtype)) if offset else up)
    if kind == "silu":
        gate = silu_of(e, gate, dtype)
    elif kind == "relu":
        gate = e.op("Relu", gate)
    else:
        gate = gelu_of(e, gate, dtype, "tanh" if kind == "gelu_tanh" else "none")
    return e.op("Mul", gate, up)


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
    limit = spec.limit
    biases = [_bias(e, spec, which, interleave=True) for which in (0, 1)]
    extra: dict[str, Any] = {} if limit is None else {"swiglu_limit": limit}
    y = e.op(
        "MoE",
        *(x, logits, gate_up.stack(transpose=False), biases[0], down.stack(transpose=False), biases[1]),
        domain=MICROSOFT,
        k=int(spec.experts.shape[1]),
        activation_type="swiglu",
        swiglu_fusion=1,
        normalize_routing_weights=1,
        activation_alpha=1.0 if limit is None else spec.node.attrs["alpha"],
        activation_beta=0.0 if limit is None else spec.node.attrs["up_offset"],
        **extra,
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
    biases = [_bias(e, spec, which, interleave=True) for which in (0, 1)]
    limit = spec.limit
    extra: dict[str, Any] = {} if limit is None else {"swiglu_limit": limit}
    nothing = (None,) * 6  # a third matrix, zero points
    y = e.op(
        "QMoE",
        *(x, routing, stored[0], stored[1], biases[0], stored[2], stored[3], biases[1], *nothing, routing),
        domain=MICROSOFT,
        k=int(spec.experts.shape[1]),
        activation_type="swiglu",
        swiglu_fusion=1,
        normalize_routing_weights=0,
        activation_alpha=1.0 if limit is None else spec.node.attrs["alpha"],
        activation_beta=0.0 if limit is None else spec.node.attrs["up_offset"],
        expert_weight_bits=spec.gate_up.dtype.bits,
        block_size=size,
        weights_prepacked=0,
        accuracy_level=nbits.LEVEL,
        **extra,
    )
    return nbits.carrying(e, y, weights, int(spec.weights.shape[1]))
