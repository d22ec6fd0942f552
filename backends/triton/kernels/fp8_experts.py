"""Routed experts on block-scaled FP8 weights, with activations quantised per token (W8A8) or kept (weight-only)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moec.backends.triton.kernels.activation import ACTIVATIONS, gated, gated_clamped
from moec.backends.triton.kernels.checks import (
    E4M3,
    GROUP,
    describe,
    require,
    require_codes,
    require_float,
    require_group,
    require_same_device,
    require_shape,
)
from moec.backends.triton.kernels.dispatch import check_routing, combine, sort_by_expert
from moec.backends.triton.kernels.quantize import quantize
from moec.backends.triton.kernels.tiles import Tile, fp8_experts_tile
from moec.backends.triton.launch import cdiv, launch


@triton.jit
def scaled_product(x, w, xs, ws, SWAP: tl.constexpr, W8A8: tl.constexpr):
    """One scale group's share of x wᵀ [m, n] (with SWAP [n, m]); ws is a scalar or one scale for each row of w."""
    if not W8A8:
        w = w.to(x.dtype)  # exact: E4M3 codes are representable in every wider float type
    if SWAP:
        part = tl.dot(w, tl.trans(x), input_precision="ieee")
    else:
        part = tl.dot(x, tl.trans(w), input_precision="ieee")
    if W8A8:
        part *= xs[None, :] if SWAP else xs[:, None]
    if len(ws.shape) > 0:
        part *= ws[:, None] if SWAP else ws[None, :]
    else:
        part *= ws
    return part


