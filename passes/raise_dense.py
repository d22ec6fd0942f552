"""Experts that run on every token and are masked by the combine matrix, to `moe.experts`: stacked weights in one
batched product, or one module per expert in an unrolled loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.ir import Value
from moec.passes import expert_weights
from moec.passes.combine import combine_column, combine_rows, same_rows
from moec.passes.rewrite import Match, Refused, Rewrite
from moec.passes.structure import gated_unit, is_filled, producer, unit_attrs, why_not_halves


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


@dataclass(frozen=True)
class DenseExperts(Rewrite):
    """Σ_e combine[:, e] · mlp_e(x) with stacked weights, biased or not → moe.experts"""

    def pattern(self, p: Any, rows: Any, factors: Any) -> Any:
        y = p.maybe(lambda v: p.reshape(v, shape=p.attr()), _batched_mlp(p, rows, biased=True))
        return p.sum(p.mul(y, factors), axes=(-3,))

    def when(self, m: Match) -> Refused | None:
        routing = combine_rows(m.factors)
        if routing is None:
            return m.no("the factors are not a routing's combine matrix", at=m.factors)
        x = same_rows(m.rows, routing[1].shape[0])
        if x is None or x.type.with_shape(m.root.shape) != m.root.type:
            return m.no(f"{m.rows.type} are not the same rows for every expert", at=m.rows)
        num, width, _ = expert_weights.shape_of(m, "gate_up")
        reason = why_not_halves(m, width) or _why_not_bias(m, "gate_up_bias", num, width)
        reason = reason or _why_not_bias(m, "down_bias", num, x.shape[-1])
        return m.no(reason) if reason else None

    def replace(self, b: Any, m: Match) -> Any:
        routing = combine_rows(m.factors)
        assert routing is not None  # when() saw it
        weights, experts = routing
        matrices = expert_weights.build(b, m, "gate_up"), expert_weights.build(b, m, "down")
        biases = m.get("gate_up_bias"), m.get("down_bias")
        x = b.reshape(same_rows(m.rows, experts.shape[0]), shape=m.root.shape)
        return b.moe_experts(x, weights, experts, *matrices, *biases, **unit_attrs(m))


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
        x = same_rows(m.rows, routing[1].shape[0])
        if x is None or x.type.with_shape(m.root.shape) != m.root.type:
            return m.no(f"{m.rows.type} are not the same rows for every expert", at=m.rows)
        reason = why_not_halves(m, expert_weights.shape_of(m, "gate_up")[1])
        return m.no(reason) if reason else None

    def replace(self, b: Any, m: Match) -> Any:
        routing = combine_rows(m.factors)
        assert routing is not None  # when() saw it
        weights, experts = routing
        (tokens, k), d = experts.shape, m.root.shape[-1]
        x = b.reshape(same_rows(m.rows, tokens), shape=(tokens, 1, d))
        weights = weights if weights.dtype == x.dtype else b.cast(weights, dtype=x.dtype)
        rows = b.mul(x, b.reshape(weights, shape=(tokens, k, 1)))
        ones = b.full(shape=(tokens * k, 1), value=1.0, dtype=x.dtype)
        y = b.moe_experts(
            b.reshape(rows, shape=(tokens * k, d)),
            ones,
            b.reshape(experts, shape=(tokens * k, 1)),
            expert_weights.build(b, m, "gate_up"),
            expert_weights.build(b, m, "down"),
            **unit_attrs(m),
        )
        return y if k == 1 else b.sum(b.reshape(y, shape=(tokens, k, d)), axes=(-2,))


@dataclass(frozen=True)
class RaiseUnrolledExperts(Rewrite):
    """Σ_e column_e · mlp_e(x) (+ others), one MLP per expert with weights of its own → moe.experts on their stack

    gate and up are two linear layers or one; all E experts must be there, each once. The stacked weights are built when
    they are first read.
    """

    def pattern(self, p: Any, x: Any) -> Any:
        separate, merged = p.repeat(self._expert(p, x, False)), p.repeat(self._expert(p, x, True))
        return p.either(p.tree("add", separate, p.rest("others")), p.tree("add", merged, p.rest("others")))

    @staticmethod
    def _expert(p: Any, x: Any, merged: bool) -> Any:
        def separate(gate: Any, gate_bias: Any, up: Any, up_bias: Any, down: Any, down_bias: Any, factor: Any) -> Any:
            g = p.linear_linear(x, gate, p.optional(gate_bias.name))
            u = p.linear_linear(x, up, p.optional(up_bias.name))
            attrs = {name: p.attr(name) for name in ("activation", "limit", "alpha", "up_offset")}
            unit = p.either(p.swiglu(g, u), p.glu(g, u, **attrs))
            return p.mul(p.linear_linear(unit, down, p.optional(down_bias.name)), factor)

        def together(gate_up: Any, gate_up_bias: Any, down: Any, down_bias: Any, factor: Any) -> Any:
            h = p.linear_linear(x, gate_up, p.optional(gate_up_bias.name))
            return p.mul(p.linear_linear(gated_unit(p, h), down, p.optional(down_bias.name)), factor)

        return together if merged else separate

    def when(self, m: Match) -> Refused | None:
        columns = [combine_column(f) for f in m.factor]
        routings = {c[:2] for c in columns if c is not None}
        if len(routings) != 1 or None in columns:
            return m.no("the factors are not columns of one routing's combine matrix")
        weights, _ = routings.pop()
        route = producer(weights, "moe.route")
        if route is None:
            return m.no("the number of experts is known behind moe.route only", at=weights)
        if m.x.type.rank != 2 or m.root.type != m.x.type:
            return m.no(f"x is {m.x.type}, the sum {m.root.type}", at=m.x)
        found, num = [c[2] for c in columns if c is not None], route.operands[0].shape[-1]
        if sorted(found) != list(range(num)):
            return m.no(f"experts {sorted(found)} of {num}")
        for rows in (*self._matrices(m), *self._biases(m)):
            if rows is not None and any(v is None or v.weight is None for row in rows for v in row):
                return m.no("some expert's weights are computed, or it lacks a bias that others have")
        if m.get("gate") is None:
            reason = why_not_halves(m, m.gate_up[0].shape[0])
            return m.no(reason) if reason else None
        return None

    @staticmethod
    def _ordered(m: Match, *names: str) -> list[tuple[Any, ...]] | None:
        """Each expert's captures in the order of the experts; None where all are absent."""
        order = sorted(range(len(m.factor)), key=lambda i: combine_column(m.factor[i])[2])  # type: ignore[index]
        rows = [tuple(m.get(n)[i] for n in names) for i in order]
        return None if all(v is None for row in rows for v in row) else rows

    def _matrices(self, m: Match) -> tuple[Any, Any]:
        first = ("gate_up",) if m.get("gate") is None else ("gate", "up")
        return self._ordered(m, *first), self._ordered(m, "down")

    def _biases(self, m: Match) -> tuple[Any, Any]:
        first = ("gate_up_bias",) if m.get("gate") is None else ("gate_bias", "up_bias")
        return self._ordered(m, *first), self._ordered(m, "down_bias")

    def replace(self, b: Any, m: Match) -> Any:
        column = combine_column(m.factor[0])
        assert column is not None  # when() saw it
        weights, experts, _ = column
        stacks = [
            None if rows is None else expert_weights.stacked(b, rows) for rows in (*self._matrices(m), *self._biases(m))
        ]
        y: Value = b.moe_experts(m.x, weights, experts, *stacks, **unit_attrs(m))
        for other in m.others:
            y = y if is_filled(other, 0) else b.add(y, other)
        return y
