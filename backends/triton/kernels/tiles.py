"""Block sizes: how much of a matrix product one program computes.

On a GPU the choice goes by rows per weight matrix: Hopper's warp-group instructions need 64 rows of their first
operand, so with few rows the operands are swapped and the weight's rows take that place (`swap`). In the interpreter an
iteration costs milliseconds whatever its size, so one tile covers as much as it can.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from moec.backends.triton.launch import interpreted, next_pow2, recording


class Tile(NamedTuple):
    """Rows, columns and reduction depth of a tile, warps, pipeline stages, and whether the operands are swapped."""

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 3
    swap: bool = False


def interpreter_tiles() -> bool:
    """True where kernels run in the interpreter (and are not being recorded for ahead-of-time compilation)."""
    return interpreted() and not recording()


def _cover(size: int, at_most: int) -> int:
    return next_pow2(min(size, at_most), 16)


def _few_rows(m: int) -> int:
    return 16 if m <= 16 else 32


def linear_tile(m: int, n: int, k: int, dtype: torch.dtype) -> Tile:
    """Tile for x[m, k] @ w[n, k]ᵀ."""
    if interpreter_tiles():
        return Tile(_cover(m, 256), _cover(n, 1024), _cover(k, 512))
    if dtype == torch.float32:  # plain FMA: tensor cores would round to tf32
        return Tile(32, 64, 32, warps=4, stages=2) if m <= 32 else Tile(64, 64, 32, warps=4, stages=2)
    if m <= 32:
        return Tile(_few_rows(m), 64, 128, warps=4, stages=4, swap=True)
    if m <= 128:
        return Tile(64, 64, 64, warps=4, stages=4)
    return Tile(128, 128, 64, warps=8, stages=3)


def fp8_linear_tile(m: int, n: int, k: int = 128) -> Tile:
    """Tile for the block-scaled product; k is the length of a scale group."""
    if interpreter_tiles():
        return Tile(_cover(m, 256), _cover(n, 1024), k)
    if m <= 32:
        return Tile(_few_rows(m), 64, k, warps=4, stages=5, swap=True)
    if m <= 128:
        return Tile(64, 64, k, warps=4, stages=4)
    return Tile(128, 128, k, warps=8, stages=3)


def experts_tile(rows_per_expert: float, n: int, k: int, dtype: torch.dtype, *, gated: bool) -> Tile:
    """Tile for the grouped products over experts; `gated`: two accumulators, gate and up."""
    if interpreter_tiles():
        m = _cover(int(rows_per_expert) + 1, 64)
        return Tile(m, _cover(n, 512), _cover(k, 512))
    if dtype == torch.float32:
        return Tile(32, 32 if gated else 64, 32, warps=4, stages=2)
    if rows_per_expert <= 32:
        return Tile(_few_rows(int(rows_per_expert)), 64, 128 if not gated else 64, warps=4, stages=4, swap=True)
    if rows_per_expert <= 128:
        return Tile(64, 64, 64, warps=4, stages=4)
    return Tile(128, 64 if gated else 128, 64, warps=8, stages=3)


def fp8_experts_tile(rows_per_expert: float, n: int, k: int, *, gated: bool, w8a8: bool) -> Tile:
    """Tile for the block-scaled grouped products; k is the length of a scale group.

    A gated tile that quantises its result is 128 wide, so that it holds whole scale groups.
    """
    if interpreter_tiles():
        m = _cover(int(rows_per_expert) + 1, 64)
        return Tile(m, 128 if gated else _cover(n, 512), k)
    if rows_per_expert <= 32:
        return Tile(_few_rows(int(rows_per_expert)), 128 if gated and w8a8 else 64, k, warps=4, stages=3, swap=True)
    return Tile(64, 128, k, warps=8, stages=3)
