"""Scaled dot-product attention."""

from __future__ import annotations

import math
from typing import Any

from moec.frontend.aten.registry import lowers
from moec.frontend.context import Context
from moec.ir import DType, Value
from moec.ir.types import broadcast


@lowers("scaled_dot_product_attention")
def scaled_dot_product_attention(
    c: Context, query: Value, key: Value, value: Value, attn_mask: Value | None, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool,
) -> Value:  # fmt: skip
    if dropout_p:
        raise c.refuse(f"dropout_p is {dropout_p}", hint="call model.eval() before tracing")
    head = query.shape[-1]
    if scale is None:
        if not isinstance(head, int):
            raise c.refuse("the head size must be known")
        scale = 1.0 / math.sqrt(head)
    if not isinstance(scale, int | float):
        raise c.refuse("the scale must be a constant")
    mask = attn_mask
    if mask is not None and mask.dtype is not DType.BOOL:
        mask = c.cast(mask, query.dtype)
    if not enable_gqa or query.type.rank > 4:
        lead = broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        query, key, value = (c.expand(x, (*lead, *x.shape[-2:])) for x in (query, key, value))
    lead, rank = query.shape[:-2], query.type.rank
    if rank != 4:
        query, key, value = (_with_rank_4(c, x) for x in (query, key, value))
        if mask is not None and mask.type.rank > 2:
            mask = _with_rank_4(c, c.expand(mask, (*lead, *mask.shape[-2:])))
    if is_causal and query.shape[2] != key.shape[2]:
        # torch aligns to the first key, attention.sdpa to the last: the two agree for a square only
        mask, is_causal = _first_key_causal(c, query.shape[2], key.shape[2], mask), False
    out = c.b.sdpa(query, key, value, mask, scale=float(scale), causal=bool(is_causal))
    return c.reshape(out, c.out_type.shape)


def _with_rank_4(c: Context, x: Value) -> Value:
    """Axes in front merged into (batch, heads)."""
    rank = x.type.rank
    if rank <= 3:
        return c.reshape(x, (*[1] * (4 - rank), *x.shape))
    return c.reshape(x, (x.type.with_shape(x.shape[:-3]).numel, *x.shape[-3:]))


def _first_key_causal(c: Context, queries: Any, keys: Any, mask: Value | None) -> Value:
    row = c.b.reshape(c.b.arange(end=queries), shape=(queries, 1))
    allowed = c.b.le(c.b.arange(end=keys), row)
    if mask is None:
        return allowed
    if mask.dtype is DType.BOOL:
        return c.b.and_(mask, allowed)
    return c.b.where(allowed, mask, c.value(-math.inf, mask.dtype))


@lowers("moec_frontend::linear_attention")
def linear_attention(
    c: Context, q: Value, k: Value, v: Value, decay: Value | None, beta: Value | None, state: Value | None,
    scale: float,
) -> list[Value]:  # fmt: skip
    if not isinstance(scale, int | float):
        raise c.refuse("the scale must be a constant")
    return list(c.b.linear_attention(q, k, v, decay, beta, state, scale=float(scale)))
