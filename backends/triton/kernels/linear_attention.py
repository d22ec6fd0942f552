"""Linear attention with decay and delta rule, token after token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moec.backends.triton.kernels.checks import describe, require, require_float, require_same_device, require_shape
from moec.backends.triton.launch import cdiv, launch, next_pow2

MAX_ROWS = 1024
_STATE = 8192  # numbers that a program holds of the state: 64 registers of each thread


@triton.jit
def linear_attention_kernel(
    q_ptr, k_ptr, v_ptr, decay_ptr, beta_ptr, state_ptr, out_ptr, last_ptr, scale, T, H, SHARED,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DECAY: tl.constexpr,
    BETA: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    # a program goes through the sequence of one head with some columns of its state, which need no others
    batch = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    key_head = head // (H // SHARED)
    row = tl.arange(0, BLOCK_K)
    col = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_mask, col_mask = row < K, col < V
    place = (batch * H + head) * K * V + row[:, None] * V + col[None, :]
    mask = row_mask[:, None] & col_mask[None, :]
    state = tl.zeros((BLOCK_K, BLOCK_V), dtype=tl.float32)
    if STATE:
        state = tl.load(state_ptr + place, mask=mask, other=0.0).to(tl.float32)
    for t in range(0, T):
        token = batch * T + t
        if DECAY == "head":
            state *= tl.exp(tl.load(decay_ptr + token * H + head).to(tl.float32))
        elif DECAY == "row":
            given = tl.load(decay_ptr + (token * H + head) * K + row, mask=row_mask, other=0.0)
            state *= tl.exp(given.to(tl.float32))[:, None]
        shared = (token * SHARED + key_head) * K + row
        key = tl.load(k_ptr + shared, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        own = (token * H + head) * V + col
        update = tl.load(v_ptr + own, mask=col_mask, other=0.0).to(tl.float32)
        if BETA:
            update = (update - tl.sum(state * key, axis=0)) * tl.load(beta_ptr + token * H + head).to(tl.float32)
        state += key * update[None, :]
        query = tl.load(q_ptr + shared, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        out = tl.sum(state * query, axis=0) * scale
        tl.store(out_ptr + own, out.to(out_ptr.dtype.element_ty), mask=col_mask)
    tl.store(last_ptr + place, state.to(last_ptr.dtype.element_ty), mask=mask)


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S ← exp(decay) · S; S ← S + k uᵀ with u = v or beta · (v − Sᵀ k); o = scale · Sᵀ q → (o, the last S), in float32.

    q, k: [B, T, Hk, K], v: [B, T, H, V] in float32, bfloat16 or float16, H a multiple of Hk (heads h · H/Hk … share a
    query and key), K ≤ 1024; decay: [B, T, H] or [B, T, H, K]; beta: [B, T, H]; state: [B, H, K, V], or None for zeros.
    Results have v's dtype. Raises ValueError for wrong shapes, dtypes or devices.
    """
    shapes = f"q {describe(q)}, k {describe(k)}, v {describe(v)}"
    require_float("v", v)
    require(q.ndim == v.ndim == 4 and q.shape == k.shape, f"q and k must be equal and of rank 4, as v, got {shapes}")
    (batch, length, shared, rows), (heads, columns) = q.shape, v.shape[2:]
    require(tuple(v.shape[:2]) == (batch, length), f"batch or length differ: {shapes}")
    require(shared > 0 and heads % shared == 0, f"{heads} heads are no multiple of {shared} key heads")
    require(rows <= MAX_ROWS, f"keys may be at most {MAX_ROWS} wide, got {shapes}")
    each = (batch, length, heads)
    kind = "none"
    if decay is not None:
        kind = "row" if decay.ndim == 4 else "head"
        require_shape("decay", decay, (*each, rows) if kind == "row" else each)
    if beta is not None:
        require_shape("beta", beta, each)
    if state is not None:
        require_shape("state", state, (batch, heads, rows, columns))
    require_same_device(q=q, k=k, v=v, decay=decay, beta=beta, state=state)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    last = torch.empty((batch, heads, rows, columns), dtype=v.dtype, device=v.device)
    given = (None if x is None else x.contiguous() for x in (q, k, v, decay, beta, state))
    block_k = next_pow2(rows)
    block_v = min(next_pow2(columns), _STATE // block_k)
    launch(
        linear_attention_kernel, (batch * heads, cdiv(columns, block_v)),
        *given, out, last, float(scale), length, heads, shared,
        K=rows, V=columns, BLOCK_K=block_k, BLOCK_V=block_v, DECAY=kind, BETA=beta is not None,
        STATE=state is not None, num_warps=4 if block_k * block_v >= 2048 else 1, num_stages=1,
    )  # fmt: skip
    return out, last
