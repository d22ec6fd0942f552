"""Bugs in norms, projections, positions, attention and the cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as onnx
import torch

from moec.backends.onnxruntime import Emitter
from moec.ir import DType, Node, TensorType, Value

from .planted import Bug, changed, refed, reweighted
from .planted_changes import (
    BF16,
    F16,
    LAST,
    after,
    attrs,
    number,
    operand,
    positions,
    scaled,
    shifted,
    size,
    spoilt,
    taken,
    through,
    weight,
    without,
)  # fmt: skip

# -- norms and residuals


def eps_outside_the_root(right: Any, e: Emitter, node: Node) -> Any:
    x, w = e.operands(node)
    mean = e.op("ReduceMean", e.op("Mul", x, x), LAST)
    return e.op("Mul", e.op("Div", x, e.op("Add", e.op("Sqrt", mean), number(node.attrs["eps"]))), w)


def residual_twice(right: Any, e: Emitter, node: Node) -> Any:
    return right(e, refed(e, node, "x", lambda x: e.op("Add", x, e.value(node.operand("residual")))))


def sum_not_returned(right: Any, e: Emitter, node: Node) -> Any:
    return right(e, node)[0], e.op("Identity", e.value(node.operand("residual")))


def residual_in_bf16(right: Any, e: Emitter, node: Node) -> Any:
    total = through(BF16)(e, e.op("Add", *e.operands(node)[:2]))
    eps = node.attrs["eps"]
    return e.op("RMSNormalization", total, e.operands(node)[2], axis=-1, epsilon=eps), total


NORMS = [
    Bug("eps 1e-5 for 1e-6", "deepseek-v3", "norm.rms", attrs(eps=1e-5), "model.layers.0.input_layernorm"),
    Bug("eps 1e-5 for 1e-6 after a residual", "qwen3-30b-a3b", "norm.add_rms", attrs(eps=1e-5)),
    Bug("eps outside the root", "mixtral-8x7b", "norm.rms", eps_outside_the_root),
    Bug("weight of a norm forgotten", "transformers deepseek-v3", "norm.rms", weight("weight", torch.ones_like),
        "model.layers.1.self_attn.q_a_layernorm"),
    Bug("weight of a norm applied as 1 + weight", "transformers deepseek-v3", "norm.add_rms",
        weight("weight", lambda w: 1 + w),
        "model.layers.1.input_layernorm"),
    Bug("residual added twice", "mixtral-8x7b", "norm.add_rms", residual_twice, "model.layers.1"),
    Bug("sum with the residual not returned", "deepseek-v3", "norm.add_rms", sum_not_returned, "model.layers.2"),
    Bug("residual in bf16", "qwen3-30b-a3b", "norm.add_rms", residual_in_bf16),
    Bug("one row in 32 without a norm", "qwen3-30b-a3b", "norm.rms",
        after(spoilt(lambda e, i: e.op("Equal", e.op("Mod", i, np.int64(32)), np.int64(31)), scaled(1.02), -2)),
        "model.layers.0.input_layernorm", inputs="long"),
]  # fmt: skip


# -- projections


def in_f16(right: Any, e: Emitter, node: Node) -> Any:
    """Operands and partial sums of a tensor-core without f32 accumulators."""
    node = refed(e, node, "x", lambda x: through(F16)(e, x))
    return through(F16)(e, right(e, reweighted(node, "weight", lambda w: w.half().float())))


def accumulated_in_f16(right: Any, e: Emitter, node: Node) -> Any:
    """Blocks of 16 products are exact, their sum is kept in f16."""
    x, w = e.operands(node)[0], node.operand("weight").weight.load()
    total = None
    for start in range(0, w.shape[1], 16):
        part = e.op("Slice", x, np.array([start]), np.array([start + 16]), LAST)
        part = e.op("MatMul", part, w[:, start : start + 16].T.contiguous().numpy())
        total = through(F16)(e, part if total is None else e.op("Add", total, part))
    return total


def lm_head_tied(right: Any, e: Emitter, node: Node) -> Any:
    table = next(v for n, v in e.graph.weights.items() if n.endswith("embed_tokens.weight"))
    return right(e, changed(node, {"weight": table}))


LINEARS = [
    Bug("square projection transposed", "mixtral-8x7b", "linear.linear", weight("weight", lambda w: w.T),
        "model.layers.1.self_attn.o_proj"),
    Bug("products in f16", "deepseek-v2-lite", "linear.linear", in_f16, "model.layers.2.self_attn.kv_b_proj"),
    Bug("sums in f16", "deepseek-v3", "linear.linear", accumulated_in_f16, "model.layers.2.self_attn.q_b_proj"),
    Bug("bias forgotten", "transformers gpt-oss", "linear.linear", without("bias"), "model.layers.1.self_attn.k_proj"),
    Bug("last channel left out", "qwen3-30b-a3b", "linear.linear",
        weight("weight", lambda w: torch.cat((w[:, :-1], 0 * w[:, -1:]), 1)), "model.layers.1.self_attn.v_proj"),
    Bug("NaN for one token", "deepseek-v3", "linear.linear",
        after(spoilt(lambda e, i: e.op("Equal", i, np.int64(3)), lambda e, x: e.op("Mul", x, number(np.nan)), -2)),
        "model.layers.0.mlp.down_proj"),
    Bug("one row at a block's edge", "transformers deepseek-v3", "linear.linear",
        after(spoilt(lambda e, i: e.op("Equal", i, np.int64(31)), scaled(0), -2)),
        "model.layers.0.self_attn.o_proj", inputs="long"),
    Bug("one column at a block's edge", "deepseek-v3", "linear.linear",
        after(spoilt(lambda e, i: e.op("Equal", i, np.int64(63)), scaled(1.01), -1)),
        "model.layers.1.self_attn.q_a_proj"),
    Bug("router in bf16", "qwen3-30b-a3b", "linear.linear", after(through(BF16)), "model.layers.1.mlp.gate"),
]  # fmt: skip


# -- positions


def heads(count: int) -> Any:
    return lambda node: node.result.shape[1] == count


def both_tables(change: Any) -> Any:
    def wrong(right: Any, e: Emitter, node: Node) -> Any:
        node = refed(e, node, "cos", lambda x: change(e, x))
        return right(e, refed(e, node, "sin", lambda x: change(e, x)))

    return wrong


def frozen_after(length: int) -> Any:
    """A table of `length` positions: beyond, the last one."""

    def change(e: Emitter, x: onnx.Value) -> onnx.Value:
        index = e.op("Range", np.int64(0), size(e, x, -2), np.int64(1))
        return taken(e, x, -2, e.op("Min", index, np.int64(length - 1)))

    return change


POSITIONS = [
    Bug("rotary position off by one, queries", "qwen3-30b-a3b", "rope.apply", both_tables(shifted(-2)),
        "model.layers.1", heads(8)),
    Bug("rotary position off by one, queries and keys", "mixtral-8x7b", "rope.apply", both_tables(shifted(-2))),
    Bug("rotary pairs interleaved for halves", "mixtral-8x7b", "rope.apply", attrs(interleaved=True)),
    Bug("rotary pairs as halves for interleaved", "deepseek-v3", "rope.apply",
        attrs(interleaved=False, deinterleave=False), "model.layers.1"),
    Bug("rotary result left interleaved", "deepseek-v3", "rope.apply", attrs(deinterleave=False), "model.layers.2"),
    Bug("rotary sine negated", "transformers mixtral", "rope.apply", operand("sin", lambda e, x: e.op("Neg", x))),
    Bug("rotary only wrong in layer 2 of 4", "trained", "rope.apply", operand("cos", scaled(1.001)), "model.layers.2"),
    Bug("rotary table of 32 positions", "deepseek-v2-lite", "rope.apply", both_tables(frozen_after(32)),
        inputs="long"),
    Bug("positions start at one", "deepseek-v3", "tensor.arange",
        after(lambda e, x: e.op("Add", x, np.int64(1)))),
    Bug("frequencies of another base", "mixtral-8x7b", "math.mul",
        weight("b", lambda w: w ** 0.99), "model.rotary_emb"),
    Bug("embedding of one id is its neighbour's", "trained", "tensor.gather",
        operand("index", lambda e, x: e.op("Where", e.op("Equal", x, np.int64(112)), np.int64(113), x))),
]  # fmt: skip


# -- attention


def causal_shifted(by: int) -> Any:
    """Query i sees keys j ≤ i + `by`."""

    def wrong(right: Any, e: Emitter, node: Node) -> Any:
        q, k = (e.value(node.operand(n)) for n in ("q", "k"))
        keys = e.op("Range", np.int64(0), size(e, k, -2), np.int64(1))
        queries = e.op("Range", np.int64(by), e.op("Add", size(e, q, -2), np.int64(by)), np.int64(1))
        mask = Value(TensorType(DType.BOOL, (node.operand("q").shape[2], node.operand("k").shape[2])))
        e.bind(mask, e.op("LessOrEqual", keys, e.op("Unsqueeze", queries, np.array([1]))))
        return right(e, changed(node, {"mask": mask}, causal=False))

    return wrong


def heads_repeated(right: Any, e: Emitter, node: Node) -> Any:
    """Key head h mod Hkv for query head h, instead of h // (H / Hkv)."""
    q, k, v = (node.operand(n) for n in "qkv")
    groups = q.shape[1] // k.shape[1]
    wide = {}
    for name, x in (("k", k), ("v", v)):
        wide[name] = Value(x.type.with_shape((x.shape[0], q.shape[1], *x.shape[2:])))
        e.bind(wide[name], e.op("Tile", e.value(x), np.array([1, groups, 1, 1])))
    return right(e, changed(node, wide))


