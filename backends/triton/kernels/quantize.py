"""FP8 quantisation of activations: E4M3 codes with one float32 scale per token and 128 elements."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moec.backends.triton.kernels.checks import E4M3, GROUP, require, require_float, require_group, rows
from moec.backends.triton.kernels.tiles import interpreter_tiles
from moec.backends.triton.launch import cdiv, launch, next_pow2


@triton.jit
def quantize_kernel(
    x_ptr, codes_ptr, scales_ptr, M, D,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None, None]
    group = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[None, :, None]
    col = group * GROUP + tl.arange(0, GROUP)[None, None, :]
    mask = (row < M) & (col < D)
    x = tl.load(x_ptr + row * D + col, mask=mask, other=0.0).to(tl.float32)
    is_nan = x != x
    amax = tl.max(tl.where(is_nan, 0.0, tl.abs(x)), axis=2, keep_dims=True)
    scale = tl.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32))
    scale = tl.where(scale == 0.0, 1.0, scale)
    scale = tl.where(tl.max(is_nan.to(tl.int32), axis=2, keep_dims=True) > 0, float("nan"), scale)
    codes = tl.div_rn(x, tl.broadcast_to(scale, x.shape)).to(tl.float8e4nv)
    tl.store(codes_ptr + row * D + col, codes, mask=mask)
    groups = tl.cdiv(D, GROUP)
    tl.store(scales_ptr + row * groups + group, scale, mask=(row < M) & (group < groups))


def quantize(x: torch.Tensor, group: int = GROUP) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row in groups of `group` elements: scale = max|group| / 448, codes = round(group / scale).

    x: [..., D] float32, bfloat16 or float16; group: a power of two. Results: codes float8_e4m3fn [..., D] (round to
    nearest even, saturating at ±448), scales float32 [..., ceil(D / group)], so that codes · scale ≈ x (DeepSeek-V3's
    `act_quant`).
    A group whose scale would be 0 (all zero, or too small for float32) gets scale 1 and codes 0. A NaN makes the scale
    and all codes of its group NaN; an infinity makes the scale infinite, its own code NaN and the others 0.
    Raises ValueError for another dtype, a scalar, or another group.
    """
    require_float("x", x)
    require(x.ndim >= 1, "x must have at least one dimension")
    require_group(group)
    width = x.shape[-1]
    groups = cdiv(width, group)
    codes = torch.empty(x.shape, dtype=E4M3, device=x.device)
    scales = torch.empty((*x.shape[:-1], groups), dtype=torch.float32, device=x.device)
    if x.numel():
        matrix = rows(x)
        height = next_pow2(min(matrix.shape[0], 64 if interpreter_tiles() else 4))
        per_program = next_pow2(min(groups, (2048 if interpreter_tiles() else 1024) // group))
        launch(
            quantize_kernel, (cdiv(matrix.shape[0], height), cdiv(groups, per_program)),
            matrix, codes, scales, matrix.shape[0], width,
            ROWS=height, GROUPS=per_program, GROUP=group, num_warps=4, num_stages=1,
        )  # fmt: skip
    return codes, scales
