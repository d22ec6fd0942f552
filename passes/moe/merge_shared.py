"""Shared experts: several made one wider MLP, or appended to the routed experts. Both opt-in: the joined weights are
held in memory, where stored ones may be mapped from their file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moec.ir import Value, Weight
from moec.passes.moe.structure import reshaped, through
from moec.passes.moe.units import glu, unit_attrs
from moec.passes.rewrite import Match, Refused, Rewrite


def _weights(values: tuple[Value, ...]) -> list[Weight] | None:
    """The stored weights of values; None where one is computed."""
    found = [v.weight for v in values if v.weight is not None]
    return found if len(found) == len(values) else None


def _joined(b: Any, values: tuple[Value, ...], axis: int) -> Value:
    """Stored matrices side by side, when first read."""
    weights = _weights(values)
    assert weights is not None  # when() saw it
    shape = list(weights[0].type.shape)
    shape[axis] = sum(int(v.shape[axis]) for v in values)
    return b.weight(
        f"{weights[0].name}.joined",
        lambda: torch.cat([w.load() for w in weights], dim=axis),
        weights[0].type.with_shape(tuple(shape)),
    )


@dataclass(frozen=True)
class MergeSharedExperts(Rewrite):
    """down₁(glu(gate₁ x, up₁ x)) + down₂(glu(gate₂ x, up₂ x)) + … (+ others) → one MLP of all their hidden channels

    Without biases, which a wider MLP would add once for all. The hidden channels of the MLPs do not mix, so that the
    sum over all of them is the sum of the MLPs.
    """

    def pattern(self, p: Any, x: Any) -> Any:
        def mlp(gate: Any, up: Any, unit: Any, down: Any) -> Any:
            act = p.bind(unit, glu(p, p.linear_linear(x, gate), p.linear_linear(x, up)))
            return p.linear_linear(act, down)

        return p.tree("add", p.repeat(mlp, least=2), p.rest("others"))

    def when(self, m: Match) -> Refused | None:
        if len({(v.producer.op, tuple(sorted(v.producer.attrs.items(), key=str))) for v in m.unit}) > 1:
            return m.no("the MLPs have different activations")
        if any(_weights(values) is None for values in (m.gate, m.up, m.down)):
            return m.no("an MLP has computed weights")
        return None

    def replace(self, b: Any, m: Match) -> Any:
        hidden = [b.linear_linear(m.x, _joined(b, values, 0)) for values in (m.gate, m.up)]
        node = m.unit[0].producer
        y = b.linear_linear(b.op(node.op, hidden, dict(node.attrs)), _joined(b, m.down, 1))
        for other in m.others:
            y = b.add(y, other)
        return y


@dataclass(frozen=True)
class AppendSharedExperts(Rewrite):
    """moe.experts(x, …) + mlp(x), or + column · mlp(x) → moe.experts with more experts, which every token goes to

    The MLP's hidden channels are cut into experts of the routed ones' width, each with weight 1 or the token's
    `column`; its width must be a multiple of theirs.
    """

    def pattern(self, p: Any, gate: Any, up: Any, down: Any) -> Any:
        names = ("x", "weights", "experts", "gate_up", "routed_down")
        attrs = {a: p.attr(f"routed_{a}") for a in ("activation", "interleaved", "limit", "alpha", "up_offset")}
        routed = p.moe_experts(*map(p.any, names), None, None, **attrs)
        unit = glu(p, p.linear_linear(p.any("rows"), gate), p.linear_linear(p.any("rows"), up))
        shared = p.linear_linear(p.bind("unit", unit), down)
        shared = p.maybe(lambda v: p.mul(v, p.any("column")), shared)
        as_rows = p.maybe(lambda v: p.reshape(v, shape=p.attr()), routed)
        return p.add(as_rows, p.maybe(lambda v: p.reshape(v, shape=p.attr()), shared))

    def when(self, m: Match) -> Refused | None:
        # linear layers keep the order of rows, whatever axes stand before the channels
        if through(m.rows, "tensor.reshape") is not through(m.x, "tensor.reshape") or m.rows.shape[-1] != m.x.shape[-1]:
            return m.no("the shared expert sees other rows than the routed ones", at=m.rows)
        for values in ((m.gate_up,), (m.routed_down,), (m.gate,), (m.up,), (m.down,)):
            if _weights(values) is None:
                return m.no("some weights are computed", at=values[0])
        routed, shared = m.routed_down.shape[2], m.down.shape[1]
        if not routed or shared % routed or m.root.shape[-1] != m.x.shape[-1]:
            return m.no(f"{shared} hidden channels are not experts of {routed}", at=m.down)
        mine = {"activation": "silu", "limit": None, "alpha": 1.702, "up_offset": 1.0} | unit_attrs(m.unit)
        if any(mine[a] != m.get(f"routed_{a}") for a in mine):
            return m.no("the shared expert has another activation")
        column = m.get("column")
        if column is not None and (column.shape[-1] != 1 or column.type.numel != m.x.shape[0]):
            return m.no(f"{column.type} is not one number per token", at=column)
        return None

    def replace(self, b: Any, m: Match) -> Any:
        (tokens, _), (num, two_f, _) = m.experts.shape, m.gate_up.shape
        f = two_f // 2
        count = m.down.shape[1] // f
        column = m.get("column")
        if column is None:
            factors = b.full(shape=(tokens, count), value=1.0, dtype=m.weights.dtype)
        else:
            column = reshaped(b, column, (tokens, 1))
            column = column if column.dtype == m.weights.dtype else b.cast(column, dtype=m.weights.dtype)
            factors = column if count == 1 else b.expand(column, shape=(tokens, count))
        ids = b.const(tuple(range(num, num + count)), "i64", (1, count))
        experts = b.concat(m.experts, b.expand(ids, shape=(tokens, count)), axis=-1)
        y = b.moe_experts(
            m.x,
            b.concat(m.weights, factors, axis=-1),
            experts,
            self._gate_up(b, m, count),
            self._down(b, m, count),
            **{a: m.get(f"routed_{a}") for a in ("activation", "interleaved", "limit", "alpha", "up_offset")},
        )
        return reshaped(b, y, m.root.shape)

    @staticmethod
    def _gate_up(b: Any, m: Match, count: int) -> Value:
        routed, gate, up = m.gate_up.weight, m.gate.weight, m.up.weight
        interleaved = m.routed_interleaved
        num, two_f, d = routed.type.shape

        def compute() -> torch.Tensor:
            halves = [w.load().reshape(count, two_f // 2, d) for w in (gate, up)]
            more = torch.stack(halves, 2).reshape(count, two_f, d) if interleaved else torch.cat(halves, 1)
            return torch.cat([routed.load(), more])

        return b.weight(f"{routed.name}.with_shared", compute, routed.type.with_shape((num + count, two_f, d)))

    @staticmethod
    def _down(b: Any, m: Match, count: int) -> Value:
        routed, down = m.routed_down.weight, m.down.weight
        num, d, f = routed.type.shape

        def compute() -> torch.Tensor:
            more = down.load().reshape(d, count, f).transpose(0, 1)
            return torch.cat([routed.load(), more])

        return b.weight(f"{routed.name}.with_shared", compute, routed.type.with_shape((num + count, d, f)))
