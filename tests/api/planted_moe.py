"""Bugs in routing, experts and FP8."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from moec.backends.onnxruntime import Emitter
from moec.ir import DType, Node

from .planted import Bug, refed
from .planted_changes import LAST, after, attrs, number, operand, positions, scaled, weight, without

# -- routing


def bias_in_the_weights(right: Any, e: Emitter, node: Node) -> Any:
    _, experts = right(e, node)
    logits, bias = e.operands(node)
    chosen = e.op("GatherElements", e.op("Add", e.op("Sigmoid", logits), bias), experts, axis=1)
    total = e.op("ReduceSum", chosen, LAST)
    return e.op("Mul", e.op("Div", chosen, total), number(node.attrs["scale"])), experts


def ties_reversed(right: Any, e: Emitter, node: Node) -> Any:
    """The last of tied experts first: chosen from the logits in reverse."""
    num = node.operand("logits").shape[1]
    reverse = np.arange(num)[::-1].copy()
    weights, experts = right(e, refed(e, node, "logits", lambda x: e.op("Gather", x, reverse, axis=1)))
    return weights, e.op("Sub", np.int64(num - 1), experts)


def second_choice_lost(right: Any, e: Emitter, node: Node) -> Any:
    weights, experts = right(e, node)
    count = node.attrs["k"]
    index = np.array([0, *range(2, count), count - 1])
    return e.op("Gather", weights, index, axis=1), e.op("Gather", experts, index, axis=1)


def unsorted(right: Any, e: Emitter, node: Node) -> Any:
    values, index = right(e, node)
    backwards = np.arange(node.attrs["k"])[::-1].copy()
    return e.op("Gather", values, backwards, axis=-1), e.op("Gather", index, backwards, axis=-1)


ROUTING = [
    Bug("weights not renormalised", "mixtral-8x7b", "moe.route", attrs(normalize=False)),
    Bug("weights renormalised that should not be", "deepseek-v2-lite", "moe.route", attrs(normalize=True)),
    Bug("selection bias in the weights", "deepseek-v3", "moe.route", bias_in_the_weights),
    Bug("selection bias forgotten", "deepseek-v3", "moe.route", without("bias"), "model.layers.2"),
    Bug("scaling factor forgotten", "deepseek-v3", "moe.route", attrs(scale=1.0), "model.layers.2"),
    Bug("group limit ignored", "deepseek-v3", "moe.route", attrs(n_group=1, topk_group=1)),
    Bug("a group's best expert for its best two", "deepseek-v3", "moe.route", attrs(group_score="max")),
    Bug("softmax before the choice", "transformers gpt-oss", "moe.route", attrs(scoring="softmax")),
    Bug("softmax after the choice", "deepseek-v2-lite", "moe.route", attrs(scoring="topk_softmax"), "model.layers.2"),
    Bug("sigmoid for softmax", "qwen3-30b-a3b", "moe.route", attrs(scoring="sigmoid")),
    Bug("second choice lost", "qwen3-30b-a3b", "moe.route", second_choice_lost, "model.layers.1"),
    Bug("weights off by a thousandth", "transformers deepseek-v3", "moe.route", after(scaled(1.001))),
    Bug("ties broken by the highest index", "transformers gpt-oss, tied", "moe.route", ties_reversed,
        modes=("isolated",)),
    Bug("top-k unsorted", "mixtral without passes", "math.topk", unsorted),
]  # fmt: skip


# -- experts


def without_expert(index: int) -> Any:
    def change(w: torch.Tensor) -> torch.Tensor:
        w = w.clone()
        w[index] = 0
        return w

    return change


def exchanged(w: torch.Tensor) -> torch.Tensor:
    order = torch.arange(len(w))
    order[[1, 2]] = order[[2, 1]]
    return w[order]


def halves_swapped(w: torch.Tensor) -> torch.Tensor:
    return torch.cat(w.chunk(2, dim=1)[::-1], 1)


def last_choice_dropped(right: Any, e: Emitter, node: Node) -> Any:
    keep = np.array([*[1] * (node.operand("weights").shape[1] - 1), 0], np.float32)
    return right(e, refed(e, node, "weights", lambda x: e.op("Mul", x, keep)))


def gates_swapped(right: Any, e: Emitter, node: Node) -> Any:
    gate, up = e.operands(node)
    return e.op("Mul", gate, e.op("QuickGelu", up, domain="com.microsoft", alpha=1.0))


def silu_as_gelu(right: Any, e: Emitter, node: Node) -> Any:
    gate, up = e.operands(node)
    return e.op("Mul", e.op("QuickGelu", gate, domain="com.microsoft", alpha=1.702), up)


def first_operand_only(right: Any, e: Emitter, node: Node) -> Any:
    return e.op("Identity", e.operands(node)[0])


EXPERTS = [
    Bug("gate and up swapped", "mixtral-8x7b", "moe.experts", weight("gate_up", halves_swapped)),
    Bug("gelu for silu in experts", "qwen3-30b-a3b", "moe.experts", attrs(activation="gelu"), "model.layers.1"),
    Bug("limit of the gate forgotten", "transformers gpt-oss", "moe.experts", attrs(limit=1e30)),
    Bug("offset of the up projection forgotten", "transformers gpt-oss", "moe.experts", attrs(up_offset=0.0)),
    Bug("interleaved gates read as halves", "transformers gpt-oss", "moe.experts", attrs(interleaved=False),
        "model.layers.1"),
    Bug("last expert dropped", "deepseek-v3", "moe.experts", weight("down", without_expert(-1)), "model.layers.2"),
    Bug("neighbouring experts exchanged", "trained", "moe.experts", weight("down", exchanged), "model.layers.2"),
    Bug("bias of one expert lost", "transformers gpt-oss", "moe.experts", weight("down_bias", without_expert(2)),
        "model.layers.0"),
    Bug("last choice not added", "deepseek-v2-lite", "moe.experts", last_choice_dropped),
    Bug("shared expert left out", "deepseek-v3", "math.add", first_operand_only, "model.layers.2.mlp"),
    Bug("gate and up of a dense layer swapped", "deepseek-v2-lite", "math.swiglu", gates_swapped, "model.layers.0"),
    Bug("quick gelu for silu", "deepseek-v3", "math.swiglu", silu_as_gelu, "model.layers.0"),
    Bug("routed experts scaled twice", "transformers mixtral bf16", "moe.experts",
        operand("weights", scaled(1.02))),
]  # fmt: skip


# -- FP8


def per_tensor(right: Any, e: Emitter, node: Node) -> Any:
    """One scale for all tokens and groups."""
    codes, scale = right(e, node)
    x = e.operands(node)[0]
    largest = e.op("ReduceMax", scale, keepdims=0)
    codes = e.round_to(e.op("Div", x, largest), DType.F8E4M3)
    return codes, e.op("Expand", largest, e.op("Shape", scale))


def largest_240(right: Any, e: Emitter, node: Node) -> Any:
    """The range of another FP8 format."""
    _, scale = right(e, node)
    blocks = node.attrs["block"][1]
    wide = e.op("Mul", scale, number(448 / 240))
    width = node.operand("x").shape[-1]
    spread = e.op("Gather", wide, np.arange(width) // blocks, axis=-1)
    return e.round_to(e.op("Div", e.operands(node)[0], spread), DType.F8E4M3), wide


def rolled(axis: int) -> Any:
    return lambda s: s.roll(1, axis)


def grid_transposed(s: torch.Tensor) -> torch.Tensor:
    return s.transpose(-1, -2).reshape(s.shape)


ISOLATED = ("isolated",)
FP8 = [
    Bug("scale of the block before, rows", "deepseek-v3 fp8 weights", "quant.dequantize", weight("scale", rolled(0)),
        "model.layers.2.self_attn.kv_b_proj"),
    Bug("grid of scales transposed", "deepseek-v3 fp8 weights", "quant.dequantize", weight("scale", grid_transposed),
        "model.layers.1.self_attn.o_proj"),
    Bug("divided by the scale", "deepseek-v3 fp8 weights", "quant.dequantize", weight("scale", torch.reciprocal),
        "model.layers.2.self_attn.q_a_proj"),
    Bug("scales of another expert", "deepseek-v3 fp8 weights", "quant.scaled_experts", weight("down_scale", rolled(0)),
        "model.layers.2"),
    Bug("one activation scale per tensor", "deepseek-v3 fp8", "quant.quantize", per_tensor, modes=ISOLATED),
    Bug("codes up to 240", "deepseek-v3 fp8", "quant.quantize", largest_240, modes=ISOLATED),
    Bug("scale of the block before, columns", "deepseek-v3 fp8", "quant.scaled_linear",
        weight("weight_scale", rolled(1)),
        "model.layers.2.self_attn.q_b_proj", modes=ISOLATED),
    Bug("scale of the first group for all", "deepseek-v3 fp8", "quant.scaled_linear",
        operand("x_scale", lambda e, x: e.op("Gather", x, e.op("Mul", positions(e, x, -1), np.int64(0)), axis=-1)),
        "model.layers.1.self_attn.o_proj", modes=ISOLATED),
    Bug("grid of an expert's scales transposed", "deepseek-v3 fp8", "quant.scaled_experts",
        weight("gate_up_scale", grid_transposed), modes=ISOLATED),
    Bug("FP8 experts without the last", "trained fp8", "quant.scaled_experts", weight("down_scale", without_expert(-1)),
        "model.layers.3", modes=ISOLATED),
]  # fmt: skip

BUGS = [*ROUTING, *EXPERTS, *FP8]
