"""Routed experts: grouped gated MLPs over tokens sorted by expert."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moec.backends.triton.kernels.activation import ACTIVATIONS, gated, gated_clamped
from moec.backends.triton.kernels.checks import (
    describe,
    require,
    require_float,
    require_same_device,
    require_shape,
)
from moec.backends.triton.kernels.dispatch import check_routing, combine, sort_by_expert
from moec.backends.triton.kernels.tiles import Tile, experts_tile
from moec.backends.triton.launch import cdiv, launch


@triton.jit
def gate_up_kernel(
    x_ptr, w_ptr, bias_ptr, h_ptr, order_ptr, bounds_ptr, tile_expert_ptr, tile_start_ptr, E, F, D, limit, alpha,
    up_offset, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
    ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_LIMIT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(F, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    expert = tl.load(tile_expert_ptr + tile)
    if expert >= E:
        return
    row = tl.load(tile_start_ptr + tile) + tl.arange(0, BLOCK_M)
    row_mask = row < tl.load(bounds_ptr + expert + 1)
    token = tl.load(order_ptr + row, mask=row_mask, other=0) // K
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + token[:, None] * D + k[None, :]
    gate_row = expert * (2 * F) + (2 * n if INTERLEAVED else n)
    up_row = gate_row + (1 if INTERLEAVED else F)
    gate_ptrs = w_ptr + gate_row[:, None] * D + k[None, :]
    up_ptrs = w_ptr + up_row[:, None] * D + k[None, :]
    gate = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, D, BLOCK_K):
        inside = k[None, :] < D - k0
        x = tl.load(x_ptrs, mask=row_mask[:, None] & inside, other=0.0)
        w_gate = tl.load(gate_ptrs, mask=(n[:, None] < F) & inside, other=0.0)
        w_up = tl.load(up_ptrs, mask=(n[:, None] < F) & inside, other=0.0)
        if SWAP:
            gate = tl.dot(w_gate, tl.trans(x), gate, input_precision="ieee")
            up = tl.dot(w_up, tl.trans(x), up, input_precision="ieee")
        else:
            gate = tl.dot(x, tl.trans(w_gate), gate, input_precision="ieee")
            up = tl.dot(x, tl.trans(w_up), up, input_precision="ieee")
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
    if SWAP:
        gate, up = tl.trans(gate), tl.trans(up)
    if HAS_BIAS:
        gate += tl.load(bias_ptr + gate_row, mask=n < F, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias_ptr + up_row, mask=n < F, other=0.0).to(tl.float32)[None, :]
    if HAS_LIMIT:
        h = gated_clamped(gate, up, limit, alpha, up_offset)
    else:
        h = gated(gate, up, ACTIVATION)
    h_mask = row_mask[:, None] & (n[None, :] < F)
    tl.store(h_ptr + row[:, None] * F + n[None, :], h.to(h_ptr.dtype.element_ty), mask=h_mask)


@triton.jit
def down_kernel(
    h_ptr, w_ptr, bias_ptr, weights_ptr, y_ptr, order_ptr, bounds_ptr, tile_expert_ptr, tile_start_ptr, E, D, F,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(D, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    expert = tl.load(tile_expert_ptr + tile)
    if expert >= E:
        return
    row = tl.load(tile_start_ptr + tile) + tl.arange(0, BLOCK_M)
    row_mask = row < tl.load(bounds_ptr + expert + 1)
    slot = tl.load(order_ptr + row, mask=row_mask, other=0)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    h_ptrs = h_ptr + row[:, None] * F + k[None, :]
    w_ptrs = w_ptr + (expert * D + n)[:, None] * F + k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, F, BLOCK_K):
        inside = k[None, :] < F - k0
        h = tl.load(h_ptrs, mask=row_mask[:, None] & inside, other=0.0)
        w = tl.load(w_ptrs, mask=(n[:, None] < D) & inside, other=0.0)
        if SWAP:
            acc = tl.dot(w, tl.trans(h), acc, input_precision="ieee")
        else:
            acc = tl.dot(h, tl.trans(w), acc, input_precision="ieee")
        h_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    if SWAP:
        acc = tl.trans(acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + expert * D + n, mask=n < D, other=0.0).to(tl.float32)[None, :]
    acc *= tl.load(weights_ptr + slot, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    y_mask = row_mask[:, None] & (n[None, :] < D)
    tl.store(y_ptr + slot[:, None] * D + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=y_mask)


def experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    *,
    activation: str = "silu",
    interleaved: bool = False,
    limit: float | None = None,
    alpha: float = 1.702,
    up_offset: float = 1.0,
    tiles: tuple[Tile, Tile] | None = None,
) -> torch.Tensor:
    """Σ over a token's experts of weight · (down_e @ activation(gate_e @ x, up_e @ x)) → [T, d] in x's dtype.

    x: [T, d] float32, bfloat16 or float16; weights: float [T, k]; experts: integer [T, k], where a number outside
    0..E-1 contributes nothing; gate_up: [E, 2f, d] (f gate rows, then f up rows; alternating when `interleaved`),
    down: [E, d, f], biases [E, 2f] and [E, d], all in x's dtype. activation: "silu" (SwiGLU), "gelu", "gelu_tanh",
    "relu"; with `limit` the clamped SwiGLU of GPT-OSS with its `alpha` and `up_offset`.
    Products accumulate in float32; the hidden rows and each expert's weighted output are rounded to x's dtype, and
    their sum over k is taken in float32 in slot order. `tiles` overrides the block sizes of the two products (equal m).
    Raises ValueError for wrong shapes, dtypes or devices.
    """
    require_float("x", x)
    check_routing(x, weights, experts)
    require(activation in ACTIVATIONS, f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    tokens, d = x.shape
    require(gate_up.ndim == 3 and gate_up.shape[1] % 2 == 0, f"gate_up must be [E, 2f, d], got {describe(gate_up)}")
    num_experts, f = gate_up.shape[0], gate_up.shape[1] // 2
    require_shape("gate_up", gate_up, (num_experts, 2 * f, d))
    require_shape("down", down, (num_experts, d, f))
    for name, bias, width in (("gate_up_bias", gate_up_bias, 2 * f), ("down_bias", down_bias, d)):
        if bias is not None:
            require_shape(name, bias, (num_experts, width))
    given = [t for t in (gate_up, down, gate_up_bias, down_bias) if t is not None]
    require(all(t.dtype == x.dtype for t in given), f"gate_up, down and their biases must be {x.dtype} as x is")
    require_same_device(
        x=x, weights=weights, experts=experts, gate_up=gate_up, down=down, gate_up_bias=gate_up_bias,
        down_bias=down_bias,
    )  # fmt: skip
    slots = experts.numel()
    if slots == 0 or num_experts == 0 or d == 0:
        return torch.zeros((tokens, d), dtype=x.dtype, device=x.device)
    up_tile, down_tile = (
        (Tile(*tile) for tile in tiles)
        if tiles
        else (
            experts_tile(slots / num_experts, f, d, x.dtype, gated=True),
            experts_tile(slots / num_experts, d, f, x.dtype, gated=False),
        )
    )
    require(up_tile.m == down_tile.m, f"the two tiles must have one m, got {up_tile.m} and {down_tile.m}")
    plan = sort_by_expert(experts, num_experts, up_tile.m)
    tile_map = (plan.order, plan.bounds, plan.tile_expert, plan.tile_start)
    h = torch.empty((slots, f), dtype=x.dtype, device=x.device)
    launch(
        gate_up_kernel, (plan.tile_expert.numel() * cdiv(f, up_tile.n),),
        x.contiguous(), gate_up.contiguous(), None if gate_up_bias is None else gate_up_bias.contiguous(), h, *tile_map,
        num_experts, f, d, 0.0 if limit is None else float(limit), float(alpha), float(up_offset),
        K=experts.shape[1], BLOCK_M=up_tile.m, BLOCK_N=up_tile.n, BLOCK_K=up_tile.k, SWAP=up_tile.swap,
        ACTIVATION=activation, INTERLEAVED=interleaved, HAS_LIMIT=limit is not None, HAS_BIAS=gate_up_bias is not None,
        num_warps=up_tile.warps, num_stages=up_tile.stages,
    )  # fmt: skip
    y = torch.empty((slots, d), dtype=x.dtype, device=x.device)
    launch(
        down_kernel, (plan.tile_expert.numel() * cdiv(d, down_tile.n),),
        h, down.contiguous(), None if down_bias is None else down_bias.contiguous(), weights.contiguous(), y, *tile_map,
        num_experts, d, f,
        BLOCK_M=down_tile.m, BLOCK_N=down_tile.n, BLOCK_K=down_tile.k, SWAP=down_tile.swap,
        HAS_BIAS=down_bias is not None, num_warps=down_tile.warps, num_stages=down_tile.stages,
    )  # fmt: skip
    return combine(y, experts.contiguous(), num_experts, x.dtype)
