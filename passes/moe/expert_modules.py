"""Experts that are modules with weights of their own: the pattern of one, and `moe.experts` of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moec.ir import Value
from moec.passes.moe import expert_weights
from moec.passes.moe.combine import Column, expert_ids, num_experts
from moec.passes.moe.structure import narrowed, reshaped
from moec.passes.moe.units import gated_unit, glu, unit_attrs, why_not_halves
from moec.passes.rewrite import Match, Refused
from moec.passes.rewriting.match_values import describe


def separate(p: Any, x: Any, *names: Any) -> Any:
    """A gated MLP on x with gate and up layers, captured under `names`: gate, gate_bias, up, up_bias, unit, down,
    down_bias."""
    gate, gate_bias, up, up_bias, unit, down, down_bias = names
    g = p.linear_linear(x, gate, p.optional(gate_bias.name))
    u = p.linear_linear(x, up, p.optional(up_bias.name))
    return p.linear_linear(p.bind(unit, glu(p, g, u)), down, p.optional(down_bias.name))


def together(p: Any, x: Any, *names: Any) -> Any:
    """The same with gate and up in one layer: gate_up, gate_up_bias, unit, down, down_bias."""
    gate_up, gate_up_bias, unit, down, down_bias = names
    h = p.linear_linear(x, gate_up, p.optional(gate_up_bias.name))
    return p.linear_linear(gated_unit(p, h, unit), down, p.optional(down_bias.name))


_LAYERS = ("gate", "up", "gate_up", "down", "gate_bias", "up_bias", "gate_up_bias", "down_bias")


def why_not_all(m: Match, columns: Sequence[Column | None], expected: str, others: bool = False) -> Refused | None:
    """Refuses unless each expert of one routing is there once, with weights of its own that stack. `columns` are the
    (weights, experts, e) of each repetition, None where its factor is not `expected`; with `others` those are left."""
    known = [(factor, c) for factor, c in zip(m.factor, columns, strict=True) if c is not None]
    strange = [factor for factor, c in zip(m.factor, columns, strict=True) if c is None]
    also = ""
    if strange:
        found = f"multiplied by {describe(strange[0])} {strange[0].type}, expected {expected}"
        also = f"; {len(strange)} gated MLPs beside them are {found}"
        if not known or not others:
            return m.no(f"an expert's output is {found}", at=strange[0])
    weights, experts, first = known[0][1]
    for factor, other in known:
        if other[0] is not weights or other[1] is not experts:
            text = f"experts {first} and {other[2]} are weighted by two routings: {_named(weights)} for expert ids"
            text += f" {_named(experts)}, and {_named(other[0])} for {_named(other[1])}; expected one for all"
            return m.no(text, at=factor)
    num = num_experts(experts)
    if num is None:
        text = f"the expert ids come from {describe(experts)}; how many experts there are is known of moe.route, topk,"
        return m.no(f"{text} sort and argmax", at=experts)
    wrong = _why_not_each(sorted(c[2] for _, c in known), num)
    if wrong:
        return m.no(f"the router chooses among {num} experts, {wrong}{also}", at=experts)
    return _why_not_stacks(m, [i for i, c in enumerate(columns) if c is not None])


def _why_not_each(found: list[int], num: int) -> str:
    """What is wrong with the experts that were found, where it is not each of 0 … num − 1 once."""
    twice = sorted({e for e in found if found.count(e) > 1})
    missing = sorted(set(range(num)) - set(found))
    said = [f"experts {missing} are missing"] if missing else []
    said += [f"experts {twice} are there twice"] if twice else []
    return " and ".join([*said, *(f"there is no expert {e}" for e in found if not 0 <= e < num)])


def _why_not_stacks(m: Match, which: Sequence[int]) -> Refused | None:
    """Refuses where these repetitions differ, or their weights make no stack."""
    units = [m.unit[i] for i in which]
    forms = {_form(v) for v in units}
    if len(forms) > 1:
        return m.no(f"the experts have different activations or layouts: {', '.join(sorted(forms))}", at=units[0])
    for name in _LAYERS:
        reason = _why_not_stacked(name, [m.get(name)[i] for i in which] if m.get(name) else ())
        if reason:
            return m.no(reason)
    if m.get("gate_bias") and (m.gate_bias[which[0]] is None) != (m.up_bias[which[0]] is None):
        return m.no("of gate and up one has a bias", at=units[0])
    reasons = [why_not_halves(v) for v in units] if m.get("gate") is None else []
    reason = next((r for r in reasons if r is not None), None)
    return m.no(reason) if reason else None


def _named(v: Value) -> str:
    return f"{describe(v)} {v.type}" if v.name is None else f"%{v.name} ({describe(v)})"


def _why_not_stacked(name: str, values: Sequence[Value | None]) -> str | None:
    """Why these weights of all experts make no stack; None where they do, or all experts lack them."""
    there = [v for v in values if v is not None]
    if there and len(there) < len(values):
        return f"{len(values) - len(there)} of {len(values)} experts have no {name}, which the others have"
    for v in there:
        if v.weight is None:
            return f"an expert's {name} is computed ({describe(v)}), not stored"
        if v.type != there[0].type:
            return f"an expert's {name} is {v.type}, another's {there[0].type}"
    return None


def _form(unit: Value) -> str:
    """What the gated units of all experts must have in common, in words."""
    node = unit.producer
    assert node is not None
    return " ".join([node.op, *(f"{name}={value}" for name, value in unit_attrs(unit).items())])


def experts_of(b: Any, m: Match, columns: Sequence[Column | None], x: Value) -> Value:
    """`moe.experts` on x [..., d] of what `why_not_all` accepts, in the shape of x."""
    known = {i: c for i, c in enumerate(columns) if c is not None}
    order = sorted(known, key=lambda i: known[i][2])

    def ordered(*names: str) -> Value | None:
        rows = [tuple(m.get(n)[i] for n in names) for i in order]
        return None if all(v is None for row in rows for v in row) else expert_weights.stacked(b, rows)

    split = m.get("gate") is not None
    stacks = (
        ordered("gate", "up") if split else ordered("gate_up"),
        ordered("down"),
        ordered("gate_bias", "up_bias") if split else ordered("gate_up_bias"),
        ordered("down_bias"),
    )
    (weights, experts, _), unit = known[order[0]], m.unit[order[0]]
    experts = expert_ids(b, experts)
    weights = narrowed(b, reshaped(b, weights, experts.shape), m.factor[order[0]].dtype)
    y = b.moe_experts(reshaped(b, x, (experts.shape[0], x.shape[-1])), weights, experts, *stacks, **unit_attrs(unit))
    return reshaped(b, y, x.shape)


def why_not_rows(m: Match, column: Column, x: Value) -> Refused | None:
    """Refuses where x [..., d] has no row for each token of a routing."""
    weights, experts, _ = column
    if x.type.rank < 2 or m.root.type != x.type:
        return m.no(f"x is {x.type}, the sum over the experts {m.root.type}", at=x)
    k = experts.shape[-1] if experts.type.rank > 1 else 1
    if x.type.numel * k != experts.type.numel * x.shape[-1]:
        return m.no(f"x {x.type} has no row for each token of the expert ids {experts.type}", at=x)
    if weights.type.numel != experts.type.numel:
        return m.no(f"the weights are {weights.type}, the expert ids {experts.type}", at=weights)
    return None
