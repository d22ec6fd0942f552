"""Experts in an unrolled loop, one module each, to `moe.experts`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.ir import Value
from moec.passes.moe import expert_weights
from moec.passes.moe.combine import combine_column
from moec.passes.moe.structure import gated_unit, glu, is_filled, narrowed, producer, unit_attrs, why_not_halves
from moec.passes.rewrite import Match, Refused, Rewrite


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
        def separate(
            gate: Any, gate_bias: Any, up: Any, up_bias: Any, unit: Any, down: Any, down_bias: Any, factor: Any
        ) -> Any:
            g = p.linear_linear(x, gate, p.optional(gate_bias.name))
            u = p.linear_linear(x, up, p.optional(up_bias.name))
            act = p.bind(unit, glu(p, g, u))
            return p.mul(p.linear_linear(act, down, p.optional(down_bias.name)), factor)

        def together(gate_up: Any, gate_up_bias: Any, unit: Any, down: Any, down_bias: Any, factor: Any) -> Any:
            h = p.linear_linear(x, gate_up, p.optional(gate_up_bias.name))
            act = p.bind(unit, gated_unit(p, h))
            return p.mul(p.linear_linear(act, down, p.optional(down_bias.name)), factor)

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
        if len({self._form(v) for v in m.unit}) > 1:
            return m.no("the experts have different activations or layouts")
        for rows in (*self._matrices(m), *self._biases(m)):
            if rows is not None and any(v is None or v.weight is None for row in rows for v in row):
                return m.no("some expert's weights are computed, or it lacks a bias that others have")
        if m.get("gate") is None:
            reason = why_not_halves(m, m.gate_up[0].shape[0])
            return m.no(reason) if reason else None
        return None

    @staticmethod
    def _form(unit: Value) -> tuple[Any, ...]:
        """What the gated units of all experts must have in common."""
        node = unit.producer
        assert node is not None
        assert node.operands[0] is not None
        gate = node.operands[0].producer
        return node.op, tuple(sorted(node.attrs.items(), key=str)), gate.op if gate is not None else ""

    @staticmethod
    def _ordered(m: Match, *names: str) -> list[tuple[Any, ...]] | None:
        """Each expert's captures in the order of the experts; None where all are absent."""
        order = sorted(range(len(m.factor)), key=lambda i: combine_column(m.factor[i])[2])  # type: ignore[index]  # when() saw it
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
        weights = narrowed(b, weights, m.factor[0].dtype)
        y: Value = b.moe_experts(m.x, weights, experts, *stacks, **unit_attrs(m))
        for other in m.others:
            y = y if is_filled(other, 0) else b.add(y, other)
        return y