@triton.jit
def fp8_gate_up_kernel(
    x_ptr, xs_ptr, w_ptr, ws_ptr, bias_ptr, h_ptr, hs_ptr, order_ptr, bounds_ptr, tile_expert_ptr, tile_start_ptr,
    E, F, D, limit, alpha, up_offset,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SWAP: tl.constexpr, W8A8: tl.constexpr, ACTIVATION: tl.constexpr, HAS_LIMIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    GATE_SCALAR: tl.constexpr, UP_SCALAR: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(F, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    expert = tl.load(tile_expert_ptr + tile)
    if expert >= E:
        return
    row = tl.load(tile_start_ptr + tile) + tl.arange(0, BLOCK_M)
    row_mask = row < tl.load(bounds_ptr + expert + 1)
    token = tl.load(order_ptr + row, mask=row_mask, other=0) // K
    n0 = tl.program_id(0) % tiles_n * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    groups = tl.cdiv(D, BLOCK_K)
    x_ptrs = x_ptr + token[:, None] * D + k[None, :]
    if W8A8:
        xs_ptrs = xs_ptr + token * groups
    gate_ptrs = w_ptr + (expert * (2 * F) + n)[:, None] * D + k[None, :]
    up_ptrs = w_ptr + (expert * (2 * F) + F + n)[:, None] * D + k[None, :]
    ws_ptr += expert * tl.cdiv(2 * F, SCALE_ROWS) * groups
    gate_ws = ws_ptr + (n0 if GATE_SCALAR else n) // SCALE_ROWS * groups
    up_ws = ws_ptr + (F + (n0 if UP_SCALAR else n)) // SCALE_ROWS * groups
    gate = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    for g in range(0, groups):
        inside = k[None, :] < D - g * BLOCK_K
        x = tl.load(x_ptrs, mask=row_mask[:, None] & inside, other=0.0)
        w_gate = tl.load(gate_ptrs, mask=(n[:, None] < F) & inside, other=0.0)
        w_up = tl.load(up_ptrs, mask=(n[:, None] < F) & inside, other=0.0)
        xs = tl.load(xs_ptrs + g, mask=row_mask, other=0.0) if W8A8 else 0.0
        gs = tl.load(gate_ws + g) if GATE_SCALAR else tl.load(gate_ws + g, mask=n < F, other=0.0)
        us = tl.load(up_ws + g) if UP_SCALAR else tl.load(up_ws + g, mask=n < F, other=0.0)
        gate += scaled_product(x, w_gate, xs, gs, SWAP, W8A8)
        up += scaled_product(x, w_up, xs, us, SWAP, W8A8)
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
    if HAS_BIAS:
        biases = bias_ptr + expert * (2 * F) + n
        gate_bias = tl.load(biases, mask=n < F, other=0.0).to(tl.float32)
        up_bias = tl.load(biases + F, mask=n < F, other=0.0).to(tl.float32)
        gate += gate_bias[:, None] if SWAP else gate_bias[None, :]
        up += up_bias[:, None] if SWAP else up_bias[None, :]
    if HAS_LIMIT:
        h = gated_clamped(gate, up, limit, alpha, up_offset)
    else:
        h = gated(gate, up, ACTIVATION)
    if SWAP:
        h = tl.trans(h)
    h_mask = row_mask[:, None] & (n[None, :] < F)
    h_ptrs = h_ptr + row[:, None] * F + n[None, :]
    if W8A8:
        h = tl.reshape(h, (BLOCK_M, BLOCK_N // BLOCK_K, BLOCK_K))
        is_nan = h != h
        scale = tl.max(tl.where(is_nan, 0.0, tl.abs(h)), axis=2, keep_dims=True)
        scale = tl.div_rn(scale, tl.full(scale.shape, 448.0, tl.float32))
        scale = tl.where(scale == 0.0, 1.0, scale)
        scale = tl.where(tl.max(is_nan.to(tl.int32), axis=2, keep_dims=True) > 0, float("nan"), scale)
        codes = tl.div_rn(h, tl.broadcast_to(scale, h.shape)).to(tl.float8e4nv)
        tl.store(h_ptrs, tl.reshape(codes, (BLOCK_M, BLOCK_N)), mask=h_mask)
        group = n0 // BLOCK_K + tl.arange(0, BLOCK_N // BLOCK_K)
        hs_groups = tl.cdiv(F, BLOCK_K)
        hs_mask = row_mask[:, None] & (group[None, :] < hs_groups)
        scale = tl.reshape(scale, (BLOCK_M, BLOCK_N // BLOCK_K))
        tl.store(hs_ptr + row[:, None] * hs_groups + group[None, :], scale, mask=hs_mask)
    else:
        tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=h_mask)


@triton.jit
def fp8_down_kernel(
    h_ptr, hs_ptr, w_ptr, ws_ptr, bias_ptr, weights_ptr, y_ptr, order_ptr, bounds_ptr, tile_expert_ptr,
    tile_start_ptr, E, D, F,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SWAP: tl.constexpr, W8A8: tl.constexpr, SCALAR: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(D, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    expert = tl.load(tile_expert_ptr + tile)
    if expert >= E:
        return
    row = tl.load(tile_start_ptr + tile) + tl.arange(0, BLOCK_M)
    row_mask = row < tl.load(bounds_ptr + expert + 1)
    slot = tl.load(order_ptr + row, mask=row_mask, other=0)
    n0 = tl.program_id(0) % tiles_n * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    groups = tl.cdiv(F, BLOCK_K)
    h_ptrs = h_ptr + row[:, None] * F + k[None, :]
    if W8A8:
        hs_ptrs = hs_ptr + row * groups
    w_ptrs = w_ptr + (expert * D + n)[:, None] * F + k[None, :]
    ws_ptrs = ws_ptr + (expert * tl.cdiv(D, SCALE_ROWS) + (n0 if SCALAR else n) // SCALE_ROWS) * groups
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    for g in range(0, groups):
        inside = k[None, :] < F - g * BLOCK_K
        h = tl.load(h_ptrs, mask=row_mask[:, None] & inside, other=0.0)
        w = tl.load(w_ptrs, mask=(n[:, None] < D) & inside, other=0.0)
        hs = tl.load(hs_ptrs + g, mask=row_mask, other=0.0) if W8A8 else 0.0
        ws = tl.load(ws_ptrs + g) if SCALAR else tl.load(ws_ptrs + g, mask=n < D, other=0.0)
        acc += scaled_product(h, w, hs, ws, SWAP, W8A8)
        h_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    if SWAP:
        acc = tl.trans(acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + expert * D + n, mask=n < D, other=0.0).to(tl.float32)[None, :]
    acc *= tl.load(weights_ptr + slot, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    y_mask = row_mask[:, None] & (n[None, :] < D)
    tl.store(y_ptr + slot[:, None] * D + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=y_mask)


def fp8_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down: torch.Tensor,
    down_scale: torch.Tensor,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    *,
    block: tuple[int, int] = (GROUP, GROUP),
    group: int | None = GROUP,
    activation: str = "silu",
    limit: float | None = None,
    alpha: float = 1.702,
    up_offset: float = 1.0,
    tiles: tuple[Tile, Tile] | None = None,
) -> torch.Tensor:
    """`experts` on FP8 weights: codes · scale per `block` of each expert's matrix → [T, d] in x's dtype.

    x: [T, d] float32, bfloat16 or float16; weights: float [T, k]; experts: integer [T, k], where a number outside
    0..E-1 contributes nothing; gate_up: float8_e4m3fn [E, 2f, d] (f gate rows, then f up rows) with gate_up_scale
    float32 [E, ceil(2f/block[0]), ceil(d/block[1])]; down: float8_e4m3fn [E, d, f] with down_scale
    [E, ceil(d/block[0]), ceil(f/block[1])]; biases [E, 2f] and [E, d] in x's dtype. activation, `limit`, `alpha` and
    `up_offset` as of `experts`.
    With `group` (which must equal block[1], a power of two up to 128, at least 32 on a GPU) the rows of x and the
    hidden rows are quantised as by `quantize`, the latter from float32; with group=None they are not, and the hidden
    rows are rounded to x's dtype. Products are scaled per block[1] columns and accumulate in float32.
    `tiles` overrides the block sizes of the two products: equal m, k = block[1], and with `group` the first's n a
    multiple of it.
    Raises ValueError for wrong shapes, dtypes or devices.
    """
    require_float("x", x)
    check_routing(x, weights, experts)
    require(activation in ACTIVATIONS, f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    require_group(block[1])
    require(block[0] >= 1, f"block must be positive, got {block}")
    require(group is None or group == block[1], f"group must be None or block[1]={block[1]}, got {group}")
    tokens, d = x.shape
    require(gate_up.ndim == 3 and gate_up.shape[1] % 2 == 0, f"gate_up must be [E, 2f, d], got {describe(gate_up)}")
    num_experts, f = gate_up.shape[0], gate_up.shape[1] // 2
    require_shape("gate_up", gate_up, (num_experts, 2 * f, d))
    require_shape("down", down, (num_experts, d, f))
    scale_rows, k = block
    require_codes("gate_up", gate_up, gate_up_scale, (num_experts, cdiv(2 * f, scale_rows), cdiv(d, k)))
    require_codes("down", down, down_scale, (num_experts, cdiv(d, scale_rows), cdiv(f, k)))
    for name, bias, width in (("gate_up_bias", gate_up_bias, 2 * f), ("down_bias", down_bias, d)):
        if bias is not None:
            require_shape(name, bias, (num_experts, width))
            require(bias.dtype == x.dtype, f"{name} must be {x.dtype} as x is, got {bias.dtype}")
    require_same_device(
        x=x, weights=weights, experts=experts, gate_up=gate_up, gate_up_scale=gate_up_scale, down=down,
        down_scale=down_scale, gate_up_bias=gate_up_bias, down_bias=down_bias,
    )  # fmt: skip
    slots = experts.numel()
    if slots == 0 or num_experts == 0 or d == 0:
        return torch.zeros((tokens, d), dtype=x.dtype, device=x.device)
    up_tile, down_tile = (
        (Tile(*tile) for tile in tiles)
        if tiles
        else (
            fp8_experts_tile(slots / num_experts, f, k, gated=True, w8a8=group is not None),
            fp8_experts_tile(slots / num_experts, d, k, gated=False, w8a8=group is not None),
        )
    )
    require(up_tile.m == down_tile.m, f"the two tiles must have one m, got {up_tile.m} and {down_tile.m}")
    require(up_tile.k == down_tile.k == k, f"the tiles must have k={k}, got {up_tile.k} and {down_tile.k}")
    require(group is None or up_tile.n % k == 0, f"the first tile's n must be a multiple of {k}, got {up_tile.n}")
    plan = sort_by_expert(experts, num_experts, up_tile.m)
    tile_map = (plan.order, plan.bounds, plan.tile_expert, plan.tile_start)
    xq, xs = (x.contiguous(), None) if group is None else quantize(x, group)
    h = torch.empty((slots, f), dtype=x.dtype if group is None else E4M3, device=x.device)
    hs = None if group is None else torch.empty((slots, cdiv(f, k)), dtype=torch.float32, device=x.device)
    one_scale = scale_rows % up_tile.n == 0
    launch(
        fp8_gate_up_kernel, (plan.tile_expert.numel() * cdiv(f, up_tile.n),),
        xq, xs, gate_up.contiguous(), gate_up_scale.contiguous(),
        None if gate_up_bias is None else gate_up_bias.contiguous(), h, hs, *tile_map, num_experts, f, d,
        0.0 if limit is None else float(limit), float(alpha), float(up_offset),
        K=experts.shape[1], BLOCK_M=up_tile.m, BLOCK_N=up_tile.n, BLOCK_K=k, SCALE_ROWS=scale_rows,
        SWAP=up_tile.swap, W8A8=group is not None, ACTIVATION=activation, HAS_LIMIT=limit is not None,
        HAS_BIAS=gate_up_bias is not None,
        GATE_SCALAR=one_scale, UP_SCALAR=one_scale and f % up_tile.n == 0,
        num_warps=up_tile.warps, num_stages=up_tile.stages,
    )  # fmt: skip
    y = torch.empty((slots, d), dtype=x.dtype, device=x.device)
    launch(
        fp8_down_kernel, (plan.tile_expert.numel() * cdiv(d, down_tile.n),),
        h, hs, down.contiguous(), down_scale.contiguous(), None if down_bias is None else down_bias.contiguous(),
        weights.contiguous(), y, *tile_map, num_experts, d, f,
        BLOCK_M=down_tile.m, BLOCK_N=down_tile.n, BLOCK_K=k, SCALE_ROWS=scale_rows,
        SWAP=down_tile.swap, W8A8=group is not None, SCALAR=scale_rows % down_tile.n == 0,
        HAS_BIAS=down_bias is not None,
        num_warps=down_tile.warps, num_stages=down_tile.stages,
    )  # fmt: skip
    return combine(y, experts.contiguous(), num_experts, x.dtype)
