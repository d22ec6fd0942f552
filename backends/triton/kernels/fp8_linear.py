"""Matrix product of FP8 codes with block scales: DeepSeek-V3's W8A8 linear layer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moec.backends.triton.kernels.checks import (
    E4M3,
    FLOATS,
    GROUP,
    describe,
    require,
    require_codes,
    require_float,
    require_group,
    require_same_device,
    require_shape,
)
from moec.backends.triton.kernels.linear import GROUP_M
from moec.backends.triton.kernels.tiles import Tile, fp8_linear_tile
from moec.backends.triton.launch import cdiv, launch


@triton.jit
def fp8_linear_kernel(
    x_ptr, xs_ptr, w_ptr, ws_ptr, bias_ptr, out_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr, SWAP: tl.constexpr, HAS_BIAS: tl.constexpr, ONE_SCALE: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP * tiles_n)
    height = min(tiles_m - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_n)
    n0 = within // height * BLOCK_N
    m = (group * GROUP + within % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    groups = tl.cdiv(K, BLOCK_K)
    x_ptrs = x_ptr + m[:, None] * K + k[None, :]
    w_ptrs = w_ptr + n[:, None] * K + k[None, :]
    xs_ptrs = xs_ptr + m * groups
    ws_ptrs = ws_ptr + (n // SCALE_ROWS) * groups
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    for g in range(0, groups):
        inside = k[None, :] < K - g * BLOCK_K
        x = tl.load(x_ptrs, mask=(m[:, None] < M) & inside, other=0.0)
        w = tl.load(w_ptrs, mask=(n[:, None] < N) & inside, other=0.0)
        xs = tl.load(xs_ptrs + g, mask=m < M, other=0.0)
        if ONE_SCALE:  # the tile lies within one weight block: fold its scale into the rows'
            xs *= tl.load(ws_ptr + n0 // SCALE_ROWS * groups + g)
        if SWAP:
            part = tl.dot(w, tl.trans(x)) * xs[None, :]
        else:
            part = tl.dot(x, tl.trans(w)) * xs[:, None]
        if not ONE_SCALE:
            ws = tl.load(ws_ptrs + g, mask=n < N, other=0.0)
            part *= ws[:, None] if SWAP else ws[None, :]
        acc += part
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    if SWAP:
        acc = tl.trans(acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + m[:, None] * N + n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def fp8_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    block: tuple[int, int] = (GROUP, GROUP),
    out_dtype: torch.dtype = torch.float32,
    tile: Tile | None = None,
) -> torch.Tensor:
    """(x · x_scale) @ (weight · weight_scale)ᵀ + bias, scaled after each `block[1]` products, accumulated in float32.

    x: [..., K] float8_e4m3fn with x_scale [..., ceil(K/block[1])] float32 (one scale per row and block[1] columns, see
    `quantize`); weight: [N, K] float8_e4m3fn with weight_scale [ceil(N/block[0]), ceil(K/block[1])] float32 (blocks
    are ragged at the edges); bias: [N] or None; block: DeepSeek's 128×128, or any height with a power of two up to 128
    as its width (at least 32 on a GPU). Result: [..., N] in `out_dtype`. `tile` overrides the block sizes; its k must
    be block[1]. Raises ValueError for wrong shapes, dtypes or devices.
    """
    require(
        weight.ndim == 2 and x.ndim >= 1, f"expected x[..., K], weight[N, K], got {describe(x)}, {describe(weight)}"
    )
    n, k = weight.shape
    require_group(block[1])
    require(block[0] >= 1, f"block must be positive, got {block}")
    require(x.shape[-1] == k, f"x must end in K={k} to meet weight {describe(weight)}, got {describe(x)}")
    require(x.dtype == E4M3, f"x must be float8_e4m3fn (see quantize), got {describe(x)}")
    require_codes("x", x, x_scale, (*x.shape[:-1], cdiv(k, block[1])))
    require_codes("weight", weight, weight_scale, (cdiv(n, block[0]), cdiv(k, block[1])))
    require(out_dtype in FLOATS, f"out_dtype must be float32, bfloat16 or float16, got {out_dtype}")
    if bias is not None:
        require_float("bias", bias)
        require_shape("bias", bias, (n,))
        bias = bias.contiguous()
    require_same_device(x=x, x_scale=x_scale, weight=weight, weight_scale=weight_scale, bias=bias)
    out = torch.empty((*x.shape[:-1], n), dtype=out_dtype, device=x.device)
    if out.numel():
        m = out.numel() // n
        tile = Tile(*tile) if tile else fp8_linear_tile(m, n, block[1])
        require(tile.k == block[1], f"tile.k must be {block[1]}, got {tile.k}")
        launch(
            fp8_linear_kernel, (cdiv(m, tile.m) * cdiv(n, tile.n),),
            x.contiguous(), x_scale.contiguous(), weight.contiguous(), weight_scale.contiguous(), bias, out, m, n, k,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=GROUP_M, SCALE_ROWS=block[0],
            SWAP=tile.swap, HAS_BIAS=bias is not None, ONE_SCALE=block[0] % tile.n == 0,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out
