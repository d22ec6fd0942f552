"""Gated activations of an expert, shared by the full-precision and the FP8 kernels."""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr):
    """activation(gate) · up for float32 tiles."""
    if ACTIVATION == "silu":
        h = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        h = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        h = gate / (1.0 + tl.exp(-2.0 * inner))  # 0.5 · (1 + tanh(z)) = 1 / (1 + exp(−2z))
    else:
        tl.static_assert(ACTIVATION == "relu", "unknown activation")
        h = tl.where(gate < 0.0, 0.0, gate)
    return h * up


@triton.jit
def gated_clamped(gate, up, limit, alpha, up_offset):
    """min(gate, limit) · sigmoid(alpha · min(gate, limit)) · (clip(up, ±limit) + up_offset); NaN stays."""
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return gate / (1.0 + tl.exp(-alpha * gate)) * (up + up_offset)
