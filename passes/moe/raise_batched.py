"""Experts on gathered weights, one batched product for each token and choice, to `moe.experts`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.passes.moe.expert_weights import cast_weights, maybe_cast, routed_experts, why_not_routed
from moec.passes.moe.units import gated_unit
from moec.passes.rewrite import Match, Refused, Rewrite


@dataclass(frozen=True)
class BatchedExperts(Rewrite):
    """repeat rows k times → batched product with each row's own expert → gated → the same → weight → sum over k

    The weights may come before or after the rows are shaped [T, k, d], the weighted sum may run in wider floats, and
    each product may add its expert's bias.
    """

    def pattern(self, p: Any, x: Any, weights: Any, experts: Any) -> Any:
        flat = p.shared(p.reshape(experts, shape=p.attr()))

        def product(rows: Any, name: str) -> Any:
            """Each row [S, K] with its expert's matrix: as a column behind [E, N, K], as a row before [E, K, N]."""
            behind = p.matmul(p.gather(p.any(name), flat, axis=0), p.reshape(rows, shape=p.attr(f"{name}_rows")))
            before = p.matmul(p.reshape(rows, shape=p.attr(f"{name}_rows")), p.gather(p.any(f"{name}_t"), flat, axis=0))
            return p.either(behind, before)

        def biased(y: Any, name: str) -> Any:
            rows = p.reshape(y, shape=p.attr())
            return p.maybe(lambda v: p.add(v, p.gather(p.any(f"{name}_bias"), flat, axis=0)), rows)

        repeated = p.expand(p.reshape(x, shape=p.attr("split")), shape=p.attr("repeat"))
        act = gated_unit(p, biased(product(repeated, "gate_up"), "gate_up"))
        plain = product(act, "down")
        y = biased(plain, "down")
        column = p.reshape(cast_weights(p, weights), shape=p.attr("factors_as"))
        first = p.reshape(maybe_cast(p, p.mul(maybe_cast(p, y), column)), shape=p.attr("per_token"))
        # without a bias the two reshapes are one
        per_token = p.reshape(p.either(maybe_cast(p, y), maybe_cast(p, plain)), shape=p.attr("per_token"))
        after = p.mul(maybe_cast(p, per_token), column)
        return maybe_cast(p, p.sum(maybe_cast(p, p.either(first, after)), axes=(-2,)))

    def when(self, m: Match) -> Refused | None:
        reason = why_not_routed(m)
        if reason is None:
            (t, k), d = m.experts.shape, m.x.shape[-1]
            if m.split != (t, 1, d) or m.repeat != (t, k, d):
                reason = f"rows repeat as {list(m.repeat)}, not each {k} times"
            for name in ("gate_up", "down"):
                want = 1 if m.get(f"{name}_t") is not None else -1
                if m.get(f"{name}_rows")[want] != 1:
                    reason = f"the rows stand as {list(m.get(f'{name}_rows'))}"
        return m.no(reason) if reason else None

    def replace(self, b: Any, m: Match) -> Any:
        return routed_experts(b, m)
