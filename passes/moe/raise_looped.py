"""Experts in a loop, each on the rows that chose it, to `moe.experts`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.ir import Node, Value
from moec.passes.moe.expert_weights import stacked
from moec.passes.moe.structure import counts_up, is_filled, producer, reshaped, through
from moec.passes.rewrite import Match, Refused, Rewrite


@dataclass(frozen=True)
class _Expert:
    """One link of the chain: `into` + Σ over rows (t, j) with experts[t, j] = number of weights[t, j] · mlp(x[t])."""

    number: int
    into: Value
    x: Value
    weights: Value
    experts: Value
    matrices: tuple[Value, ...]  # gate and up, or both in one
    down: Value
    unit: tuple[str, tuple[Any, ...]]


@dataclass(frozen=True)
class LoopedExperts(Rewrite):
    """for each e: (t, j) = nonzero(experts = e); y[t] += mlp_e(x[t]) · weights[t, j] → moe.experts

    As loops over experts are written out by exporters. All experts that `moe.route` chooses from must be there, each
    once, with weights of its own and without biases.
    """

    def pattern(self, p: Any, into: Any, tokens: Any, rows: Any) -> Any:
        return p.index_put(into, tokens, rows, accumulate=True)

    def when(self, m: Match) -> Refused | None:
        found = _chain(m.root)
        if not found:
            return m.no("the rows added are not those of one expert, times their weights")
        first = found[0]
        route = producer(first.weights, "moe.route")
        if route is None or not any(v is first.experts for v in route.results):
            return m.no("the number of experts is known behind moe.route only", at=first.weights)
        logits, numbers = route.operands[0], [e.number for e in found]
        num = logits.shape[-1]
        if sorted(numbers) != list(range(num)):
            return m.no(f"experts {sorted(numbers)} of {num}")
        if len({(e.unit, len(e.matrices), *(v.type for v in e.matrices), e.down.type) for e in found}) > 1:
            return m.no("the experts have different activations or sizes")
        return None

    def replace(self, b: Any, m: Match) -> Any:
        found = sorted(_chain(m.root), key=lambda e: e.number)
        first, start = found[0], _chain(m.root)[-1].into
        gate_up, down = stacked(b, [e.matrices for e in found]), stacked(b, [(e.down,) for e in found])
        x = reshaped(b, first.x, m.root.shape)
        y = b.moe_experts(x, first.weights, first.experts, gate_up, down, None, None, **dict(first.unit[1]))
        return y if is_filled(start, 0) else b.add(y, start)


def _chain(v: Value | None) -> list[_Expert]:
    """The links that end in v, the last first, as long as they are of one routing."""
    found: list[_Expert] = []
    while (expert := _link(producer(v, "tensor.index_put"))) is not None:
        same = not found or (expert.x, expert.weights, expert.experts) == (
            found[0].x, found[0].weights, found[0].experts,
        )  # fmt: skip
        if not same:
            break
        found.append(expert)
        v = expert.into
    return found


def _link(node: Node | None) -> _Expert | None:
    if node is None or not node.attrs["accumulate"]:
        return None
    into, tokens, rows = node.operands
    product, chosen = producer(rows, "math.mul"), _chosen(tokens)
    asked = None if chosen is None else _asked(chosen.operands[0])
    if product is None or asked is None or into is None or _column(tokens, asked[2]) is None:
        return None
    experts, number, column = asked
    for y, factor in (product.operands, product.operands[::-1]):
        down = producer(y, "linear.linear")
        weights = _factor(factor, tokens, chosen, 1 - column)
        if down is None or down.operands[2] is not None or weights is None:
            continue
        unit = producer(down.operands[0], "math.swiglu") or producer(down.operands[0], "math.glu")
        matrices, source = ((), None) if unit is None else _matrices(unit)
        gathered = producer(_unshaped(source), "tensor.gather")
        if gathered is None or gathered.attrs["axis"] != 0 or not _same(gathered.operands[1], tokens):
            continue
        x = _as_rows(gathered.operands[0], into)
        own = all(v.weight is not None for v in (*matrices, down.operands[1]))
        if own and x is not None and experts.shape == weights.shape and into.shape[0] == experts.shape[0]:
            attrs = tuple(sorted(unit.attrs.items()))
            return _Expert(number, into, x, weights, experts, matrices, down.operands[1], (unit.op, attrs))
    return None


def _as_rows(v: Value | None, like: Value) -> Value | None:
    """v, if it is [T, d] or [T, 1, d] for `like` [T, d], before it was reshaped."""
    shapes = (like.shape, (like.shape[0], 1, *like.shape[1:]))
    return _unshaped(v) if v is not None and v.dtype is like.dtype and v.shape in shapes else None


def _unshaped(v: Value | None) -> Value | None:
    """v before it was reshaped, or an axis of one element moved."""
    while (node := producer(v, "tensor.reshape") or producer(v, "tensor.transpose")) is not None:
        (inner,) = node.operands
        moved = [p for p in node.attrs.get("perm", ()) if inner.shape[p] != 1]
        if moved != sorted(moved):
            break
        v = inner
    return v


def _asked(condition: Value | None) -> tuple[Value, int, int] | None:
    """(experts [T, k], number, axis of the tokens) of a condition that says where an expert was chosen: experts = e,
    [T, k], or a row of one_hot(experts) with its axes turned round, [k, T]."""
    plain = producer(condition, "math.eq")
    if plain is not None:
        number = producer(plain.operands[1], "tensor.constant")
        return None if number is None else _numbered(plain.operands[0], number, 0)
    row = producer(through(condition, "math.cast"), "tensor.gather")
    turned = None if row is None or row.attrs["axis"] != 0 else producer(row.operands[0], "tensor.transpose")
    if row is None or turned is None or turned.attrs["perm"] != (2, 1, 0):
        return None
    hot, number = (
        producer(through(turned.operands[0], "math.cast"), "math.eq"),
        producer(row.operands[1], "tensor.constant"),
    )
    if hot is None or number is None or not counts_up(hot.operands[1]) or hot.operands[1].type.rank != 1:
        return None
    column = producer(hot.operands[0], "tensor.reshape")
    experts = None if column is None else column.operands[0]
    if experts is None or hot.operands[0].shape != (*experts.shape, 1):
        return None
    return _numbered(experts, number, 1)


def _numbered(experts: Value | None, number: Node, column: int) -> tuple[Value, int, int] | None:
    values = number.attrs["value"]
    if experts is None or experts.type.rank != 2 or len(values) != 1 or type(values[0]) is not int:
        return None
    return experts, values[0], column


def _chosen(v: Value | None) -> Any:
    """The `tensor.nonzero` of a matrix that v is a column of."""
    return _column(v, 0) or _column(v, 1)


def _column(v: Value | None, column: int) -> Any:
    """The `tensor.nonzero` of a matrix whose row (0) or column (1) numbers v is."""
    cut = producer(through(v, "tensor.reshape"), "tensor.slice")
    if cut is None or cut.attrs["step"] != 1 or (cut.attrs["start"], cut.attrs["end"]) != (column, column + 1):
        return None
    found = producer(cut.operands[0], "tensor.nonzero")
    if found is None or found.operands[0].type.rank != 2 or cut.attrs["axis"] not in (1, -1):
        return None
    return found


def _same(a: Value | None, b: Value | None) -> bool:
    return through(a, "tensor.reshape") is through(b, "tensor.reshape")


def _factor(v: Value | None, tokens: Value | None, chosen: Any, column: int) -> Value | None:
    """The weights [T, k] that v reads at the chosen places, row by row; `column` holds the second number of each."""
    read = producer(v, "tensor.gather")
    place = None if read is None else producer(read.operands[1], "math.add")
    weights = None if read is None else through(read.operands[0], "tensor.reshape")
    if place is None or weights is None or weights.type.rank != 2 or read.attrs["axis"] != 0:
        return None
    for scaled, slot in (place.operands, place.operands[::-1]):
        times = producer(scaled, "math.mul")
        if times is None or _column(slot, column) is not chosen:
            continue
        for row, size in (times.operands, times.operands[::-1]):
            k = producer(size, "tensor.constant")
            if k is not None and k.attrs["value"] == (weights.shape[1],) and _same(row, tokens):
                return weights
    return None


def _matrices(unit: Node) -> tuple[tuple[Value, ...], Value | None]:
    """The weights of gate and up (or of both in one), and what they are applied to; nothing where there are biases."""
    gate, up = unit.operands
    halves = producer(gate, "tensor.split")
    assert gate is not None
    if halves is not None and (gate, up) == tuple(halves.results) and len(set(halves.attrs["sizes"])) == 1:
        linears = [producer(halves.operands[0], "linear.linear")]
    else:
        linears = [producer(v, "linear.linear") for v in (gate, up)]
    if any(n is None or n.operands[2] is not None or n.operands[0] is not linears[0].operands[0] for n in linears):
        return (), None
    return tuple(n.operands[1] for n in linears), linears[0].operands[0]
