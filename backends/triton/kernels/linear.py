"""Matrix product with a weight stored [out, in], as torch.nn.functional.linear."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moec.backends.triton.kernels.checks import (
    describe,
    require,
    require_float,
    require_same_device,
    require_shape,
)
from moec.backends.triton.kernels.tiles import Tile, linear_tile
from moec.backends.triton.launch import cdiv, launch

GROUP_M = 8
"""Row tiles that share a column tile run next to each other, so that the weight tile is still in the L2 cache."""


@triton.jit
def linear_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SWAP: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP * tiles_n)
    height = min(tiles_m - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_n)
    m = (group * GROUP + within % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // height).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + m[:, None] * K + k[None, :]
    w_ptrs = w_ptr + n[:, None] * K + k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        inside = k[None, :] < K - k0
        x = tl.load(x_ptrs, mask=(m[:, None] < M) & inside, other=0.0)
        w = tl.load(w_ptrs, mask=(n[:, None] < N) & inside, other=0.0)
        if SWAP:
            acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
        else:
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    if SWAP:
        acc = tl.trans(acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + m[:, None] * N + n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """x @ weightᵀ + bias with float32 accumulation (float32 operands are not rounded to tf32).

    x: [..., K] float32, bfloat16 or float16; weight: [N, K] of the same dtype; bias: [N] or None.
    Result: [..., N] in `out_dtype` (default: x's). `tile` overrides the block sizes.
    Raises ValueError for wrong shapes, dtypes or devices.
    """
    require_float("x", x)
    require(
        x.ndim >= 1 and weight.ndim == 2, f"expected x[..., K], weight[N, K], got {describe(x)}, {describe(weight)}"
    )
    require(weight.dtype == x.dtype, f"weight must be {x.dtype} as x is, got {weight.dtype}")
    n, k = weight.shape
    require(x.shape[-1] == k, f"x must end in K={k} to meet weight {describe(weight)}, got {describe(x)}")
    if bias is not None:
        require_float("bias", bias)
        require_shape("bias", bias, (n,))
        bias = bias.contiguous()
    require_same_device(x=x, weight=weight, bias=bias)
    out = torch.empty((*x.shape[:-1], n), dtype=out_dtype or x.dtype, device=x.device)
    if out.numel():
        m = out.numel() // n
        tile = Tile(*tile) if tile else linear_tile(m, n, k, x.dtype)
        launch(
            linear_kernel, (cdiv(m, tile.m) * cdiv(n, tile.n),),
            x.contiguous(), weight.contiguous(), bias, out, m, n, k,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=GROUP_M, SWAP=tile.swap, HAS_BIAS=bias is not None,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out
