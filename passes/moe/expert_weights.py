"""What the rules of routed experts share: weights as `moe.experts` takes them, [E, 2f, d] and [E, d, f], from however
a model stores them, and the checks on what surrounds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moec.ir import TensorType, Value, Weight
from moec.passes.moe.combine import expert_ids
from moec.passes.moe.structure import narrowed, reshaped
from moec.passes.moe.units import unit_attrs, why_not_halves
from moec.passes.rewrite import Match


def stored(p: Any, name: str) -> Any:
    """The weight of a product of rows with it: [E, N, K] captured as `name` behind the model's own transpose, or
    [E, K, N] captured as `<name>_t`."""
    return p.either(p.transpose(p.any(name), perm=(0, 2, 1)), p.any(f"{name}_t"))


def shape_of(m: Match, name: str) -> tuple:
    """[E, N, K] of what `stored` matched."""
    if m.get(name) is not None:
        return m.get(name).shape
    value = m.get(f"{name}_t")
    return (value.shape[0], value.shape[2], value.shape[1]) if value.type.rank == 3 else value.shape


def build(b: Any, m: Match, name: str) -> Value:
    """[E, N, K] of what `stored` matched"""
    if m.get(name) is not None:
        return m.get(name)
    return transposed(b, m.get(f"{name}_t"))


def transposed(b: Any, value: Value) -> Value:
    """value [E, K, N] → [E, N, K]; of a weight a view, which takes no memory of its own."""
    weight = value.weight
    if weight is None:
        return b.transpose(value, perm=(0, 2, 1))
    e, k, n = weight.type.shape

    def compute() -> torch.Tensor:
        return weight.load().transpose(1, 2)

    return b.weight(f"{weight.name}.transposed", compute, weight.type.with_shape((e, n, k)))


def stacked(b: Any, rows: Sequence[tuple[Value, ...]]) -> Value:
    """[E, …] of each expert's matrices or vectors, joined along their first axis; built when first read."""
    parts: list[list[Weight]] = [[v.weight for v in row if v.weight is not None] for row in rows]
    first = rows[0]
    shape = (len(rows), sum(int(v.shape[0]) for v in first), *first[0].shape[1:])

    def compute() -> torch.Tensor:
        return torch.stack([torch.cat([w.load() for w in row]) for row in parts])

    return b.weight(f"{parts[0][0].name}.stacked", compute, TensorType(first[0].dtype, shape))


def maybe_cast(p: Any, v: Any) -> Any:
    """v, or v in another dtype."""
    return p.maybe(lambda inner: p.cast(inner, dtype=p.attr()), v)


def cast_weights(p: Any, v: Any) -> Any:
    """Routing weights, perhaps in the dtype captured as weights_dtype."""
    return p.maybe(lambda inner: p.cast(inner, dtype=p.attr("weights_dtype")), v)


def why_not_routed(m: Match) -> str | None:
    """Why x, weights, experts, the stacked weights and their biases do not make `moe.experts`."""
    if m.weights.type.rank != 2 or m.experts.shape != m.weights.shape:
        return f"weights {m.weights.type}, experts {m.experts.type}"
    tokens, k = m.experts.shape
    rows = m.x.type.with_shape((tokens, m.x.shape[-1]))
    if m.x.type.rank < 2 or m.x.type.numel != rows.numel:
        return f"x {m.x.type} has no row for each of {tokens} tokens"
    num, width, _ = shape_of(m, "gate_up")
    for name, size in (("gate_up_bias", width), ("down_bias", m.x.shape[-1])):
        if m.get(name) is not None and m.get(name).shape != (num, size):
            return f"{name} {m.get(name).type} is not [{num}, {size}]"
    spread = m.get("factors_as")
    if spread not in ((tokens * k, 1), (tokens, k, 1)):
        return f"the weights {m.weights.type} are read as {list(spread)}"
    if len(m.per_token) != 3 or m.per_token[1] != k:
        return f"the sum runs over {list(m.per_token)}, not over the {k} chosen experts"
    if m.root.type != rows:
        return f"the result is {m.root.type}, x {m.x.type}"
    return why_not_halves(m.unit)


def routed_experts(b: Any, m: Match) -> Any:
    """`moe.experts` of what `why_not_routed` accepts."""
    matrices = build(b, m, "gate_up"), build(b, m, "down")
    biases = m.get("gate_up_bias"), m.get("down_bias")
    x = reshaped(b, m.x, m.root.shape)
    weights = narrowed(b, m.weights, m.get("weights_dtype"))
    return b.moe_experts(x, weights, expert_ids(b, m.experts), *matrices, *biases, **unit_attrs(m.unit))
