"""Lowerings of routing."""

from __future__ import annotations

import numpy as np
import onnx_ir as onnx
import torch

from moec.backends.onnxruntime.backend import backend
from moec.backends.onnxruntime.elementwise import order_key, sigmoid_of, softplus_of
from moec.backends.onnxruntime.emit import Emitter, given
from moec.backends.onnxruntime.reduction import reduce
from moec.backends.onnxruntime.types import carrier, numpy_type, onnx_type
from moec.ir import DType, Node


@backend.lowers("moe.route")
def route(e: Emitter, node: Node) -> tuple[onnx.Value, ...]:
    a, dtype = node.attrs, given(node)[0].dtype
    logits, bias = e.operands(node)
    scores = logits
    if a["scoring"] == "softmax":
        scores = e.op("Softmax", logits, axis=-1)
    elif a["scoring"] == "sigmoid":
        scores = sigmoid_of(e, logits, dtype)
    elif a["scoring"] == "sqrt_softplus":
        scores = e.op("Sqrt", softplus_of(e, logits, dtype))
    choice = scores if bias is None else e.op("Add", scores, bias)
    finite = _finite(node)
    if a["n_group"] > 1 and finite and dtype is not DType.F64 and a["masked_score"] == -np.inf:
        key = _keys_in_best_groups(e, node, choice, dtype)
    else:
        if a["n_group"] > 1:
            choice = _in_best_groups(e, node, choice, dtype, finite)
        key = order_key(e, choice, dtype, finite=finite)
    _, experts = e.op("TopK", key, np.array([a["k"]]), outputs=2, axis=-1, largest=1, sorted=1)
    weights = e.op("GatherElements", scores, experts, axis=1)
    if a["scoring"] == "topk_softmax":
        weights = e.op("Softmax", weights, axis=-1)
    elif a["scoring"] == "topk_sigmoid":
        weights = sigmoid_of(e, weights, dtype)
    if a["normalize"] and a["scoring"] != "topk_softmax":
        total = reduce(e, "ReduceSum", weights, (-1,), True)
        if a["normalize_eps"]:
            total = e.op("Add", total, e.scalar(a["normalize_eps"], dtype))
        if a["normalize_min"]:
            total = e.op("Max", total, e.scalar(a["normalize_min"], dtype))
        weights = e.op("Div", weights, total)
    if a["scale"] != 1.0:
        weights = e.op("Mul", weights, e.scalar(a["scale"], dtype))
    return weights, experts


def _finite(node: Node) -> bool:
    """Whether what experts are chosen by is finite or NaN, whatever the logits are."""
    a, bias = node.attrs, given(node)[1]
    if a["scoring"] not in ("softmax", "sigmoid") or (a["n_group"] > 1 and a["masked_score"] == np.inf):
        return False
    if bias is None:
        return True
    known = bias.weight is not None and bias.weight.source is not None
    return known and bool(torch.isfinite(bias.weight.load()).all())


def _keys_in_best_groups(e: Emitter, node: Node, choice: onnx.Value, dtype: DType) -> onnx.Value:
    """What finite scores [T, E] are ordered by (see order_key), −∞ outside the best groups."""
    a, (tokens, num) = node.attrs, given(node)[0].shape
    groups, wide = a["n_group"], carrier(dtype)
    shape = (tokens, groups, num // groups)
    keys = order_key(e, e.reshape(choice, (tokens, num), shape), dtype, finite=True)
    score = _group_scores(e, node, keys)
    _, chosen = e.op("TopK", score, np.array([a["topk_group"]]), outputs=2, axis=-1)
    closed_open = np.array([-np.inf, np.inf], numpy_type(wide))
    bound = e.op("OneHot", chosen, np.int64(groups), closed_open, axis=1)  # [T, groups, topk_group]
    if a["topk_group"] > 1:
        bound = reduce(e, "ReduceMax", bound, (-1,), True)
    return e.reshape(e.op("Min", keys, bound), shape, (tokens, num))


def _group_scores(e: Emitter, node: Node, keys: onnx.Value) -> onnx.Value:
    """Keys [T, groups, n] → [T, groups]: the best, or the sum of the two best; a NaN makes it +∞."""
    if node.attrs["group_score"] == "max":
        return reduce(e, "ReduceMax", keys, (-1,), False)
    best, _ = e.op("TopK", keys, np.array([2]), outputs=2, axis=-1)
    return reduce(e, "ReduceSum", best, (-1,), False)


def _in_best_groups(e: Emitter, node: Node, choice: onnx.Value, dtype: DType, finite: bool) -> onnx.Value:
    """Scores [T, E] with those outside the best groups set to `masked_score`."""
    a, (tokens, num) = node.attrs, given(node)[0].shape
    groups = a["n_group"]
    shape = (tokens, groups, num // groups)
    grouped = e.reshape(choice, (tokens, num), shape)
    keys = order_key(e, grouped, dtype, finite=finite)
    count = 1 if a["group_score"] == "max" else 2
    if not finite:
        _, at = e.op("TopK", keys, np.array([count]), outputs=2, axis=-1)
        best = reduce(e, "ReduceSum", e.op("GatherElements", grouped, at, axis=-1), (-1,), False)
        score = order_key(e, best, dtype)
    else:
        score = _group_scores(e, node, keys)
    _, chosen = e.op("TopK", score, np.array([a["topk_group"]]), outputs=2, axis=-1)
    hits = e.op("Equal", e.op("Unsqueeze", chosen, np.array([2])), np.arange(groups))
    kept = reduce(e, "ReduceMax", e.op("Cast", hits, to=onnx_type(DType.I32).value), (1,), False)
    keep = e.op("Unsqueeze", e.op("Cast", kept, to=onnx_type(DType.BOOL).value), np.array([2]))
    masked = e.op("Where", keep, grouped, e.scalar(a["masked_score"], dtype))
    return e.reshape(masked, shape, (tokens, num))


@backend.lowers("moe.remap")
def remap(e: Emitter, node: Node) -> onnx.Value:
    experts, table, count = e.operands(node)
    tokens, (_, width) = given(node)[0].shape[0], given(node)[1].shape
    token = e.sizes.range(tokens)
    replica = e.op("Mod", e.op("Unsqueeze", token, np.array([1])), e.op("Gather", count, experts))
    slot = e.op("Add", e.op("Mul", experts, np.int64(width)), replica)
    return e.op("Gather", e.op("Reshape", table, np.array([-1])), slot)
