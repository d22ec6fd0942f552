"""Experts in an unrolled loop, one module each, to `moe.experts`: on every token, or on those that chose them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.ir import Value
from moec.passes.moe.combine import Column, combine_column, distinct
from moec.passes.moe.expert_modules import experts_of, separate, together, why_not_all, why_not_rows
from moec.passes.moe.expert_weights import maybe_cast
from moec.passes.moe.hits import weighed
from moec.passes.moe.structure import is_filled
from moec.passes.rewrite import Match, Refused, Rewrite, RuleSet


@dataclass(frozen=True)
class UnrolledExperts(Rewrite):
    """Σ_e column_e · mlp_e(x) (+ others), one MLP per expert with weights of its own → moe.experts on their stack

    gate and up are two linear layers or one; all E experts must be there, each once. The stacked weights are built when
    they are first read.
    """

    def pattern(self, p: Any, x: Any) -> Any:
        def split(term: Any, gate: Any, gate_bias: Any, up: Any, up_bias: Any, unit: Any, down: Any, down_bias: Any,
                  factor: Any) -> Any:  # fmt: skip
            return p.bind(term, p.mul(separate(p, x, gate, gate_bias, up, up_bias, unit, down, down_bias), factor))

        def merged(term: Any, gate_up: Any, gate_up_bias: Any, unit: Any, down: Any, down_bias: Any,
                   factor: Any) -> Any:  # fmt: skip
            return p.bind(term, p.mul(together(p, x, gate_up, gate_up_bias, unit, down, down_bias), factor))

        # one alone is a shared expert
        return p.either(*(p.tree("add", p.repeat(mlp, least=2), p.rest("others")) for mlp in (split, merged)))

    @staticmethod
    def _columns(m: Match) -> list[Column | None]:
        return [combine_column(f) if f.shape == (*m.x.shape[:-1], 1) else None for f in m.factor]

    def when(self, m: Match) -> Refused | None:
        columns = self._columns(m)
        want = "its column of a routing: Σ (experts = e) · weights, or column e of weights scattered over zeros"
        refused = why_not_all(m, columns, want, others=True)
        return refused or why_not_rows(m, next(c for c in columns if c is not None), m.x)

    def replace(self, b: Any, m: Match) -> Any:
        columns = self._columns(m)
        y = experts_of(b, m, columns, m.x)
        # a shared expert has a factor that is no routing's
        shared = [term for term, column in zip(m.term, columns, strict=True) if column is None]
        for other in (*m.others, *shared):
            y = y if is_filled(other, 0) else b.add(y, other)
        return y


@dataclass(frozen=True)
class IndexedExperts(Rewrite):
    """for each expert e: y[tokens of e] += mlp_e(x[tokens of e]) · their weights, y from 0 or anything → moe.experts

    The tokens are where the expert ids are e, as `torch.where` and `nonzero` give them; the sum is index_add, index_put
    that accumulates, or an element read and put back. All E experts must be there, each once, in any order.
    """

    def pattern(self, p: Any, x: Any, start: Any) -> Any:
        def put(below: Any, tokens: Any, part: Any) -> Any:
            read = p.add(p.gather(below, tokens, axis=0), part)
            return p.either(
                p.index_put(below, tokens, part, accumulate=True), p.index_put(below, tokens, read, accumulate=False)
            )

        def split(below: Any, tokens: Any, gate: Any, gate_bias: Any, up: Any, up_bias: Any, unit: Any, down: Any,
                  down_bias: Any, factor: Any) -> Any:  # fmt: skip
            rows = p.gather(x, tokens, axis=0)
            y = separate(p, rows, gate, gate_bias, up, up_bias, unit, down, down_bias)
            return put(below, tokens, maybe_cast(p, p.mul(maybe_cast(p, y), factor)))

        def merged(below: Any, tokens: Any, gate_up: Any, gate_up_bias: Any, unit: Any, down: Any, down_bias: Any,
                   factor: Any) -> Any:  # fmt: skip
            y = together(p, p.gather(x, tokens, axis=0), gate_up, gate_up_bias, unit, down, down_bias)
            return put(below, tokens, maybe_cast(p, p.mul(maybe_cast(p, y), factor)))

        return p.either(*(p.chain(p.repeat(mlp), "below", start) for mlp in (split, merged)))

    @staticmethod
    def _columns(m: Match) -> list[Column | None]:
        return [weighed(tokens, factor) for tokens, factor in zip(m.tokens, m.factor, strict=True)]

    def when(self, m: Match) -> Refused | None:
        columns = self._columns(m)
        want = "the weights [n, 1] that the tokens where(experts = e) have for e, weights[tokens, choice] say"
        refused = why_not_all(m, columns, want)
        column = next((c for c in columns if c is not None), None)
        # ids [T] are of one choice
        if refused is None and column is not None and column[1].type.rank > 1 and not distinct(column[1]):
            return m.no("a token may have one expert twice, and is then written twice", at=column[1])
        return refused or (why_not_rows(m, column, m.x) if column is not None else None)

    def replace(self, b: Any, m: Match) -> Any:
        y: Value = experts_of(b, m, self._columns(m), m.x)
        return y if is_filled(m.start, 0) else b.add(m.start, y)


@dataclass(frozen=True)
class RaiseUnrolledExperts(RuleSet):
    """Experts in an unrolled loop, one module each, to `moe.experts`."""

    rules: tuple[Rewrite, ...] = (UnrolledExperts(), IndexedExperts())
