"""Experts to `moe.experts`: sorted tokens with grouped products, and gathered weights with batched ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.ir import Value
from moec.passes.raise_dense import DenseExperts
from moec.passes.raise_route import ROUTE_RULES
from moec.passes.rewrite import Match, Refused, Rewrite, RuleSet
from moec.passes.structure import ACTIVATIONS, counts_up, gated, producer, through


def _cast(p: Any, v: Any) -> Any:
    return p.maybe(lambda inner: p.cast(inner, dtype=p.attr()), v)


def why_not_offsets(offsets: Value, experts: Value, num_experts: int) -> str | None:
    """Why `offsets` are not the ends of each expert's rows among the sorted flat ids; None where they are."""
    scan = producer(through(offsets, "math.cast"), "math.cumsum")
    if scan is None:
        return "the group offsets are not a running sum"
    counts = producer(through(scan.operands[0], "math.cast"), "tensor.histc")
    if counts is None or counts.attrs["bins"] != num_experts:
        return f"the group offsets do not count {num_experts} experts"
    ids = through(counts.operands[0], "math.cast", "tensor.reshape")
    ordered = producer(ids, "math.sort")
    if ordered is not None and ids is ordered.results[0]:
        ids = through(ordered.operands[0], "math.cast", "tensor.reshape")
    return None if ids is through(experts, "math.cast", "tensor.reshape") else "the counts are of other expert ids"


def why_not_inverse(inverse: Value, perm: Value) -> str | None:
    """Why `inverse` does not undo the permutation `perm`; None where it does."""
    ordered = producer(inverse, "math.sort")
    if ordered is not None and inverse.index == 1 and ordered.operands[0] is perm:
        return None
    put = producer(inverse, "tensor.index_put")
    if put is not None and put.operands[1] is perm and not put.attrs["accumulate"]:
        return None if counts_up(put.operands[2]) else "the rows are put back in another order"
    return "the rows are not put back in their order"


