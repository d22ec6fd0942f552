"""Root-mean-square normalisation of rows, with an optional residual addition in front."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moec.backends.triton.kernels.checks import require, require_float, require_same_device, require_shape, rows
from moec.backends.triton.kernels.tiles import interpreter_tiles
from moec.backends.triton.launch import cdiv, launch, next_pow2

MAX_WIDTH = 65536


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, M, D, eps,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_D)
    mask = (row[:, None] < M) & (col[None, :] < D)
    offset = row[:, None] * D + col[None, :]
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + offset, rounded, mask=mask)
        x = rounded.to(tl.float32)
    mean_square = tl.sum(x * x, axis=1) / D
    y = x * (1.0 / tl.sqrt_rn(mean_square + eps))[:, None]
    if HAS_WEIGHT:
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
        y *= tl.load(weight_ptr + col, mask=col < D, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x · rsqrt(mean(x², last dimension) + eps) · weight, in float32, rounded to x's dtype before the weight (Llama).

    x: [..., D] float32, bfloat16 or float16, D ≤ 65536; weight: [D] any of these, or None for ones.
    With `residual` (shape and dtype of x) the sum x + residual is normalised, after rounding to x's dtype, and the
    result is the pair (normalised, sum). Results have x's shape and dtype.
    Raises ValueError for wrong shapes, dtypes or devices.
    """
    require_float("x", x)
    require(x.ndim >= 1, "x must have at least one dimension")
    width = x.shape[-1]
    require(width <= MAX_WIDTH, f"x may be at most {MAX_WIDTH} wide, got {width}")
    if weight is not None:
        require_float("weight", weight)
        require_shape("weight", weight, (width,))
        weight = weight.contiguous()
    if residual is not None:
        require_shape("residual", residual, tuple(x.shape))
        require(residual.dtype == x.dtype, f"residual must be {x.dtype} as x is, got {residual.dtype}")
    require_same_device(x=x, weight=weight, residual=residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(y) if residual is not None else None
    if x.numel():
        matrix = rows(x)
        block = next_pow2(width)
        height = 64 if interpreter_tiles() else max(1, min(16, 2048 // block))
        launch(
            rms_norm_kernel, (cdiv(matrix.shape[0], height),),
            matrix, None if residual is None else rows(residual), weight, y, total, matrix.shape[0], width, eps,
            ROWS=height, BLOCK_D=block, HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None,
            num_warps=4 if block <= 2048 else 8 if block <= 8192 else 16, num_stages=1,
        )  # fmt: skip
    return y if total is None else (y, total)
