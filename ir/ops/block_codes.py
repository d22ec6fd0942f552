"""Codes and scales per block: what a matrix is stored as in E4M3, 8-bit or 4-bit integers.

A value is code · scale of its block. With amax the largest magnitude of a block:

    f8e4m3fn  scale = amax / 448, codes round to nearest even (DeepSeek-V3 technical report, §3.3)
    i8        scale = amax / 127, codes −127 … 127
    i4        codes −8 … 7; of the scales ±m / s for s in `STEPS` (m: the element of largest magnitude; −m / 8 makes −8
              of it) the one with the least squared error, each refitted to its codes by least squares, as llama.cpp's
              `make_qx_quants` does. On the shipped model this loses half of what amax / 7 does (bench/RESULTS.md).

The scale of a block of zeros is 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from moec.ir.arrays import as_bytes
from moec.ir.dims import ceil_div
from moec.ir.types import DType, TensorType

E4M3_MAX = 448.0
CODES = (DType.F8E4M3, DType.I8, DType.I4)
"""What weights may be stored as."""

STEPS = tuple(7.0 + 0.25 * i for i in range(7))


def scale_type(codes: TensorType, block: tuple[int, int]) -> TensorType:
    """f32 scales of codes [..., R, C] in blocks of `block`: [..., ⌈R/rows⌉, ⌈C/columns⌉]; edge blocks are
    ragged."""
    *lead, rows, columns = codes.shape
    return TensorType(DType.F32, (*lead, ceil_div(rows, block[0]), ceil_div(columns, block[1])))


def numbers(codes: torch.Tensor) -> torch.Tensor:
    """Codes as f32. torch converts no 4-bit integers, but views them as the 8-bit ones that their bytes hold."""
    return as_bytes(codes).to(torch.float32)


def in_blocks(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """x [..., R, C], padded with zeros to whole blocks, as [..., R blocks, C blocks, rows · columns]."""
    *lead, rows, columns = x.shape
    br, bc = block
    padded = F.pad(x, (0, -columns % bc, 0, -rows % br))
    parts = padded.reshape(*lead, -(-rows // br), br, -(-columns // bc), bc).transpose(-3, -2)
    return parts.reshape(*parts.shape[:-2], br * bc)


def from_blocks(parts: torch.Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> torch.Tensor:
    """The inverse of `in_blocks`."""
    *lead, rb, cb, _ = parts.shape
    br, bc = block
    x = parts.reshape(*lead, rb, cb, br, bc).transpose(-3, -2).reshape(*lead, rb * br, cb * bc)
    return x[..., : shape[-2], : shape[-1]].contiguous()


def block_amax(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Largest magnitude per block: x [..., R, C] → [..., ⌈R/rows⌉, ⌈C/columns⌉]."""
    *lead, rows, columns = x.shape
    br, bc = block
    if not x.numel():
        return x.new_zeros(*lead, -(-rows // br), -(-columns // bc))
    padded = F.pad(x.abs(), (0, -columns % bc, 0, -rows % br))
    return padded.reshape(*lead, -(-rows // br), br, -(-columns // bc), bc).amax((-3, -1))


def spread(scale: torch.Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> torch.Tensor:
    """Each block's scale at each of its elements."""
    wide = scale.repeat_interleave(block[0], dim=-2).repeat_interleave(block[1], dim=-1)
    return wide[..., : shape[-2], : shape[-1]]


def quantize_blocks(
    x: torch.Tensor, block: tuple[int, int], dtype: DType = DType.F8E4M3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of `dtype` and f32 scales, by the formulas above. E4M3 saturates, and NaN stays NaN and makes its block's
    scale NaN; integers have no NaN, so that x must be finite there."""
    x = x.to(torch.float32)
    return _ROUNDED[dtype](x, block)


def dequantize_blocks(codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """codes · scale in f32."""
    return numbers(codes) * spread(scale, tuple(codes.shape), block)


def _e4m3(x: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    scale = _not_zero(block_amax(x, block) / E4M3_MAX)
    return (x / spread(scale, tuple(x.shape), block)).to(torch.float8_e4m3fn), scale


def _i8(x: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    scale = _not_zero(block_amax(x, block) / 127)
    return (x / spread(scale, tuple(x.shape), block)).round().clamp(-127, 127).to(torch.int8), scale


def _i4(x: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    matrices = [_i4_matrix(m, block) for m in x.reshape(-1, *x.shape[-2:])] if x.numel() else []
    scale = torch.ones_like(block_amax(x, block))
    codes = torch.empty(x.shape, dtype=torch.int8)
    if matrices:
        codes = torch.stack([c for c, _ in matrices]).reshape(x.shape)
        scale = torch.stack([s for _, s in matrices]).reshape(scale.shape)
    return codes.view(DType.I4.torch), scale


def _i4_matrix(x: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    parts = in_blocks(x, block)
    amax = parts.abs().amax(-1, keepdim=True)
    unit = parts / _not_zero(amax)  # no product of these overflows
    extreme = unit.gather(-1, unit.abs().argmax(-1, keepdim=True))
    sign = torch.where(extreme < 0, 1.0, -1.0)
    codes, scale = torch.zeros_like(unit), torch.ones_like(amax)
    best = torch.full_like(amax, torch.inf)
    for step in (s * t for t in STEPS for s in (1.0, -1.0)):
        tried = (unit * (sign * step)).round_().clamp_(-8, 7)
        fitted = (unit * tried).sum(-1, keepdim=True) / _not_zero(tried.square().sum(-1, keepdim=True))
        error = (unit - fitted * tried).square_().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        codes, scale = torch.where(better, tried, codes), torch.where(better, fitted, scale)
    return from_blocks(codes.to(torch.int8), tuple(x.shape), block), _not_zero((scale * amax).squeeze(-1))


def _not_zero(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


_ROUNDED: dict[DType, Callable[[torch.Tensor, tuple[int, int]], tuple[torch.Tensor, torch.Tensor]]] = {
    DType.F8E4M3: _e4m3,
    DType.I8: _i8,
    DType.I4: _i4,
}