def temperature_once(right: Any, e: Emitter, node: Node) -> Any:
    return right(e, changed(node, scale=(node.attrs["scale"] * 48**-0.5) ** 0.5))


def newest_key_unseen(right: Any, e: Emitter, node: Node) -> Any:
    """With a single query, the kernel for decoding ends one key too early."""

    def change(e: Emitter, mask: onnx.Value) -> onnx.Value:
        single = e.op("Equal", size(e, e.value(node.operand("q")), -2), np.int64(1))
        last = e.op("Equal", positions(e, mask, -1), e.op("Sub", size(e, mask, -1), np.int64(1)))
        return e.op("And", mask, e.op("Not", e.op("And", last, single)))

    return right(e, refed(e, node, "mask", lambda m: change(e, m)))


def greater_or_equal(right: Any, e: Emitter, node: Node) -> Any:
    return e.op("GreaterOrEqual", *e.operands(node))


ATTENTION = [
    Bug("scale without YaRN's temperature", "deepseek-v3", "attention.sdpa", attrs(scale=48**-0.5)),
    Bug("YaRN's temperature once instead of squared", "deepseek-v2-lite", "attention.sdpa",
        temperature_once, "model.layers.1"),
    Bug("scores not scaled", "mixtral-8x7b", "attention.sdpa", attrs(scale=1.0)),
    Bug("causal mask one too far", "qwen3-30b-a3b", "attention.sdpa", causal_shifted(1)),
    Bug("causal mask one too short", "deepseek-v3", "attention.sdpa", causal_shifted(-1), "model.layers.1"),
    Bug("not causal at all", "deepseek-v2-lite", "attention.sdpa", attrs(causal=False), "model.layers.2"),
    Bug("sliding window one too wide", "transformers gpt-oss", "math.gt", greater_or_equal),
    Bug("sinks ignored", "transformers gpt-oss", "attention.sdpa", without("sinks"), "model.layers.1"),
    Bug("window ignored", "transformers gpt-oss", "attention.sdpa", without("mask"), "model.layers.0"),
    Bug("key heads repeated in the wrong order", "mixtral-8x7b", "attention.sdpa", heads_repeated),
    Bug("newest key unseen at one token", "deepseek-v3 decoding", "attention.sdpa", newest_key_unseen, inputs="one"),
]  # fmt: skip


