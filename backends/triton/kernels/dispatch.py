"""Sorting tokens by expert and cutting the sorted rows into tiles, and adding the experts' outputs up again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moec.backends.triton.kernels.checks import describe, require
from moec.backends.triton.kernels.tiles import interpreter_tiles
from moec.backends.triton.launch import cdiv, launch, next_pow2


@dataclass(frozen=True)
class Dispatch:
    """Rows (token, slot) in expert order, and the tile → expert map of a grouped product.

    order int64 [T·k]: sorted position → flat (token · k + slot); bounds int64 [E + 1]: expert e owns the positions
    bounds[e] to bounds[e + 1]; tile_expert int64 [tiles]: its expert, or E for a tile without work; tile_start int64
    [tiles]: first position. All sizes are known without reading the device.
    """

    order: torch.Tensor
    bounds: torch.Tensor
    tile_expert: torch.Tensor
    tile_start: torch.Tensor


def sort_by_expert(experts: torch.Tensor, num_experts: int, tile_rows: int) -> Dispatch:
    """Group the rows of `experts` (integer, any shape) by expert, in their own order within an expert.

    Numbers outside 0..num_experts-1 belong to no tile: such rows contribute nothing.
    """
    flat = experts.reshape(-1).to(torch.int64)
    ordered, order = torch.sort(flat, stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(num_experts + 1, device=flat.device))
    tiles = (bounds[1:] - bounds[:-1] + tile_rows - 1) // tile_rows
    ends = torch.cumsum(tiles, 0)
    at_most = flat.numel() // tile_rows + min(flat.numel(), num_experts)
    ids = torch.arange(at_most, device=flat.device)
    tile_expert = torch.searchsorted(ends, ids, right=True)
    owner = tile_expert.clamp(max=num_experts - 1)
    tile_start = bounds[owner] + (ids - (ends - tiles)[owner]) * tile_rows
    return Dispatch(order, bounds, tile_expert, tile_start)


@triton.jit
def combine_kernel(
    y_ptr, experts_ptr, out_ptr, T, D, E,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    slot = t[:, None] * K + k[None, :]
    mask = (t[:, None] < T) & (k[None, :] < K)
    expert = tl.load(experts_ptr + slot, mask=mask, other=-1)
    mask = mask & (expert >= 0) & (expert < E)
    y = tl.load(
        y_ptr + slot[:, :, None] * D + d[None, None, :], mask=mask[:, :, None] & (d[None, None, :] < D), other=0.0
    )
    out = tl.sum(y.to(tl.float32), axis=1)
    out_mask = (t[:, None] < T) & (d[None, :] < D)
    tl.store(out_ptr + t[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=out_mask)


def combine(y: torch.Tensor, experts: torch.Tensor, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    """Sum y [T·k, D] over each token's k rows in float32, in slot order, skipping rows without an expert → [T, D]."""
    tokens, top_k = experts.shape
    width = y.shape[1]
    out = torch.empty((tokens, width), dtype=dtype, device=y.device)
    if out.numel():
        block_t, block_d = (32, 1024) if interpreter_tiles() else (1, 512)
        block_d = min(block_d, next_pow2(width))
        launch(
            combine_kernel, (cdiv(tokens, block_t), cdiv(width, block_d)),
            y, experts, out, tokens, width, num_experts,
            K=top_k, BLOCK_T=block_t, BLOCK_K=next_pow2(top_k), BLOCK_D=block_d, num_warps=4, num_stages=1,
        )  # fmt: skip
    return out


def check_routing(x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> None:
    """x must be [T, D], weights float [T, k] and experts integer [T, k]. Raises ValueError otherwise."""
    require(x.ndim == 2, f"x must be [T, D], got {describe(x)}")
    integer = not experts.dtype.is_floating_point and experts.dtype != torch.bool
    require(
        experts.ndim == 2 and integer and experts.shape[0] == x.shape[0],
        f"experts must be integers [T={x.shape[0]}, k], got {describe(experts)}",
    )
    require(
        weights.shape == experts.shape and weights.dtype.is_floating_point,
        f"weights must be floats {list(experts.shape)} as experts is, got {describe(weights)}",
    )
