"""What follows a `moe.route` and belongs to it: normalisation and scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.passes.moe.raise_route import SELECTION_RULES
from moec.passes.moe.structure import with_number
from moec.passes.rewrite import Match, Refused, Rewrite

_ROUTE_ATTRS = (
    "k", "scoring", "normalize", "normalize_eps", "normalize_min", "scale", "n_group", "topk_group", "group_score",
    "masked_score",
)  # fmt: skip


def _route(p: Any, **fixed: Any) -> Any:
    """A route whose other attributes are captured under their names."""
    attrs = {a: fixed.get(a, p.attr(a)) for a in _ROUTE_ATTRS}
    return p.route(p.any("logits"), p.optional("bias"), **attrs)


def _shaped(p: Any, weights: Any) -> Any:
    """The weights [T, k] of a route, perhaps with the axes that tokens have in the model."""
    return p.maybe(lambda v: p.reshape(v, shape=p.attr("shaped")), weights)


def _why_not_shaped(m: Match) -> Refused | None:
    """Refuses weights in a shape that is not [..., k]."""
    shape = m.get("shaped")
    if shape is not None and (not shape or shape[-1] != m.k):
        return m.no(f"the weights of {m.k} chosen experts are read as {list(shape)}")
    return None


def _again(b: Any, m: Match, **changed: Any) -> Any:
    """The matched route with some attributes changed."""
    attrs = {a: m.get(a) for a in _ROUTE_ATTRS if m.get(a) is not None}
    weights, experts = b.route(m.logits, m.bias, **{**attrs, **changed})
    return weights if weights.type == m.root.type else b.reshape(weights, shape=m.root.shape), experts


@dataclass(frozen=True)
class RouteNormalize(Rewrite):
    """weights / total → route with normalize; total is sum(weights), sum(|weights|) (they are not negative), either
    with + eps or clamped from below"""

    def pattern(self, p: Any) -> Any:
        weights, experts = _route(p, normalize=False, scale=1.0, normalize_eps=0.0, normalize_min=0.0)
        weights = _shaped(p, weights)
        total = p.sum(p.maybe(p.abs, weights), axes=(-1,), keepdim=True)
        total = p.maybe(lambda v: with_number(p, "math.add", v, "eps"), total)
        return p.div(weights, p.maybe(lambda v: p.clamp(v, low=p.attr("least"), high=None), total)), experts

    def when(self, m: Match) -> Refused | None:
        eps, least = m.get("eps", 0.0), m.get("least", 0.0)
        if eps < 0 or least < 0:
            return m.no(f"the sum of the weights is changed by {eps}, at least {least}")
        if m.scoring == "topk_softmax" and (eps or least > 1):
            return m.no("weights that add up to 1 are divided by something else")
        return _why_not_shaped(m)

    def replace(self, b: Any, m: Match) -> Any:
        if m.scoring == "topk_softmax":
            return _again(b, m, normalize=False, scale=1.0)
        eps, least = float(m.get("eps", 0.0)), float(m.get("least", 0.0))
        return _again(b, m, normalize=True, scale=1.0, normalize_eps=eps, normalize_min=least)


@dataclass(frozen=True)
class RouteScale(Rewrite):
    """weights · constant or weights / constant → route with scale

    `wide`: as torch scales narrow floats, in f32 and rounded afterwards.
    """

    divided: bool = False
    wide: bool = False

    @property
    def name(self) -> str:
        return f"route_{'divided' if self.divided else 'scale'}{'_wide' if self.wide else ''}"

    def pattern(self, p: Any) -> Any:
        weights, experts = _route(p)
        weights = _shaped(p, weights)
        op = p.div if self.divided else p.mul
        if self.wide:
            return p.cast(op(p.cast(weights, dtype="f32"), p.const("factor")), dtype=p.attr("dtype")), experts
        return op(weights, p.const("factor")), experts

    def when(self, m: Match) -> Refused | None:
        if self.wide and m.dtype != m.logits.dtype:
            return m.no(f"the weights of {m.logits.dtype} logits become {m.dtype}", at=m.logits)
        return m.no("the weights are divided by 0") if self.divided and m.factor == 0 else _why_not_shaped(m)

    def replace(self, b: Any, m: Match) -> Any:
        return _again(b, m, scale=m.scale / float(m.factor) if self.divided else m.scale * float(m.factor))


ROUTE_RULES: tuple[Rewrite, ...] = (
    *SELECTION_RULES,
    RouteNormalize(),
    *(RouteScale(divided, wide) for divided in (False, True) for wide in (False, True)),
)