# -- the cache


def stale_slot(right: Any, e: Emitter, node: Node) -> Any:
    """The new row holds what the previous step wrote."""
    past, new = e.operands(node)
    index = e.op("Range", e.op("Sub", size(e, past, -2), size(e, new, -2)), size(e, past, -2), np.int64(1))
    return e.op("Concat", past, taken(e, past, -2, index), axis=node.attrs["axis"])


def one_earlier(right: Any, e: Emitter, node: Node) -> Any:
    a = node.attrs
    return right(e, changed(node, start=a["start"] - 1, end=a["end"] - 1))


CACHE = [
    Bug("stale cache slot", "mixtral decoding", "tensor.concat", stale_slot, inputs="one"),
    Bug("stale latent in the cache", "deepseek-v3 decoding", "tensor.concat", stale_slot, "model.layers.1",
        lambda node: node.attrs["axis"] == -2),
    Bug("past rows shifted by one", "mixtral decoding", "tensor.concat",
        lambda right, e, node: right(e, node) if node.operands[0].producer else
        e.op("Concat", shifted(-2)(e, e.operands(node)[0]), e.operands(node)[1], axis=node.attrs["axis"])),
    Bug("position of the new token one too small", "mixtral decoding", "tensor.slice", one_earlier,
        where=lambda node: not node.result.dtype.is_float),
    Bug("logits of the last but one token", "deepseek-v3 decoding", "tensor.slice", one_earlier,
        where=lambda node: node.result.dtype.is_float),
    Bug("padding counted as a position", "mixtral decoding", "math.cumsum",
        after(lambda e, x: e.op("Add", x, np.int64(1)))),
]  # fmt: skip

BUGS = [*NORMS, *LINEARS, *POSITIONS, *ATTENTION, *CACHE]
