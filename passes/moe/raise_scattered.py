"""Routers that go through [..., E]: scores of the chosen experts where they stand, and 0 or −∞ elsewhere.

Whatever is done there to each token's chosen scores is done to the chosen scores themselves, and they are scattered
afterwards: routers are then recognised as if they had never been spread, and the scatter is the combine matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.ir import Value
from moec.passes.moe.bounds import is_finite, is_positive
from moec.passes.moe.combine import distinct
from moec.passes.moe.structure import is_filled
from moec.passes.rewrite import Match, Refused, Rewrite


def _why_not_chosen(m: Match, into: Value, x: Value) -> Refused | None:
    """Refuses a scatter over `into`, where it has not the shape of x or its indices may repeat."""
    if into.shape != x.shape or m.experts.shape[:-1] != x.shape[:-1]:
        return m.no(f"{m.experts.type} are places in {into.type}, not in {x.type}", at=into)
    if not distinct(m.experts):
        return m.no("the places may repeat: they come from no topk, sort or route of each token", at=m.experts)
    return None


@dataclass(frozen=True)
class SortedTopK(Rewrite):
    """The first k of a descending sort, values or indices → topk"""

    result: int = 0

    @property
    def name(self) -> str:
        return f"sorted_topk_{'indices' if self.result else 'values'}"

    def pattern(self, p: Any, x: Any) -> Any:
        both = p.sort(x, axis=-1, descending=True)
        return p.slice(p.shared(both[self.result]), axis=-1, start=0, end=p.attr("k"))

    def when(self, m: Match) -> Refused | None:
        return None if isinstance(m.k, int) and m.k > 0 else m.no(f"the first {m.k} elements are taken", at=m.x)

    def replace(self, b: Any, m: Match) -> Any:
        for user in m.x.users:  # the rule may have replaced the other result already
            same = user.op == "math.topk" and user.attrs == {"k": m.k, "axis": -1, "largest": True}
            if same and user.precedes(m.root.producer):
                return user.results[self.result]
        return b.topk(m.x, k=m.k, axis=-1)[self.result]


@dataclass(frozen=True)
class GatherOfTopK(Rewrite):
    """gather(x, indices of topk(x)) → values of topk(x)"""

    def pattern(self, p: Any, x: Any) -> Any:
        _, indices = p.topk(x, k=p.attr("k"), axis=-1, largest=p.attr("largest"))
        return p.gather_elements(x, p.bind("indices", p.shared(indices)), axis=-1)

    def replace(self, b: Any, m: Match) -> Any:
        return m.indices.producer.results[0]


@dataclass(frozen=True)
class GatherOfArgmax(Rewrite):
    """gather(x, argmax(x)) → amax(x); of softmax(y) also where argmax(y) is, whose order is the same"""

    def pattern(self, p: Any, x: Any) -> Any:
        def gathered(scores: Any, among: Any) -> Any:
            best = p.argmax(among, axis=-1, keepdim=p.attr("keepdim"))
            index = p.shared(p.maybe(lambda v: p.reshape(v, shape=p.attr()), best))
            return p.gather_elements(p.bind("scores", scores), index, axis=-1)

        return p.either(gathered(x, x), gathered(p.shared(p.softmax(x, axis=-1)), x))

    def when(self, m: Match) -> Refused | None:
        if m.root.shape != (*m.scores.shape[:-1], 1):
            return m.no(f"{m.root.type} are gathered from {m.scores.type}", at=m.scores)
        return None

    def replace(self, b: Any, m: Match) -> Any:
        return b.amax(m.scores, axes=(-1,), keepdim=True)


@dataclass(frozen=True)
class GatherOfScatter(Rewrite):
    """gather(scatter(z, experts, chosen), experts) → chosen, each place written once"""

    def pattern(self, p: Any, into: Any, experts: Any, chosen: Any) -> Any:
        return p.gather_elements(p.shared(p.scatter_elements(into, experts, chosen, axis=-1)), experts, axis=-1)

    def when(self, m: Match) -> Refused | None:
        return _why_not_chosen(m, m.into, m.into)

    def replace(self, b: Any, m: Match) -> Any:
        return m.chosen


@dataclass(frozen=True)
class MaskedScores(Rewrite):
    """scores · mask, or where(mask, scores, number), the mask being scatter(0, experts, 1)
    → scatter(number, experts, gather(scores, experts))

    As a product the number is 0, which scores that are not finite would make NaN.
    """

    def pattern(self, p: Any, scores: Any, zeros: Any, experts: Any, ones: Any) -> Any:
        mask = p.shared(p.scatter_elements(zeros, experts, ones, axis=-1))
        as_float = p.maybe(lambda v: p.cast(v, dtype=p.attr()), mask)
        truth = p.either(mask, p.cast(mask, dtype="bool"), p.ne(mask, 0), p.eq(mask, 1), p.gt(mask, 0))
        false = p.either(p.not_(truth), p.eq(mask, 0))
        number = p.const("number")
        return p.either(p.mul(scores, as_float), p.where(truth, scores, number), p.where(false, number, scores))

    def when(self, m: Match) -> Refused | None:
        if not is_filled(m.zeros, 0) or not is_filled(m.ones, 1):
            return m.no("the mask is not 1 where experts are chosen and 0 elsewhere", at=m.zeros)
        if m.root.type != m.scores.type or not m.root.dtype.is_float:
            return m.no(f"{m.scores.type} are masked to {m.root.type}", at=m.scores)
        return _why_not_chosen(m, m.zeros, m.scores)

    def replace(self, b: Any, m: Match) -> Any:
        rest = b.full(shape=m.root.shape, value=float(m.get("number", 0.0)), dtype=m.root.dtype)
        return b.scatter_elements(rest, m.experts, b.gather_elements(m.scores, m.experts, axis=-1), axis=-1)


@dataclass(frozen=True)
class ScatteredTotal(Rewrite):
    """sum(scatter(0, experts, weights)) per token → sum(weights)"""

    def pattern(self, p: Any, zeros: Any, experts: Any, weights: Any) -> Any:
        spread = p.shared(p.scatter_elements(zeros, experts, weights, axis=-1))
        return p.sum(spread, axes=(-1,), keepdim=p.attr("keepdim"))

    def when(self, m: Match) -> Refused | None:
        if not is_filled(m.zeros, 0):
            return m.no("what is not chosen is not 0", at=m.zeros)
        return _why_not_chosen(m, m.zeros, m.zeros)

    def replace(self, b: Any, m: Match) -> Any:
        return b.sum(m.weights, axes=(-1,), keepdim=m.keepdim)


@dataclass(frozen=True)
class ScatteredQuotient(Rewrite):
    """scatter(0, experts, weights) / total or · factor, with one number per token or for all
    → scatter(0, experts, weights / total)"""

    divided: bool = True

    @property
    def name(self) -> str:
        return "scattered_quotient" if self.divided else "scattered_product"

    def pattern(self, p: Any, zeros: Any, experts: Any, weights: Any, total: Any) -> Any:
        spread = p.scatter_elements(zeros, experts, weights, axis=-1)
        return p.div(spread, total) if self.divided else p.mul(spread, total)

    def when(self, m: Match) -> Refused | None:
        if not is_filled(m.zeros, 0):
            return m.no("what is not chosen is not 0", at=m.zeros)
        if m.root.type != m.zeros.type or m.total.shape not in ((), (1,), (*m.zeros.shape[:-1], 1)):
            return m.no(f"{m.zeros.type} and {m.total.type}: not one number for each token", at=m.total)
        # 0 / 0 and 0 · inf are not what stays at the places not chosen
        if not (is_positive if self.divided else is_finite)(m.total):
            return m.no(f"{m.total.type} may be {'0 or ' if self.divided else ''}infinite", at=m.total)
        return _why_not_chosen(m, m.zeros, m.zeros)

    def replace(self, b: Any, m: Match) -> Any:
        weights = (b.div if self.divided else b.mul)(m.weights, m.total)
        return b.scatter_elements(m.zeros, m.experts, weights, axis=-1)


SCATTERED_RULES: tuple[Rewrite, ...] = (
    SortedTopK(0),
    SortedTopK(1),
    GatherOfTopK(),
    GatherOfArgmax(),
    GatherOfScatter(),
    MaskedScores(),
    ScatteredTotal(),
    ScatteredQuotient(True),
    ScatteredQuotient(False),
)
