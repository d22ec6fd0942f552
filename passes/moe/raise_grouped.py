"""Experts on tokens sorted by expert, with grouped products, to `moe.experts`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.ir import Value
from moec.passes.moe.expert_weights import cast_weights, maybe_cast, routed_experts, shape_of, stored, why_not_routed
from moec.passes.moe.structure import counts_up, producer, through
from moec.passes.moe.units import gated_unit
from moec.passes.rewrite import Match, Refused, Rewrite


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
    put, scatter = producer(inverse, "tensor.index_put"), producer(inverse, "tensor.scatter_elements")
    if put is not None and put.attrs["accumulate"]:
        put = None
    if scatter is not None and scatter.attrs["reduce"] == "none" and perm.type.rank == 1:  # the same then
        put = scatter
    if put is not None and put.operands[1] is perm:
        return None if counts_up(put.operands[2]) else "the rows are put back in another order"
    return "the rows are not put back in their order"


@dataclass(frozen=True)
class GroupedExperts(Rewrite):
    """sort by expert → gather rows → grouped matmul → gated → grouped matmul → weight → unsort → sum over k

    The weights may come before or after the rows are put back, the weighted sum may run in wider floats, and each
    product may add its expert's bias.
    """

    def pattern(self, p: Any, x: Any, weights: Any, experts: Any, offsets: Any, k: Any) -> Any:
        flat = p.shared(p.reshape(experts, shape=p.attr()))
        ids, order = p.sort(flat, axis=-1)
        perm = p.bind("perm", p.shared(order))

        def biased(y: Any, name: str) -> Any:
            which = p.shared(p.either(ids, p.gather(flat, perm, axis=0)))
            return p.maybe(lambda v: p.add(v, p.gather(p.any(name), which, axis=0)), y)

        rows = p.gather(x, p.shared(p.floordiv(perm, k)), axis=0)
        h = p.grouped_matmul(maybe_cast(p, rows), stored(p, "gate_up"), offsets)
        act = gated_unit(p, biased(h, "gate_up_bias"))
        y = biased(p.grouped_matmul(act, stored(p, "down"), offsets), "down_bias")
        factors = p.gather(p.reshape(weights, shape=p.attr()), perm, axis=0)
        scaled = p.mul(maybe_cast(p, y), p.reshape(cast_weights(p, factors), shape=p.attr("factors_as")))
        first = maybe_cast(p, self._unsorted(p, maybe_cast(p, scaled)))
        column = p.reshape(cast_weights(p, weights), shape=p.attr("factors_as"))
        after = maybe_cast(p, p.mul(maybe_cast(p, self._unsorted(p, maybe_cast(p, y))), column))
        return maybe_cast(p, p.sum(p.either(first, after), axes=(-2,)))

    @staticmethod
    def _unsorted(p: Any, y: Any) -> Any:
        return p.reshape(maybe_cast(p, p.gather(y, p.any("inverse"), axis=0)), shape=p.attr("per_token"))

    def when(self, m: Match) -> Refused | None:
        reason = (
            why_not_offsets(m.offsets, m.experts, shape_of(m, "gate_up")[0])
            or why_not_inverse(m.inverse, m.perm)
            or why_not_routed(m)
        )
        if reason is None and not _is_size(m.k, m.experts.shape[1]):
            reason = "the row of a token is not its position divided by k"
        return m.no(reason) if reason else None

    def replace(self, b: Any, m: Match) -> Any:
        return routed_experts(b, m)


def _is_size(v: Value, size: Any) -> bool:
    node = v.producer
    return node is not None and (
        (node.op == "tensor.constant" and node.attrs["value"] == (size,))
        or (node.op == "tensor.dim" and node.attrs["value"] == size)
    )
