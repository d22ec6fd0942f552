"""What a node of grouped experts is: its weights, biases and activation, whichever form it is lowered to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as onnx
import torch

from moec.backends.onnxruntime import nbits
from moec.backends.onnxruntime.elementwise import gelu_of, silu_of
from moec.backends.onnxruntime.emit import Emitter
from moec.backends.onnxruntime.grouped import ExpertWeights
from moec.backends.onnxruntime.types import carrier
from moec.ir import DType, Node, Value


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


def bias_of(e: Emitter, spec: Spec, which: int, interleave: bool = False) -> onnx.Value | None:
    """The bias [E, …] of gate_up (0), in the order of `Spec.matrices`, or of down (1)."""
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
