"""Routers to `moe.route`: a selection rule per form, then normalisation, scale and casts are folded in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.ir import Value
from moec.passes.rewrite import Match, Refused, Rewrite
from moec.passes.structure import is_filled

_ROUTE_ATTRS = (
    "k", "scoring", "normalize", "normalize_eps", "scale", "n_group", "topk_group", "group_score", "masked_score",
)  # fmt: skip


def _route(p: Any, **fixed: Any) -> Any:
    """A route whose other attributes are captured under their names."""
    attrs = {a: fixed.get(a, p.attr(a)) for a in _ROUTE_ATTRS}
    return p.route(p.any("logits"), p.optional("bias"), **attrs)


def _again(b: Any, m: Match, **changed: Any) -> Any:
    """The matched route with some attributes changed."""
    attrs = {a: m.get(a) for a in _ROUTE_ATTRS if m.get(a) is not None}
    return b.route(m.logits, m.bias, **{**attrs, **changed})


def _flat_route(b: Any, m: Match, bias: Value | None = None, **attrs: Any) -> Any:
    """Route over [T, E]; logits of more axes are flattened and the results shaped back."""
    logits, k = m.logits, attrs["k"]
    lead = logits.shape[:-1]
    if len(lead) == 1:
        return b.route(logits, bias, **attrs)
    tokens: Any = 1
    for s in lead:
        tokens = tokens * s
    weights, experts = b.route(b.reshape(logits, shape=(tokens, logits.shape[-1])), bias, **attrs)
    return b.reshape(weights, shape=(*lead, k)), b.reshape(experts, shape=(*lead, k))


def _check_logits(m: Match, bias: Value | None = None) -> Refused | None:
    e = m.logits.shape[-1]
    if not isinstance(e, int) or m.logits.type.rank < 2:
        return m.no(f"logits {m.logits.type} are not [tokens, experts]", at=m.logits)
    if bias is not None and bias.shape != (e,):
        return m.no(f"{bias.type} is no bias for {e} experts", at=bias)
    return None


@dataclass(frozen=True)
class RouteTopK(Rewrite):
    """topk(softmax(logits)) or topk(sigmoid(logits)) → route without normalisation"""

    scoring: str = "softmax"

    @property
    def name(self) -> str:
        return f"route_topk_{self.scoring}"

    def pattern(self, p: Any, logits: Any) -> Any:
        scores = p.softmax(logits, axis=-1) if self.scoring == "softmax" else p.sigmoid(logits)
        return p.topk(p.shared(scores), k=p.attr("k"), axis=-1)

    def when(self, m: Match) -> Refused | None:
        if not m.roots[0].uses:
            return m.no("only the indices are used; the weights may be gathered")
        return _check_logits(m)

    def replace(self, b: Any, m: Match) -> Any:
        return _flat_route(b, m, k=m.k, scoring=self.scoring, normalize=False)


@dataclass(frozen=True)
class RouteGathered(Rewrite):
    """experts = topk(choice), weights = gather(scores, experts), the choice being the scores, the scores
    with a bias, or either limited to the best groups → route without normalisation"""

    scoring: str = "sigmoid"
    biased: bool = True
    groups: str | None = None  # None, "top2_sum" or "max"

    @property
    def name(self) -> str:
        parts = ["route", self.scoring, "biased" if self.biased else "", self.groups or ""]
        return "_".join(x for x in parts if x)

    def pattern(self, p: Any, logits: Any) -> Any:
        scores = p.shared(p.softmax(logits, axis=-1) if self.scoring == "softmax" else p.sigmoid(logits))
        choice = p.shared(p.add(scores, p.any("bias"))) if self.biased else scores
        if self.groups is not None:
            choice = self._limited(p, choice)
        _, experts = p.topk(choice, k=p.attr("k"), axis=-1)
        return p.gather_elements(scores, experts, axis=-1), experts

    def _limited(self, p: Any, choice: Any) -> Any:
        """Scores outside the best groups masked: per group on [T, G, E/G], or flat on [T, E]."""
        grouped = p.shared(p.reshape(choice, shape=p.attr("grouped")))
        if self.groups == "max":
            group = p.amax(grouped, axes=(-1,))
        else:
            best, _ = p.topk(grouped, k=2, axis=-1)
            group = p.sum(best, axes=(-1,))
        _, chosen = p.topk(group, k=p.attr("topk_group"), axis=-1)
        keep = p.scatter_elements(p.any("zeros"), chosen, p.any("ones"), axis=-1)
        keep = p.reshape(keep, shape=p.attr())
        spread = p.maybe(lambda v: p.expand(v, shape=p.attr()), keep)
        keep_flat = p.reshape(p.maybe(lambda v: p.cast(v, dtype="bool"), spread), shape=p.attr())
        masked_flat = p.where(p.not_(keep_flat), p.const("masked_score"), choice)
        masked_grouped = p.reshape(p.where(p.not_(keep), p.const("masked_score"), grouped), shape=p.attr())
        return p.either(masked_flat, masked_grouped)

    def when(self, m: Match) -> Refused | None:
        if self.groups is not None:
            if m.logits.type.rank != 2 or len(m.grouped) != 3 or m.grouped[0] != m.logits.shape[0]:
                return m.no(f"groups {m.grouped} of logits {m.logits.type}", at=m.logits)
            for name, want in (("zeros", 0), ("ones", 1)):
                value = m.get(name)
                if value is not None and not is_filled(value, want):
                    return m.no(f"the group mask is not built from {want}s", at=value)
        return _check_logits(m, m.get("bias"))

    def replace(self, b: Any, m: Match) -> Any:
        attrs: dict[str, Any] = {"k": m.k, "scoring": self.scoring, "normalize": False}
        if self.groups is not None:
            attrs |= {
                "n_group": m.grouped[1],
                "topk_group": m.topk_group,
                "group_score": self.groups,
                "masked_score": float(m.masked_score),
            }
        return _flat_route(b, m, m.get("bias"), **attrs)


@dataclass(frozen=True)
class RouteOverTopK(Rewrite):
    """softmax over the k chosen logits → route with topk_softmax"""

    def pattern(self, p: Any, logits: Any) -> Any:
        values, experts = p.topk(logits, k=p.attr("k"), axis=-1)
        return p.softmax(values, axis=-1), experts

    def when(self, m: Match) -> Refused | None:
        return _check_logits(m)

    def replace(self, b: Any, m: Match) -> Any:
        return _flat_route(b, m, k=m.k, scoring="topk_softmax", normalize=False)


@dataclass(frozen=True)
class RouteNormalize(Rewrite):
    """weights / (sum(weights) + eps) → route with normalize"""

    eps: bool = False

    @property
    def name(self) -> str:
        return "route_normalize_eps" if self.eps else "route_normalize"

    def pattern(self, p: Any) -> Any:
        weights, experts = _route(p, normalize=False, scale=1.0)
        total = p.sum(weights, axes=(-1,), keepdim=True)
        return p.div(weights, p.add(total, p.const("eps")) if self.eps else total), experts

    def replace(self, b: Any, m: Match) -> Any:
        return _again(b, m, normalize=True, scale=1.0, normalize_eps=float(m.get("eps") or 0.0))


@dataclass(frozen=True)
class RouteScale(Rewrite):
    """weights · constant → route with scale"""

    def pattern(self, p: Any) -> Any:
        weights, experts = _route(p)
        return p.mul(weights, p.const("factor")), experts

    def replace(self, b: Any, m: Match) -> Any:
        return _again(b, m, scale=m.scale * float(m.factor))


ROUTE_RULES: tuple[Rewrite, ...] = (
    *(RouteGathered(s, b, g) for s in ("sigmoid", "softmax") for b in (True, False) for g in ("top2_sum", "max", None)),
    RouteTopK("softmax"),
    RouteTopK("sigmoid"),
    RouteOverTopK(),
    RouteNormalize(False),
    RouteNormalize(True),
    RouteScale(),
)
