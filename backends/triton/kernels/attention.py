"""Scaled dot-product attention, one pass over the keys with a running softmax (FlashAttention, Dao et al. 2022)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moec.backends.triton.kernels.checks import describe, require, require_float, require_same_device
from moec.backends.triton.kernels.scalar_math import tanh
from moec.backends.triton.kernels.tiles import interpreter_tiles
from moec.backends.triton.launch import cdiv, launch, next_pow2

MAX_HEAD = 1024


class AttentionTile(NamedTuple):
    """Query rows, keys and value columns of a tile, warps and pipeline stages."""

    m: int
    n: int
    v: int = 256
    warps: int = 4
    stages: int = 2


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, sinks_ptr, out_ptr, scale, softcap,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, mask_b, mask_h, mask_s, mask_t, HKV, S, T,
    GROUP: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    SINKS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    # The queries of all heads that share a key head form one matrix of GROUP · S rows: row = head · S + position.
    # All matrices lie along one axis of the grid: the others hold 65535 programs.
    tiles = tl.cdiv(GROUP * S, BLOCK_M)
    matrix = tl.program_id(0) // tiles
    batch = (matrix // HKV).to(tl.int64)
    kv_head = (matrix % HKV).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    row_mask = row < GROUP * S
    head = kv_head * GROUP + row // S
    position = row % S
    d1 = tl.arange(0, D1)
    q_rows = q_ptr + batch * q_b + head * q_h + position.to(tl.int64) * q_s
    k_rows = k_ptr + batch * k_b + kv_head * k_h
    v_rows = v_ptr + batch * v_b + kv_head * v_h
    q1 = tl.load(q_rows[:, None] + d1[None, :], mask=row_mask[:, None] & (d1[None, :] < D), other=0.0)
    if D2 > 0:  # a head size such as 192 is 128 + 64 rather than padded to 256
        d2 = D1 + tl.arange(0, D2)
        q2 = tl.load(q_rows[:, None] + d2[None, :], mask=row_mask[:, None] & (d2[None, :] < D), other=0.0)
    if MASK != "none":
        mask_rows = mask_ptr + batch * mask_b + head * mask_h + position.to(tl.int64) * mask_s
    dv = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    end = T
    if CAUSAL:
        last = min(first + BLOCK_M, GROUP * S) - 1
        if first // S == last // S:  # rows of a single head: no key beyond the last one's is visible
            end = min(T, last % S + T - S + 1)
    peak = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if SINKS:  # as if one key without a value had been seen already
        peak = tl.load(sinks_ptr + head, mask=row_mask, other=0.0).to(tl.float32)
        total = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), dtype=tl.float32)
    for t0 in range(0, end, BLOCK_N):
        t = t0 + tl.arange(0, BLOCK_N)
        k_tile = k_rows + t.to(tl.int64)[:, None] * k_s
        k1 = tl.load(k_tile + d1[None, :], mask=(t[:, None] < T) & (d1[None, :] < D), other=0.0)
        scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        if D2 > 0:
            k2 = tl.load(k_tile + d2[None, :], mask=(t[:, None] < T) & (d2[None, :] < D), other=0.0)
            scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee")
        scores *= scale
        if SOFTCAP:
            scores = softcap * tanh(scores / softcap)
        visible = row_mask[:, None] & (t[None, :] < T)
        if CAUSAL:
            visible = visible & (t[None, :] <= position[:, None] + (T - S))
        if MASK != "none":
            given = tl.load(mask_rows[:, None] + t.to(tl.int64)[None, :] * mask_t, mask=visible, other=0)
            if MASK == "bool":
                visible = visible & (given != 0)
            else:
                scores += given.to(tl.float32)
        scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        finite_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # nothing visible yet
        p = tl.exp(scores - finite_peak[:, None])
        shrink = tl.exp(peak - finite_peak)
        total = total * shrink + tl.sum(p, axis=1)
        v_mask = (t[:, None] < T) & (dv[None, :] < DV)
        v = tl.load(v_rows + t.to(tl.int64)[:, None] * v_s + dv[None, :], mask=v_mask, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        peak = new_peak
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_row = (batch * HKV * GROUP + head) * S + position
    out_ptrs = out_ptr + out_row[:, None] * DV + dv[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & (dv[None, :] < DV))


def attention_tile(rows: int, head: int, value_head: int, dtype: torch.dtype) -> AttentionTile:
    """Tile for `rows` query rows per key head; few rows (decoding) leave most of a larger tile idle."""
    if interpreter_tiles():
        return AttentionTile(next_pow2(min(rows, 256), 16), 256, 1024)
    if dtype == torch.float32:
        return AttentionTile(32, 32, warps=4, stages=2)
    if rows <= 32:
        return AttentionTile(16 if rows <= 16 else 32, 64, warps=4, stages=2)
    if head > 256 or value_head > 256:
        return AttentionTile(64, 32, 256, warps=8, stages=2)
    return AttentionTile(128, 64, warps=8, stages=2) if rows > 64 else AttentionTile(64, 64, warps=4, stages=2)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    softcap: float | None = None,
    tile: AttentionTile | None = None,
) -> torch.Tensor:
    """softmax(q kᵀ · scale + mask) v with scores and softmax in float32 → [B, H, S, Dv] in q's dtype.

    q: [B, H, S, D], k: [B, Hkv, T, D], v: [B, Hkv, T, Dv] in float32, bfloat16 or float16, H a multiple of Hkv
    (query heads h · H/Hkv … share a key head), D and Dv ≤ 1024. mask broadcasts to [B, H, S, T]: bool (True: may
    attend) or a float dtype (added). causal: query i sees keys j ≤ i + T − S. A query that may attend to nothing
    gives zeros. softcap c: scores become c · tanh(scores / c) before the mask. sinks [H], in a float dtype: one more
    score per head, without a value. `tile` overrides the block sizes.
    Raises ValueError for wrong shapes, dtypes or devices.
    """
    shapes = f"q {describe(q)}, k {describe(k)}, v {describe(v)}"
    require_float("q", q)
    require(q.ndim == k.ndim == v.ndim == 4, f"q, k and v must have four dimensions, got {shapes}")
    require(q.dtype == k.dtype == v.dtype, f"q, k and v must have one dtype, got {shapes}")
    b, h, s, d = q.shape
    hkv, t, dv = k.shape[1], k.shape[2], v.shape[3]
    require(tuple(k.shape) == (b, hkv, t, d) and tuple(v.shape) == (b, hkv, t, dv), f"shapes do not fit: {shapes}")
    require(hkv > 0 and h % hkv == 0, f"{h} query heads are no multiple of {hkv} key heads")
    require(0 < d <= MAX_HEAD and dv <= MAX_HEAD, f"head sizes must be in 1..{MAX_HEAD}, got {shapes}")
    kind, strides = "none", [0, 0, 0, 0]
    if mask is not None:
        require(
            mask.dtype == torch.bool or mask.dtype.is_floating_point, f"mask must be bool or float: {describe(mask)}"
        )
        try:
            mask = mask.expand(b, h, s, t)
        except RuntimeError:
            raise ValueError(f"mask {describe(mask)} does not broadcast to {[b, h, s, t]}") from None
        kind, strides = "bool" if mask.dtype == torch.bool else "add", list(mask.stride())
        mask = mask.view(torch.uint8) if kind == "bool" else mask
    require(softcap is None or softcap > 0, f"softcap must be positive, got {softcap}")
    if sinks is not None:
        require_float("sinks", sinks)
        require(tuple(sinks.shape) == (h,), f"sinks must have one number per head, got {describe(sinks)} for {h} heads")
        sinks = sinks.contiguous()
    require_same_device(q=q, k=k, v=v, mask=mask, sinks=sinks)
    out = torch.empty((b, h, s, dv), dtype=q.dtype, device=q.device)
    if out.numel() == 0 or t == 0:
        return out.zero_()
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    rows = h // hkv * s
    tile = AttentionTile(*tile) if tile else attention_tile(rows, d, dv, q.dtype)
    block_dv = min(next_pow2(dv, 16), tile.v)
    d1 = max(16, 1 << (d.bit_length() - 1))
    launch(
        attention_kernel, (cdiv(rows, tile.m) * b * hkv, cdiv(dv, block_dv)),
        q, k, v, mask, sinks, out, float(scale), float(softcap or 1.0),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides, hkv, s, t,
        GROUP=h // hkv, D=d, D1=d1, D2=next_pow2(d - d1, 16) if d > d1 else 0, DV=dv, BLOCK_DV=block_dv,
        BLOCK_M=tile.m, BLOCK_N=tile.n, CAUSAL=causal, MASK=kind,
        SINKS=sinks is not None, SOFTCAP=softcap is not None, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