def why_not_shapes(m: Match, two_f: Any) -> str | None:
    """Why x, weights, experts and the stacked weights do not make `moe.experts`."""
    if m.x.type.rank != 2 or m.weights.type.rank != 2 or m.experts.shape != m.weights.shape:
        return f"x {m.x.type}, weights {m.weights.type}, experts {m.experts.type}"
    if m.halves != (two_f // 2, two_f // 2):
        return f"halves {m.halves} of {two_f}"
    return None


@dataclass(frozen=True)
class GroupedExperts(Rewrite):
    """sort by expert → gather rows → grouped matmul → gated → grouped matmul → weight → unsort → sum over k"""

    activation: str = "silu"
    narrow: bool = False  # the weighted sum runs in wider floats and is cast back

    @property
    def name(self) -> str:
        return f"grouped_experts_{self.activation}{'_narrow' if self.narrow else ''}"

    def pattern(self, p: Any, x: Any, weights: Any, experts: Any, gate_up: Any, down: Any, offsets: Any, k: Any) -> Any:
        _, order = p.sort(p.reshape(experts, shape=p.attr()), axis=-1)
        perm = p.bind("perm", p.shared(order))
        rows = p.gather(x, p.shared(p.floordiv(perm, k)), axis=0)
        h = p.grouped_matmul(_cast(p, rows), p.transpose(gate_up, perm=(0, 2, 1)), offsets)
        y = p.grouped_matmul(gated(p, h, self.activation), p.transpose(down, perm=(0, 2, 1)), offsets)
        factors = p.gather(p.reshape(weights, shape=p.attr()), perm, axis=0)
        y = p.mul(_cast(p, y), _cast(p, p.reshape(factors, shape=p.attr())))
        back = p.gather(_cast(p, y), p.any("inverse"), axis=0)
        total = p.sum(_cast(p, p.reshape(back, shape=p.attr("per_token"))), axes=(-2,))
        return p.cast(total, dtype=p.attr()) if self.narrow else total

    def when(self, m: Match) -> Refused | None:
        reason = (
            why_not_offsets(m.offsets, m.experts, m.gate_up.shape[0])
            or why_not_inverse(m.inverse, m.perm)
            or why_not_shapes(m, m.gate_up.shape[1])
        )
        if reason is None and (len(m.per_token) != 3 or m.per_token[1] != m.experts.shape[1]):
            reason = f"the sum runs over {list(m.per_token)}, not over the {m.experts.shape[1]} chosen experts"
        if reason is None and not _is_size(m.k, m.experts.shape[1]):
            reason = "the row of a token is not its position divided by k"
        if reason is None and m.root.type != m.x.type:
            reason = f"the result is {m.root.type}, x {m.x.type}"
        return m.no(reason) if reason else None

    def replace(self, b: Any, m: Match) -> Any:
        return b.moe_experts(m.x, m.weights, m.experts, m.gate_up, m.down, activation=self.activation)


def _is_size(v: Value, size: Any) -> bool:
    node = v.producer
    return node is not None and (
        (node.op == "tensor.constant" and node.attrs["value"] == (size,))
        or (node.op == "tensor.dim" and node.attrs["value"] == size)
    )


@dataclass(frozen=True)
class BatchedExperts(Rewrite):
    """repeat rows k times → batched product with each row's own expert → gated → the same → weight → sum over k"""

    activation: str = "silu"
    narrow: bool = False

    @property
    def name(self) -> str:
        return f"batched_experts_{self.activation}{'_narrow' if self.narrow else ''}"

    def pattern(self, p: Any, x: Any, weights: Any, experts: Any, gate_up: Any, down: Any) -> Any:
        flat = p.shared(p.reshape(experts, shape=p.attr()))
        repeated = p.expand(p.reshape(x, shape=p.attr("split")), shape=p.attr("repeat"))
        rows = p.reshape(p.reshape(repeated, shape=p.attr()), shape=p.attr())
        column = p.either(rows, p.reshape(repeated, shape=p.attr()))
        h = p.reshape(p.matmul(p.gather(gate_up, flat, axis=0), column), shape=p.attr())
        act = p.reshape(gated(p, h, self.activation), shape=p.attr())
        y = p.reshape(p.matmul(p.gather(down, flat, axis=0), act), shape=p.attr())
        y = p.mul(_cast(p, y), _cast(p, p.reshape(weights, shape=p.attr())))
        total = p.sum(_cast(p, p.reshape(_cast(p, y), shape=p.attr("per_token"))), axes=(-2,))
        return p.cast(total, dtype=p.attr()) if self.narrow else total

    def when(self, m: Match) -> Refused | None:
        t, k = m.experts.shape if m.experts.type.rank == 2 else (None, None)
        d = m.x.shape[-1]
        reason = why_not_shapes(m, m.gate_up.shape[1])
        if reason is None and (m.split != (t, 1, d) or m.repeat != (t, k, d)):
            reason = f"rows repeat as {list(m.repeat)}, not each {k} times"
        if reason is None and (len(m.per_token) != 3 or m.per_token[1] != k):
            reason = f"the sum runs over {list(m.per_token)}, not over the {k} chosen experts"
        if reason is None and m.root.type != m.x.type:
            reason = f"the result is {m.root.type}, x {m.x.type}"
        return m.no(reason) if reason else None

    def replace(self, b: Any, m: Match) -> Any:
        return b.moe_experts(m.x, m.weights, m.experts, m.gate_up, m.down, activation=self.activation)


@dataclass(frozen=True)
class RaiseMoE(RuleSet):
    """Routers and experts, however the model writes them, to `moe.route` and `moe.experts`."""

    rules: tuple[Rewrite, ...] = (
        *ROUTE_RULES,
        *(GroupedExperts(a, narrow) for a in ACTIVATIONS for narrow in (False, True)),
        *(BatchedExperts(a, narrow) for a in ACTIVATIONS for narrow in (False, True)),
        *(DenseExperts(a) for a in ACTIVATIONS),
    )
