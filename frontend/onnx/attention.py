"""Attention and rotary embedding."""

from __future__ import annotations

import math

from moec.frontend.onnx.context import ImportContext, Size
from moec.frontend.onnx.registry import MICROSOFT, imports
from moec.ir import DType, Value


@imports("RotaryEmbedding", since=23)
def rotary(c: ImportContext, x: Value, cos: Value, sin: Value, positions: Value | None = None, *, interleaved: int,
           num_heads: int, rotary_embedding_dim: int) -> Value:  # fmt: skip
    """x [B, H, S, D], or [B, S, H·D] with `num_heads`; caches [P, R/2] with positions [B, S], else [B, S, R/2]."""
    c.floats(x, cos, sin)
    heads = heads_of(c, x, num_heads) if x.type.rank == 3 else x
    size = heads.shape[3]
    width = rotary_embedding_dim or size
    if not isinstance(width, int):
        raise c.refuse(f"of {x.type}")
    if positions is not None:
        cos, sin = c.b.gather(cos, positions, axis=0), c.b.gather(sin, positions, axis=0)
    cos, sin = (c.reshape(t, (t.shape[0], 1, *t.shape[1:])) for t in (cos, sin))
    if cos.shape[3] != width // 2:
        cos, sin = (c.slice(t, 3, 0, width // 2) for t in (cos, sin))
    turned = c.slice(heads, 3, 0, width)
    turned = c.b.op("rope.apply", (turned, cos, sin), {"interleaved": bool(interleaved)})
    y = turned if width == size else c.concat([turned, c.slice(heads, 3, width, size)], 3)
    return flat_heads(c, y) if x.type.rank == 3 else y


def heads_of(c: ImportContext, x: Value, heads: int) -> Value:
    """[B, S, H·D] → [B, H, S, D]"""
    b, s, width = x.shape
    if not heads or not isinstance(width, int) or width % heads:
        raise c.refuse(f"{heads} heads of {x.type}")
    return c.transpose(c.reshape(x, (b, s, heads, width // heads)), (0, 2, 1, 3))


def flat_heads(c: ImportContext, x: Value) -> Value:
    """[B, H, S, D] → [B, S, H·D]"""
    b, h, s, d = x.shape
    return c.reshape(c.transpose(x, (0, 2, 1, 3)), (b, s, h * d))


@imports("Attention", since=23)
def attention(c: ImportContext, q: Value, k: Value, v: Value, mask: Value | None = None, past_k: Value | None = None,
              past_v: Value | None = None, lengths: Value | None = None, *, is_causal: int,
              kv_num_heads: int | None, q_num_heads: int | None, qk_matmul_output_mode: int, scale: float | None,
              softcap: float, softmax_precision: int | None) -> list[Value | None]:  # fmt: skip
    c.floats(q, k, v)
    if lengths is not None or c.outputs > 3:
        raise c.refuse("nonpad_kv_seqlen" if lengths is not None else "scores as a result")
    if softmax_precision not in (None, 1, 0):
        raise c.refuse(f"softmax_precision {softmax_precision}")
    rank = q.type.rank
    if rank == 3:
        q = heads_of(c, q, q_num_heads or 0)
        k, v = heads_of(c, k, kv_num_heads or 0), heads_of(c, v, kv_num_heads or 0)
    if past_k is not None and past_v is not None:
        k, v = c.concat([past_k, k], 2), c.concat([past_v, v], 2)
    size = q.shape[3]
    if not isinstance(size, int):
        raise c.refuse(f"of {q.type}")
    s, t = q.shape[2], k.shape[2]
    # ONNX aligns causal queries to the first key, after the past; ours to the last
    past = 0 if past_k is None else past_k.shape[2]
    causal = bool(is_causal)
    if causal and t - s != past:
        allowed = _causal(c, s, t, past)
        mask = _combine(c, allowed, mask, q.dtype)
        causal = False
    if mask is not None:
        if mask.dtype is not DType.BOOL and mask.dtype is not q.dtype:
            raise c.refuse(f"a mask of {mask.dtype} for {q.dtype}")
        if mask.type.rank < 4:
            mask = c.reshape(mask, (*[1] * (4 - mask.type.rank), *mask.shape))
        if mask.shape[3] != t:
            raise c.refuse(f"a mask {mask.type} for {t} keys")
    factor = scale if scale is not None else 1 / math.sqrt(size)
    y = c.b.sdpa(q, k, v, mask, scale=factor, causal=causal, softcap=softcap or None)
    y = flat_heads(c, y) if rank == 3 else y
    return [y, k, v][: c.outputs]


def _causal(c: ImportContext, s: Size, t: Size, past: Size | Value) -> Value:
    """bool [S, T]: key j ≤ query i + past."""
    rows = c.b.arange(end=s)
    columns = c.b.arange(end=t)
    moved = c.b.add(rows, past if isinstance(past, Value) else c.value(past, DType.I64))
    return c.b.le(c.reshape(columns, (1, *columns.shape)), c.reshape(moved, (*moved.shape, 1)))


def _combine(c: ImportContext, allowed: Value, mask: Value | None, dtype: DType) -> Value:
    if mask is None:
        return allowed
    if mask.dtype is DType.BOOL:
        return c.b.op("math.and", (allowed, mask))
    return c.b.where(allowed, mask, c.b.const(float("-inf"), dtype))


_RULES = {"linear": (False, False), "gated": (True, False), "delta": (False, True), "gated_delta": (True, True)}


@imports("LinearAttention", domain=MICROSOFT)
@imports("LinearAttention", since=27)
def linear_attention(c: ImportContext, q: Value, k: Value, v: Value, state: Value | None = None,
                     decay: Value | None = None, beta: Value | None = None, *, chunk_size: int | None,
                     kv_num_heads: int, q_num_heads: int, scale: float | None, state_window: int | None = None,
                     update_rule: str | None) -> list[Value | None]:  # fmt: skip
    """q, k, v [B, T, H·D], decay [B, T, H] or [B, T, H·K], beta [B, T, H]; a scale of 0 stands for 1 / √K."""
    c.floats(q, k, v, state, decay, beta)
    batch, length, width = q.shape
    if state_window or not isinstance(width, int) or kv_num_heads % q_num_heads:
        raise c.refuse(f"{q_num_heads} heads of queries, {kv_num_heads} of values, state_window {state_window}")
    rows = width // q_num_heads
    if k.shape[2] != width or not isinstance(v.shape[2], int):
        raise c.refuse(f"keys {k.type} for queries {q.type}")
    uses_decay, uses_beta = _RULES[update_rule or "gated_delta"]
    decay, beta = decay if uses_decay else None, beta if uses_beta else None
    if decay is not None and decay.shape[2] != kv_num_heads:
        decay = c.reshape(decay, (batch, length, kv_num_heads, rows))
    if beta is not None and beta.shape[2] != kv_num_heads:
        beta = c.expand(beta, (batch, length, kv_num_heads))
    heads = [c.reshape(x, (batch, length, q_num_heads, rows)) for x in (q, k)]
    values = c.reshape(v, (batch, length, kv_num_heads, v.shape[2] // kv_num_heads))
    out, last = c.b.linear_attention(*heads, values, decay, beta, state, scale=scale or rows**-0.5)
    return [c.reshape(out, v.shape), last]
