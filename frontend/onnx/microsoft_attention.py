"""com.microsoft's attention and rotary embedding, as optimisers and exporters of decoders write them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from moec.frontend.onnx.attention import flat_heads, heads_of, rotary
from moec.frontend.onnx.context import ImportContext, Size
from moec.frontend.onnx.registry import MICROSOFT, imports
from moec.ir import DType, Value


@imports("RotaryEmbedding", domain=MICROSOFT)
def rotary_embedding(c: ImportContext, x: Value, positions: Value, cos: Value, sin: Value, *, interleaved: int | None,
                     is_packed_batching: int | None, num_heads: int | None, rotary_embedding_dim: int | None,
                     scale: float | None) -> Value:  # fmt: skip
    """x [B, S, H·D] or [B, H, S, D]; positions i64[B, S], or [1]: that of the first; caches [P, R/2]."""
    if is_packed_batching or scale not in (None, 1.0):
        raise c.refuse("is_packed_batching" if is_packed_batching else f"scale {scale}")
    width = x.shape[-1]
    half = cos.shape[1]
    if x.type.rank == 3 and not num_heads and isinstance(width, int) and isinstance(half, int):
        num_heads = width // (2 * half)
    batch, length = x.shape[0], x.shape[1 if x.type.rank == 3 else 2]
    if positions.shape == (1,):
        positions = c.expand(c.reshape(c.b.add(c.b.arange(end=length), positions), (1, length)), (batch, length))
    return rotary(c, x, cos, sin, positions, interleaved=interleaved or 0, num_heads=num_heads or 0,
                  rotary_embedding_dim=rotary_embedding_dim or 0)  # fmt: skip


@imports("MultiHeadAttention", domain=MICROSOFT)
def multi_head(c: ImportContext, q: Value, k: Value | None = None, v: Value | None = None, bias: Value | None = None,
               padding: Value | None = None, added: Value | None = None, past_k: Value | None = None,
               past_v: Value | None = None, *, mask_filter_value: float | None, num_heads: int, scale: float | None,
               unidirectional: int | None) -> Sequence[Value | None]:  # fmt: skip
    """q, k, v [B, S or T, H·D], a bias of all three, key_padding_mask i32[B, T], attention_bias [B or 1, H or 1, S, T],
    past [B, H, P, D] → [B, S, H·D], present [B, H, P + T, D]."""
    if k is None or v is None or q.type.rank != 3 or k.type.rank != 3:
        raise c.refuse("of packed or unequal operands")
    if bias is not None:
        parts, start = [], 0
        for x in (q, k, v):
            width = x.shape[2]
            if not isinstance(width, int):
                raise c.refuse(f"a bias for {x.type}")
            parts.append(c.b.add(x, c.slice(bias, 0, start, start + width)))
            start += width
        q, k, v = parts
    q, k, v = (heads_of(c, x, num_heads) for x in (q, k, v))
    if past_k is not None and past_v is not None:
        k, v = c.concat([past_k, k], 2), c.concat([past_v, v], 2)
    mask = added
    if padding is not None:
        if padding.type.rank not in (2, 3):
            raise c.refuse(f"key_padding_mask {padding.type}")
        batch, keys = padding.shape[0], padding.shape[-1]
        low = c.value(-10000.0 if mask_filter_value is None else mask_filter_value, q.dtype)
        kept = c.truth(c.reshape(padding, (batch, 1, padding.shape[1] if padding.type.rank == 3 else 1, keys)))
        closed = c.b.where(kept, c.value(0.0, q.dtype), low)
        mask = closed if mask is None else c.b.add(mask, closed)
    y = c.b.sdpa(q, k, v, mask, scale=scale or _scale(c, q), causal=bool(unidirectional))
    return [flat_heads(c, y), k, v][: c.outputs]


def _scale(c: ImportContext, q: Value) -> float:
    size = q.shape[3]
    if not isinstance(size, int):
        raise c.refuse(f"of {q.type}")
    return 1 / math.sqrt(size)


@imports("GroupQueryAttention", domain=MICROSOFT)
def group_query(c: ImportContext, q: Value, k: Value | None, v: Value | None, past_k: Value | None,
                past_v: Value | None, last: Value, total: Value, cos: Value | None = None, sin: Value | None = None,
                positions: Value | None = None, added: Value | None = None, sinks: Value | None = None, *,
                do_rotary: int | None, kv_num_heads: int, local_window_size: int | None, num_heads: int,
                rotary_interleaved: int | None, scale: float | None, smooth_softmax: int | None,
                softcap: float | None) -> Sequence[Value | None]:  # fmt: skip
    """q [B, S, H·D], k and v [B, S, G·D] (or all three side by side in q), past [B, G, P, D], seqlens_k i32[B]: the
    place of each row's last key → [B, S, H·D], present [B, G, P + S, D]. A row's new keys follow those that it has."""
    if smooth_softmax == 1:
        raise c.refuse("smooth_softmax")
    if k is None or v is None:
        width = q.shape[2]
        if not isinstance(width, int) or width % (num_heads + 2 * kv_num_heads):
            raise c.refuse(f"{q.type} for {num_heads} and twice {kv_num_heads} heads", code="type")
        size = width // (num_heads + 2 * kv_num_heads)
        cuts = (0, num_heads * size, (num_heads + kv_num_heads) * size, width)
        q, k, v = (c.slice(q, 2, a, b) for a, b in itertools.pairwise(cuts))
    batch, length = q.shape[:2]
    past: Size = 0 if past_k is None else past_k.shape[2]
    before = _before(c, last, length, past)
    if do_rotary and cos is not None and sin is not None:
        half = cos.shape[1]
        if not isinstance(half, int):
            raise c.refuse(f"rotary embedding by {cos.type}")
        if positions is None:
            steps = c.reshape(c.b.arange(end=length), (1, length))
            positions = c.expand(c.b.add(steps, c.value(0, DType.I64) if before is None else before), (batch, length))
        q, k = (rotary(c, x, cos, sin, positions, interleaved=rotary_interleaved or 0, num_heads=n,
                       rotary_embedding_dim=2 * half) for x, n in ((q, num_heads), (k, kv_num_heads)))  # fmt: skip
    q = heads_of(c, q, num_heads)
    k, v = heads_of(c, k, kv_num_heads), heads_of(c, v, kv_num_heads)
    known = c.elements(total)
    if known is not None and len(known) == 1:
        c.need(known[0], past + length)
    if before is not None and past_k is not None and past_v is not None:
        k, v = (_joined(c, old, new, before) for old, new in ((past_k, k), (past_v, v)))
    window = local_window_size if local_window_size is not None and local_window_size > 0 else None
    allowed = None if before is None and window is None else _allowed(c, length, past, before, window)
    mask = allowed if added is None else added
    if allowed is not None and added is not None:
        mask = c.b.where(allowed, added, c.b.const(float("-inf"), q.dtype))
    y = c.b.sdpa(q, k, v, mask, sinks, scale=scale or _scale(c, q), causal=allowed is None, softcap=softcap or None)
    return [flat_heads(c, y), k, v][: c.outputs]


def _before(c: ImportContext, last: Value, length: Size, past: Size) -> Value | None:
    """How many keys each row has in the cache, i64[B, 1]; None where there is no cache."""
    if past == 0:
        return None
    ends = c.b.add(c.cast(last, DType.I64), c.value(1, DType.I64))
    return c.reshape(c.b.sub(ends, c.value(length, DType.I64)), (last.type.numel, 1))


def _joined(c: ImportContext, old: Value, new: Value, before: Value) -> Value:
    """[B, G, P + S, D]: each row's first keys of `old`, then all of `new`."""
    both = c.concat([old, new], 2)
    batch, count = both.shape[0], both.shape[2]
    places = c.reshape(c.b.arange(end=count), (1, count))
    moved = c.b.add(places, c.b.sub(c.value(old.shape[2], DType.I64), before))
    source = c.b.where(c.b.lt(places, before), places, moved)
    source = c.b.min(source, c.value(count - 1, DType.I64))
    return c.b.gather_elements(both, c.expand(c.reshape(source, (batch, 1, count, 1)), both.shape), axis=2)


def _allowed(c: ImportContext, length: Size, past: Size, before: Value | None, window: int | None) -> Value:
    """bool[B or 1, 1, S, P + S]: keys up to each query's own, within the window."""
    count = past + length
    queries = c.reshape(c.b.arange(end=length), (1, 1, length, 1))
    if before is not None:
        queries = c.b.add(queries, c.reshape(before, (before.shape[0], 1, 1, 1)))
    keys = c.reshape(c.b.arange(end=count), (1, 1, 1, count))
    allowed = c.b.le(keys, queries)
    if window is not None:
        near = c.b.lt(c.b.sub(queries, keys), c.value(window, DType.I64))
        allowed = c.b.op("math.and", (allowed, near))
    return allowed
