"""Stacked experts that run on every token in one batched product and are masked, to `moe.experts`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.passes.moe import expert_weights
from moec.passes.moe.combine import Routing, chosen_rows, combine_rows, distinct, expert_ids, flat, same_rows
from moec.passes.moe.structure import is_filled, narrowed, reshaped
from moec.passes.moe.units import gated_unit, unit_attrs, why_not_halves
from moec.passes.rewrite import Match, Refused, Rewrite


def _batched_mlp(p: Any, rows: Any, biased: bool) -> Any:
    """Every expert's MLP on rows [E, T, d] (or rows [T, d] for all): → [E, T, d]."""
    h = p.matmul(rows, expert_weights.stored(p, "gate_up"))
    if biased:
        h = p.maybe(lambda v: p.add(v, p.reshape(p.any("gate_up_bias"), shape=p.attr("gate_up_bias_as"))), h)
    y = p.matmul(gated_unit(p, h), expert_weights.stored(p, "down"))
    if biased:
        y = p.maybe(lambda v: p.add(v, p.reshape(p.any("down_bias"), shape=p.attr("down_bias_as"))), y)
    return y


def _why_not_bias(m: Match, name: str, num: Any, width: Any) -> str | None:
    """Why a captured bias [E, N], read as [E, 1, N], is not one row per expert; None where it is, or is absent."""
    bias = m.get(name)
    if bias is None or (bias.shape == (num, width) and m.get(f"{name}_as") == (num, 1, width)):
        return None
    return f"{name} {bias.type} read as {list(m.get(f'{name}_as'))}"


def _tokens(routing: Routing) -> Any:
    """How many tokens a routing is of."""
    tokens: Any = 1
    for s in routing[1].shape[:-1]:
        tokens = tokens * s
    return tokens


@dataclass(frozen=True)
class DenseExperts(Rewrite):
    """Σ_e combine[:, e] · mlp_e(x) with stacked weights, perhaps 0 where e is not chosen → moe.experts"""

    def pattern(self, p: Any, rows: Any, factors: Any) -> Any:
        y = p.maybe(lambda v: p.reshape(v, shape=p.attr()), _batched_mlp(p, rows, biased=True))
        chosen = p.maybe(lambda v: p.where(p.any("chosen"), v, p.any("zero")), p.mul(y, factors))
        return p.sum(chosen, axes=(-3,))

    def when(self, m: Match) -> Refused | None:
        routing = combine_rows(m.factors)
        if routing is None:
            return m.no("the factors are not a routing's combine matrix", at=m.factors)
        if m.get("chosen") is not None and not (is_filled(m.zero, 0) and chosen_rows(m.chosen, routing[1])):
            return m.no("it leaves out others than those that were not chosen", at=m.chosen)
        x = same_rows(m.rows, _tokens(routing))
        if x is None or x.type.with_shape(m.root.shape) != m.root.type:
            return m.no(f"{m.rows.type} are not the same rows for every expert", at=m.rows)
        num, width, _ = expert_weights.shape_of(m, "gate_up")
        reason = why_not_halves(m.unit) or _why_not_bias(m, "gate_up_bias", num, width)
        reason = reason or _why_not_bias(m, "down_bias", num, x.shape[-1])
        return m.no(reason) if reason else None

    def replace(self, b: Any, m: Match) -> Any:
        routing = combine_rows(m.factors)
        assert routing is not None  # when() saw it
        weights, experts = flat(b, routing[0]), expert_ids(b, routing[1])
        matrices = expert_weights.build(b, m, "gate_up"), expert_weights.build(b, m, "down")
        biases = m.get("gate_up_bias"), m.get("down_bias")
        rows = same_rows(m.rows, experts.shape[0])
        assert rows is not None  # when() saw it
        x = reshaped(b, rows, m.root.shape)
        weights = narrowed(b, weights, m.factors.dtype)
        return b.moe_experts(x, weights, experts, *matrices, *biases, **unit_attrs(m.unit))


@dataclass(frozen=True)
class ScaledInputExperts(Rewrite):
    """Σ_e mlp_e(combine[:, e] · x) with stacked weights and no biases → moe.experts on the scaled rows

    Llama 4 weighs what goes into an expert. A row scaled by 0 gives 0, so only the chosen experts count: the k scaled
    copies of each token become rows of their own with weight 1, and are added up per token.
    """

    def pattern(self, p: Any, rows: Any, factors: Any) -> Any:
        scaled = p.maybe(lambda v: p.reshape(v, shape=p.attr()), p.mul(rows, factors))
        y = _batched_mlp(p, scaled, biased=False)
        return p.sum(p.maybe(lambda v: p.reshape(v, shape=p.attr()), y), axes=(-3,))

    def when(self, m: Match) -> Refused | None:
        routing = combine_rows(m.factors)
        if routing is None:
            return m.no("the factors are not a routing's combine matrix", at=m.factors)
        x = same_rows(m.rows, _tokens(routing))
        if x is None or x.type.with_shape(m.root.shape) != m.root.type:
            return m.no(f"{m.rows.type} are not the same rows for every expert", at=m.rows)
        # mlp((a + b) · x) is not mlp(a · x) + mlp(b · x)
        if not distinct(routing[1]):
            return m.no("a token may have one expert twice, with the sum of the weights inside", at=routing[1])
        reason = why_not_halves(m.unit)
        return m.no(reason) if reason else None

    def replace(self, b: Any, m: Match) -> Any:
        routing = combine_rows(m.factors)
        assert routing is not None  # when() saw it
        weights, experts = flat(b, routing[0]), expert_ids(b, routing[1])
        (tokens, k), d = experts.shape, m.root.shape[-1]
        x = same_rows(m.rows, tokens)
        assert x is not None  # when() saw it
        weights = weights if weights.dtype == x.dtype else b.cast(weights, dtype=x.dtype)
        if k == 1:
            rows = b.mul(reshaped(b, x, (tokens, d)), weights)
        else:
            rows = b.mul(reshaped(b, x, (tokens, 1, d)), reshaped(b, weights, (tokens, k, 1)))
        ones = b.full(shape=(tokens * k, 1), value=1.0, dtype=x.dtype)
        y = b.moe_experts(
            reshaped(b, rows, (tokens * k, d)),
            ones,
            reshaped(b, experts, (tokens * k, 1)),
            expert_weights.build(b, m, "gate_up"),
            expert_weights.build(b, m, "down"),
            **unit_attrs(m.unit),
        )
        return y if k == 1 else b.sum(b.reshape(y, shape=(tokens, k, d)), axes=(-2,))
