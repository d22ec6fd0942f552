"""Lowering of `attention`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as onnx

from moec.backends.onnxruntime.attention_blocks import Causal
from moec.backends.onnxruntime.backend import backend
from moec.backends.onnxruntime.emit import Emitter, given
from moec.backends.onnxruntime.reduction import reduce
from moec.backends.onnxruntime.sizes import at_least
from moec.backends.onnxruntime.types import carrier, onnx_type
from moec.ir import Dim, DType, Node, Value


@backend.lowers("attention.sdpa")
def sdpa(e: Emitter, node: Node) -> onnx.Value:
    return _operator(e, node) if _fits(e, node) else _composed(e, node)


def _fits(e: Emitter, node: Node) -> bool:
    """Whether ONNX's Attention computes the same: it fails on empty axes, takes the square root of the scale, has no
    sinks, caps scores after the mask, and gives 0 where an added mask leaves only the lowest scores."""
    q, k, v, mask, sinks = given(node)
    a = node.attrs
    return (
        sinks is None
        and (mask is None or mask.dtype is DType.BOOL)
        and a["softcap"] is None
        and 0 < a["scale"] < math.inf
        and carrier(q.dtype) is DType.F32
        and e.positive(*q.shape, *k.shape, *v.shape)
    )


def _operator(e: Emitter, node: Node) -> onnx.Value:
    q, k, v, given_mask, _ = given(node)
    mask, causal = _masking(e, node)
    attrs: dict[str, Any] = {"scale": node.attrs["scale"]}
    s, t = e.sizes.resolve(q.shape[2]), e.sizes.resolve(k.shape[2])
    sources = [x for x in map(_before_transpose, (q, k, v)) if x is not None]
    flat = len(sources) == 3  # heads side by side, as the linear layers before gave them and the one after takes them
    if flat:
        values = [e.reshape(e.value(x), x.shape, (*x.shape[:2], x.shape[2] * x.shape[3])) for x in sources]
        attrs |= {"q_num_heads": q.shape[1], "kv_num_heads": k.shape[1]}
    else:
        values = [e.value(x) for x in (q, k, v)]
    if node.attrs["causal"] and s != 1:
        closed = None if given_mask is None else _allowed(e, node)[0]
        sizes = [(int(x.shape[1]), int(x.shape[3] * (x.shape[1] if flat else 1))) for x in (q, k, v)]
        blocks = Causal(
            values[0], values[1], values[2], closed, s, t, 1 if flat else 2, (sizes[0], sizes[1], sizes[2]), attrs
        )
        y = blocks.emit(e, lambda: e.op("Attention", *values, mask, is_causal=int(causal), **attrs))
    else:
        y = e.op("Attention", *values, mask, **attrs)
    if not flat:
        return y
    b, heads, length, width = q.shape[0], q.shape[1], q.shape[2], v.shape[3]
    y = e.reshape(y, (b, length, heads * width), (b, length, heads, width))
    result = e.op("Transpose", y, perm=[0, 2, 1, 3])
    e.memo["untransposed", result] = y  # where nothing else reads it, the transpose goes
    return result


def _masking(e: Emitter, node: Node) -> tuple[onnx.Value | None, bool]:
    """The operator's mask [..., S, T], and whether it makes a causal one itself, which goes by the first key."""
    q, k, _, mask, _ = given(node)
    s, t, causal = e.sizes.resolve(q.shape[2]), e.sizes.resolve(k.shape[2]), node.attrs["causal"] and q.shape[2] != 1
    if not causal or s == t:
        return None if mask is None else _spread(e, mask, s, t), causal
    return _allowed(e, node)[0], False


def _spread(e: Emitter, mask: Value, s: int | Dim, t: int | Dim) -> onnx.Value:
    """A mask with axes S and T of its own; the operator spreads the others."""
    if [e.sizes.resolve(n) for n in mask.shape[-2:]] == [s, t]:
        return e.value(mask)
    key = ("spread", e.value(mask), s, t)
    if key not in e.memo:
        e.memo[key] = e.op("Expand", e.value(mask), e.sizes.vector((s, t)))
    value: onnx.Value = e.memo[key]
    return value


def _before_transpose(x: Value) -> Value | None:
    """[B, S, H, D] that [B, H, S, D] was made from."""
    made = x.producer
    found = made is not None and made.op == "tensor.transpose" and tuple(made.attrs["perm"]) == (0, 2, 1, 3)
    return made.operands[0] if found and made is not None else None


def _composed(e: Emitter, node: Node) -> onnx.Value:
    """Products, mask, softmax. Queries that share a key head are rows of one product, so keys are not repeated."""
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


def allowed_by(
    e: Emitter, s: int | Dim, t: int | Dim, mask: Value | None, causal: bool
) -> tuple[onnx.Value | None, onnx.Value | None]:
    """Where to attend by `causal` and a bool mask, and the rows that may attend to nothing; None: no limit.
    Both are shared by the layers of a model."""
    s, t, masked = e.sizes.resolve(s), e.sizes.resolve(t), mask is not None and mask.dtype is DType.BOOL
    permitted = e.value(mask) if mask is not None and masked else None
    memo = ("allowed", causal and (s, t), permitted)
    if memo not in e.memo:
        allowed = _causal(e, s, t) if causal else None
        if permitted is not None:
            allowed = permitted if allowed is None else e.op("And", allowed, permitted)
        closed = allowed if masked or not at_least(t, s) else None
        e.memo[memo] = allowed, None if closed is None else e.op("Not", _any(e, closed))
    found: tuple[onnx.Value | None, onnx.Value | None] = e.memo[memo]
    return found


def _allowed(e: Emitter, node: Node) -> tuple[onnx.Value | None, onnx.Value | None]:
    q, k, _, mask, _ = given(node)
    return allowed_by(e, q.shape[2], k.shape[2], mask, node.attrs["causal"])


def _causal(e: Emitter, s: int | Dim, t: int | Dim) -> onnx.Value:
    """bool[S, T]: key j ≤ query i + T − S."""
    memo = ("causal", s, t)
    if memo not in e.memo:
        queries = e.op("Range", e.sizes.scalar(t - s), e.sizes.scalar(t), np.int64(1))
        keys = e.sizes.range(t)
        e.memo[memo] = e.op("LessOrEqual", keys, e.op("Unsqueeze", queries, np.array([1])))
    return e.memo[memo]
