"""Lowering of `attention`."""

from __future__ import annotations

import numpy as np
import onnx_ir as onnx

from moec.backends.onnxruntime.backend import backend
from moec.backends.onnxruntime.emit import Emitter, given
from moec.backends.onnxruntime.reduction import reduce
from moec.backends.onnxruntime.sizes import at_least
from moec.backends.onnxruntime.types import carrier, onnx_type
from moec.ir import Dim, DType, Node


@backend.lowers("attention.sdpa")
def sdpa(e: Emitter, node: Node) -> onnx.Value:
    """Products, mask, softmax: ONNX's Attention fails on empty sequences and leaves NaN where a row may
    attend to nothing. Queries that share a key head are rows of one product, so keys are not repeated."""
    q, k, v, mask, sinks = given(node)
    b, heads, s, d = q.shape
    kv_heads, t, dv = k.shape[1], k.shape[2], v.shape[3]
    shared = (b, kv_heads, s * (heads // kv_heads))
    wide = carrier(q.dtype)  # of factors too: in f16 they may be 0 or infinite
    scaled = e.op("Mul", e.value(q), e.scalar(node.attrs["scale"], wide))
    keys = e.op("Transpose", e.value(k), perm=[0, 1, 3, 2])
    scores = e.op("MatMul", e.reshape(scaled, q.shape, (*shared, d)), keys)
    scores = e.reshape(scores, (*shared, t), (b, heads, s, t))
    cap = node.attrs["softcap"]
    if cap is not None:
        bound = e.scalar(cap, wide)
        scores = e.op("Mul", e.op("Tanh", e.op("Div", scores, bound)), bound)
    allowed, dead = _allowed(e, node)
    if mask is not None and mask.dtype is not DType.BOOL:
        scores = e.op("Add", scores, e.value(mask))
    if allowed is not None:
        scores = e.op("Where", allowed, scores, e.scalar(-np.inf, q.dtype))
    if sinks is not None:
        # one more column that no value belongs to; no row is without it. Expand is not used for it: the shape
        # inference of ONNX Runtime takes a constant size of 0 for 1
        first = e.op("Slice", e.value(q), np.array([0]), np.array([1]), np.array([-1]))
        column = e.reshape(e.value(sinks), (heads,), (1, heads, 1, 1))
        column = e.op("Where", e.op("Less", first, first), first, column)
        weights = e.op("Softmax", e.op("Concat", scores, column, axis=-1), axis=-1)
        weights = e.op("Slice", weights, np.array([0]), np.array([-1]), np.array([-1]))
        out = e.op("MatMul", e.reshape(weights, (b, heads, s, t), (*shared, t)), e.value(v))
        return e.reshape(out, (*shared, dv), (b, heads, s, dv))
    if mask is not None and mask.dtype is not DType.BOOL:
        # -inf in an added mask may close a row too: look at the scores themselves
        lowest = e.op("Equal", scores, e.scalar(-np.inf, q.dtype))
        dead = e.op("Not", _any(e, e.op("Not", lowest)))
    if dead is not None:
        scores = e.op("Where", dead, e.scalar(0, q.dtype), scores)
    weights = e.op("Softmax", scores, axis=-1)
    if dead is not None:
        weights = e.op("Where", dead, e.scalar(0, q.dtype), weights)
    out = e.op("MatMul", e.reshape(weights, (b, heads, s, t), (*shared, t)), e.value(v))
    return e.reshape(out, (*shared, dv), (b, heads, s, dv))


def _any(e: Emitter, x: onnx.Value) -> onnx.Value:
    """Whether any holds along the last axis (kept)."""
    count = reduce(e, "ReduceSum", e.op("Cast", x, to=onnx_type(DType.I32).value), (-1,), True)
    return e.op("Greater", count, e.scalar(0, DType.I32))


def _allowed(e: Emitter, node: Node) -> tuple[onnx.Value | None, onnx.Value | None]:
    """Where to attend by `causal` and a bool mask, and the rows that may attend to nothing; None: no limit.
    Both are shared by the layers of a model."""
    q, k, _, mask, _ = given(node)
    s, t = e.sizes.resolve(q.shape[2]), e.sizes.resolve(k.shape[2])
    causal, masked = node.attrs["causal"], mask is not None and mask.dtype is DType.BOOL
    permitted = e.value(mask) if masked else None
    memo = ("allowed", causal and (s, t), permitted)
    if memo not in e.memo:
        allowed = _causal(e, s, t) if causal else None
        if permitted is not None:
            allowed = permitted if allowed is None else e.op("And", allowed, permitted)
        closed = allowed if masked or not at_least(t, s) else None
        e.memo[memo] = allowed, None if closed is None else e.op("Not", _any(e, closed))
    return e.memo[memo]


def _causal(e: Emitter, s: int | Dim, t: int | Dim) -> onnx.Value:
    """bool[S, T]: key j ≤ query i + T − S."""
    memo = ("causal", s, t)
    if memo not in e.memo:
        queries = e.op("Range", e.sizes.scalar(t - s), e.sizes.scalar(t), np.int64(1))
        keys = e.op("Range", np.int64(0), e.sizes.scalar(t), np.int64(1))
        e.memo[memo] = e.op("LessOrEqual", keys, e.op("Unsqueeze", queries, np.array([1])))
    return e.memo[memo]
