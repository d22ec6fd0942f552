"""Calls of every kernel at production sizes, for ahead-of-time compilation (`aot.report`)."""

from __future__ import annotations

from functools import partial

import torch

from moec.backends.triton.aot import Case
from moec.backends.triton.kernels.attention import attention
from moec.backends.triton.kernels.elementwise import elementwise
from moec.backends.triton.kernels.experts import experts
from moec.backends.triton.kernels.fp8_experts import fp8_experts
from moec.backends.triton.kernels.fp8_linear import fp8_linear
from moec.backends.triton.kernels.linear import linear
from moec.backends.triton.kernels.linear_attention import linear_attention
from moec.backends.triton.kernels.quantize import quantize
from moec.backends.triton.kernels.rms_norm import rms_norm
from moec.backends.triton.kernels.route import route

D, F, E, K = 7168, 2048, 256, 8
"""DeepSeek-V3: hidden size, expert size, routed experts, experts per token."""

F8, F32, BF16 = torch.float8_e4m3fn, torch.float32, torch.bfloat16


def _meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _routed(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _meta(tokens, K, dtype=F32), _meta(tokens, K, dtype=torch.int64)


def _rms_norm() -> object:
    return rms_norm(_meta(4096, D), _meta(D), residual=_meta(4096, D))


def _quantize() -> object:
    return quantize(_meta(4096, D))


def _route_softmax() -> object:
    return route(_meta(4096, 128, dtype=F32), k=8)


def _route_deepseek() -> object:
    return route(
        _meta(4096, E, dtype=F32), _meta(E, dtype=F32),
        k=K, scoring="sigmoid", n_group=8, topk_group=4, scale=2.5, normalize_eps=1e-20,
    )  # fmt: skip


def _linear(rows: int, dtype: torch.dtype) -> object:
    return linear(_meta(rows, D, dtype=dtype), _meta(F, D, dtype=dtype))


def _fp8_linear(rows: int) -> object:
    x, x_scale = _meta(rows, D, dtype=F8), _meta(rows, D // 128, dtype=F32)
    weight, weight_scale = _meta(F, D, dtype=F8), _meta(F // 128, D // 128, dtype=F32)
    return fp8_linear(x, x_scale, weight, weight_scale, out_dtype=BF16)


def _experts(tokens: int, dtype: torch.dtype) -> object:
    gate_up, down = _meta(E, 2 * F, D, dtype=dtype), _meta(E, D, F, dtype=dtype)
    return experts(_meta(tokens, D, dtype=dtype), *_routed(tokens), gate_up, down)


def _fp8_experts(tokens: int, group: int | None) -> object:
    gate_up, gate_up_scale = _meta(E, 2 * F, D, dtype=F8), _meta(E, 2 * F // 128, D // 128, dtype=F32)
    down, down_scale = _meta(E, D, F, dtype=F8), _meta(E, D // 128, F // 128, dtype=F32)
    return fp8_experts(_meta(tokens, D), *_routed(tokens), gate_up, gate_up_scale, down, down_scale, group=group)


def _elementwise() -> object:
    """SwiGLU on gate and up halves that lie side by side, plus a bias: the reads are strided."""
    gate, up = _meta(4096, 2 * F).chunk(2, dim=1)
    body = "v0 = silu(x0).to(tl.bfloat16).to(tl.float32)\nv1 = v0 * x1\nv2 = v1 + x2\nv3 = v2 > x2"
    return elementwise(body, (("v2", BF16), ("v3", torch.bool)), (4096, F), gate, up, _meta(F))


def _attention(
    s: int, t: int, heads: int, kv_heads: int, head: int, value_head: int, dtype: torch.dtype = BF16
) -> object:
    q, k = _meta(1, heads, s, head, dtype=dtype), _meta(1, kv_heads, t, head, dtype=dtype)
    return attention(q, k, _meta(1, kv_heads, t, value_head, dtype=dtype), scale=head**-0.5, causal=True)


def _gated_delta_rule() -> object:
    """Qwen3-Next: 16 heads of keys, 32 of values."""
    q, v, gate = _meta(1, 4096, 16, 128), _meta(1, 4096, 32, 128), _meta(1, 4096, 32)
    return linear_attention(q, q, v, gate, gate, _meta(1, 32, 128, 128), scale=128**-0.5)


def _mamba() -> object:
    """Jamba: one query and key for all channels, a state of 16 in each."""
    q = _meta(1, 4096, 1, 16, dtype=F32)
    return linear_attention(q, q, _meta(1, 4096, 8192, 1, dtype=F32), _meta(1, 4096, 8192, 16, dtype=F32))


def production_cases() -> list[Case]:
    """Every kernel at the block sizes of decode, medium and prefill batches, mostly of DeepSeek-V3.

    float32 kernels, normalisation, quantisation and routing are expected to use no tensor cores; a decode step of
    grouped-query attention has too few rows for warp-group products.
    """
    up_down = {"gate_up_kernel": "HGMMA", "down_kernel": "HGMMA"}
    fp8_up_down = {"fp8_gate_up_kernel": "QGMMA", "fp8_down_kernel": "QGMMA"}
    weight_only = {"fp8_gate_up_kernel": "HGMMA", "fp8_down_kernel": "HGMMA"}
    attend = {"attention_kernel": "HGMMA"}
    cases = [
        Case("rms_norm", _rms_norm, {}),
        Case("quantize", _quantize, {}),
        Case("elementwise", _elementwise, {}),
        Case("route softmax", _route_softmax, {}),
        Case("route deepseek-v3", _route_deepseek, {}),
        Case("linear f32", partial(_linear, 4096, F32), {}),
        Case("experts f32", partial(_experts, 2048, F32), {}),
        Case("linear_attention gated delta rule", _gated_delta_rule, {}),
        Case("linear_attention mamba", _mamba, {}),
        Case("attention f32", partial(_attention, 1024, 1024, 32, 8, 128, 128, F32), {}),
        Case("attention gqa prefill", partial(_attention, 4096, 4096, 32, 8, 128, 128), attend),
        Case("attention gqa decode", partial(_attention, 1, 4096, 32, 8, 128, 128), {"attention_kernel": "HMMA"}),
        Case("attention mla prefill", partial(_attention, 4096, 4096, 128, 128, 192, 128), attend),
        Case("attention mla decode", partial(_attention, 1, 4096, 128, 1, 576, 512), attend),
    ]
    for label, rows in (("decode", 16), ("decode 32", 32), ("medium", 128), ("prefill", 4096)):
        cases.append(Case(f"linear bf16 {label}", partial(_linear, rows, BF16), {"linear_kernel": "HGMMA"}))
        cases.append(Case(f"fp8_linear {label}", partial(_fp8_linear, rows), {"fp8_linear_kernel": "QGMMA"}))
    for label, tokens in (("decode", 128), ("medium", 2048), ("prefill", 16384)):  # 4, 64 and 512 rows per expert
        cases.append(Case(f"experts bf16 {label}", partial(_experts, tokens, BF16), up_down))
        cases.append(Case(f"fp8_experts {label}", partial(_fp8_experts, tokens, 128), fp8_up_down))
        cases.append(Case(f"fp8_experts weight-only {label}", partial(_fp8_experts, tokens, None), weight_only))
    return cases
