"""Routers to `moe.route`: one rule for each way of choosing; `fold_route` then folds in what follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.ir import DType, Value
from moec.passes.moe.structure import is_filled
from moec.passes.rewrite import Match, Refused, Rewrite

_SCORES = ("softmax", "sigmoid", "sqrt_softplus")


def _scored(p: Any, logits: Any, scoring: str) -> Any:
    match scoring:
        case "softmax":
            return p.softmax(logits, axis=-1)
        case "sigmoid":
            return p.sigmoid(logits)
    return p.sqrt(p.softplus(logits))


def _best_groups(p: Any, choice: Any) -> Any:
    """Scores outside the best groups masked: per group on [T, G, E/G], or flat on [T, E]."""
    grouped = p.shared(p.reshape(choice, shape=p.attr("grouped")))
    best, _ = p.topk(grouped, k=2, axis=-1)
    group = p.either(p.amax(grouped, axes=(-1,)), p.sum(p.bind("top2", best), axes=(-1,)))
    _, chosen = p.topk(group, k=p.attr("topk_group"), axis=-1)
    keep = p.scatter_elements(p.any("zeros"), chosen, p.any("ones"), axis=-1)
    keep = p.reshape(keep, shape=p.attr())
    spread = p.maybe(lambda v: p.cast(v, dtype="bool"), p.maybe(lambda v: p.expand(v, shape=p.attr()), keep))

    def masked(kept: Any, scores: Any) -> Any:
        value = p.const("masked_score")
        return p.either(p.where(p.not_(kept), value, scores), p.where(kept, scores, value))

    return p.either(masked(p.reshape(spread, shape=p.attr()), choice), p.reshape(masked(keep, grouped), shape=p.attr()))


def _group_attrs(m: Match) -> dict[str, Any]:
    if m.get("grouped") is None:
        return {}
    score = "max" if m.get("top2") is None else "top2_sum"
    return {"n_group": m.grouped[1], "topk_group": m.topk_group, "group_score": score}


def _why_not(m: Match) -> Refused | None:
    """Refuses what is no routing over [..., E] with an optional bias [E] and groups of equal size."""
    logits, bias, grouped = m.logits, m.get("bias"), m.get("grouped")
    e = logits.shape[-1]
    if not isinstance(e, int) or logits.type.rank < 2:
        return m.no(f"logits {logits.type} are not [tokens, experts]", at=logits)
    if bias is not None and bias.shape not in ((e,), (1, e)):
        return m.no(f"{bias.type} is no bias for {e} experts", at=bias)
    if grouped is not None:
        if logits.type.rank != 2 or len(grouped) != 3 or grouped[0] != logits.shape[0]:
            return m.no(f"groups {list(grouped)} of logits {logits.type}", at=logits)
        if m.k > m.topk_group * grouped[2]:
            return m.no(f"{m.k} are chosen from {m.topk_group} groups of {grouped[2]}: masked experts among them")
        for name, want in (("zeros", 0), ("ones", 1)):
            if not is_filled(m.get(name), want):
                return m.no(f"the group mask is not built from {want}s", at=m.get(name))
    return None


def _route(b: Any, m: Match, logits: Value, **attrs: Any) -> Any:
    """Route over [T, E]; logits of more axes are flattened and the results shaped back."""
    e, lead = logits.shape[-1], logits.shape[:-1]
    bias = m.get("bias")
    if bias is not None and bias.type.rank == 2:
        bias = b.reshape(bias, shape=(e,))
    if len(lead) == 1:
        return b.route(logits, bias, **attrs)
    tokens: Any = 1
    for s in lead:
        tokens = tokens * s
    weights, experts = b.route(b.reshape(logits, shape=(tokens, e)), bias, **attrs)
    shape = (*lead, attrs["k"])
    return b.reshape(weights, shape=shape), b.reshape(experts, shape=shape)


@dataclass(frozen=True)
class RouteTopK(Rewrite):
    """topk(scores(logits)), the scores perhaps limited to the best groups → route without normalisation"""

    scoring: str = "softmax"

    @property
    def name(self) -> str:
        return f"route_topk_{self.scoring}"

    def pattern(self, p: Any, logits: Any) -> Any:
        scores = p.shared(_scored(p, logits, self.scoring))
        return p.topk(p.either(scores, _best_groups(p, scores)), k=p.attr("k"), axis=-1)

    def when(self, m: Match) -> Refused | None:
        if not m.roots[0].uses and not m.roots[0].is_output:
            return m.no("only the indices are used; the weights may be gathered")
        if m.get("grouped") is not None and m.masked_score > 0:
            return m.no(f"scores outside the best groups become {m.masked_score}, which may be chosen as a weight")
        return _why_not(m)

    def replace(self, b: Any, m: Match) -> Any:
        # no score is below 0, so what is masked is chosen with weight 0 or not at all: the default mask, −inf, will do
        return _route(b, m, m.logits, k=m.k, scoring=self.scoring, normalize=False, **_group_attrs(m))


@dataclass(frozen=True)
class RouteGathered(Rewrite):
    """experts = topk(choice), weights = gather(scores, experts), the choice being the scores, the scores
    with a bias, or either limited to the best groups → route without normalisation

    The choice may also be the logits of a softmax, whose order is theirs to rounding.
    """

    scoring: str = "sigmoid"

    @property
    def name(self) -> str:
        return f"route_gathered_{self.scoring}"

    def pattern(self, p: Any, logits: Any) -> Any:
        scores = p.shared(_scored(p, logits, self.scoring))
        choice = p.either(p.shared(p.add(scores, p.any("bias"))), scores)
        among = p.either(choice, _best_groups(p, choice))
        if self.scoring == "softmax":
            among = p.either(among, p.bind("raw", logits))
        _, experts = p.topk(among, k=p.attr("k"), axis=-1)
        return p.gather_elements(scores, experts, axis=-1), experts

    def when(self, m: Match) -> Refused | None:
        if m.get("raw") is not None and m.logits.dtype.bits < 32:
            return m.no(f"softmax in {m.logits.dtype} may make different logits equal", at=m.logits)
        return _why_not(m)

    def replace(self, b: Any, m: Match) -> Any:
        attrs = _group_attrs(m)
        if attrs:
            attrs["masked_score"] = float(m.masked_score)
        return _route(b, m, m.logits, k=m.k, scoring=self.scoring, normalize=False, **attrs)


def _wide(b: Any, m: Match) -> Value:
    """The logits in the dtype in which the weights are computed."""
    wide = m.get("wide")
    return m.logits if wide in (None, m.logits.dtype) else b.cast(m.logits, dtype=wide)


def _why_not_wide(m: Match) -> Refused | None:
    narrow, wide = m.logits.dtype, m.get("wide")
    if wide in (None, narrow) or (wide in (DType.F32, DType.F64) and narrow.bits <= wide.bits):
        return _why_not(m)
    return m.no(f"the chosen logits are rounded from {narrow} to {wide}", at=m.logits)


@dataclass(frozen=True)
class RouteOverTopK(Rewrite):
    """softmax or sigmoid of the k chosen logits, chosen by themselves or with a bias → route with topk_softmax
    or topk_sigmoid"""

    scoring: str = "softmax"

    @property
    def name(self) -> str:
        return f"route_over_topk_{self.scoring}"

    def pattern(self, p: Any, logits: Any) -> Any:
        values, experts = p.topk(p.either(p.add(logits, p.any("bias")), logits), k=p.attr("k"), axis=-1)
        gathered = p.gather_elements(logits, experts, axis=-1)
        chosen = p.either(p.bind("best", values), gathered)
        return _scored(p, p.maybe(lambda v: p.cast(v, dtype=p.attr("wide")), chosen), self.scoring), experts

    def when(self, m: Match) -> Refused | None:
        if m.get("bias") is not None and m.get("best") is not None:
            return m.no("the weights are computed with the bias", at=m.bias)
        return _why_not_wide(m)

    def replace(self, b: Any, m: Match) -> Any:
        return _route(b, m, _wide(b, m), k=m.k, scoring=f"topk_{self.scoring}", normalize=False)


@dataclass(frozen=True)
class RouteScattered(Rewrite):
    """softmax or sigmoid of scatter(−inf, experts, chosen logits) → the weights of route, scattered over zeros"""

    scoring: str = "sigmoid"

    @property
    def name(self) -> str:
        return f"route_scattered_{self.scoring}"

    def pattern(self, p: Any, logits: Any, nothing: Any) -> Any:
        values, experts = p.topk(logits, k=p.attr("k"), axis=-1)
        dense = p.scatter_elements(nothing, experts, values, axis=-1)
        return _scored(p, p.maybe(lambda v: p.cast(v, dtype=p.attr("wide")), dense), self.scoring), experts

    def when(self, m: Match) -> Refused | None:
        if not is_filled(m.nothing, float("-inf")):
            return m.no("the logits that are not chosen are not −inf", at=m.nothing)
        if m.nothing.shape != m.logits.shape:
            return m.no(f"{m.logits.type} is scattered into {m.nothing.type}", at=m.nothing)
        return _why_not_wide(m)

    def replace(self, b: Any, m: Match) -> Any:
        weights, experts = _route(b, m, _wide(b, m), k=m.k, scoring=f"topk_{self.scoring}", normalize=False)
        zeros = b.full(shape=m.root.shape, value=0.0, dtype=m.root.dtype)
        return b.scatter_elements(zeros, experts, weights, axis=-1), experts


@dataclass(frozen=True)
class RouteTop1(Rewrite):
    """max(scores(logits)), argmax of the same → route with k = 1 (Switch Transformer)

    The softmax may have the argmax of the logits: where two are as large to rounding, either is right.
    """

    scoring: str = "softmax"

    @property
    def name(self) -> str:
        return f"route_top1_{self.scoring}"

    def pattern(self, p: Any, logits: Any) -> Any:
        scores = p.shared(_scored(p, logits, self.scoring))
        best = p.amax(scores, axes=(-1,), keepdim=p.attr("keep_weight"))
        among = p.either(scores, p.bind("raw", logits)) if self.scoring == "softmax" else scores
        return best, p.argmax(among, axis=-1, keepdim=p.attr("keep_index"))

    def when(self, m: Match) -> Refused | None:
        if m.get("raw") is not None and m.logits.dtype.bits < 32:
            return m.no(f"softmax in {m.logits.dtype} may make different logits equal", at=m.logits)
        return _why_not(m)

    def replace(self, b: Any, m: Match) -> Any:
        both = _route(b, m, m.logits, k=1, scoring=self.scoring, normalize=False)
        return tuple(v if v.type == r.type else b.reshape(v, shape=r.shape) for v, r in zip(both, m.roots, strict=True))


SELECTION_RULES: tuple[Rewrite, ...] = (
    *(RouteGathered(s) for s in _SCORES),
    *(RouteTopK(s) for s in _SCORES),
    *(RouteTop1(s) for s in _SCORES),
    *(RouteOverTopK(s) for s in ("softmax", "sigmoid")),
    *(RouteScattered(s) for s in ("softmax", "sigmoid")),
)
