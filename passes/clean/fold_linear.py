"""Factors folded into the weights of linear layers. Opt-in: what is folded is held in memory, where a stored weight may
be mapped from its file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from moec.ir import CompileError, DType, Value, Weight
from moec.passes.rewrite import Match, Refused, Rewrite, RuleSet


def _why_not_stored(m: Match, *names: str) -> Refused | None:
    """Refuses weights that are computed, or that others read too: both would keep their first form beside the new."""
    for name in names:
        value = m.get(name)
        if value is None:
            continue
        if value.weight is None:
            return m.no(f"{name} is computed, not stored", at=value)
        if len(value.uses) > 1:
            return m.no(f"{name} @{value.weight.name} has other uses", at=value)
    return None


def _why_not_exact(m: Match, factor: float) -> Refused | None:
    """Refuses a factor that would round every weight: any in narrow floats but powers of two."""
    if not math.isfinite(factor) or factor == 0:
        return m.no(f"the factor is {factor}")
    if m.w.dtype not in (DType.F32, DType.F64) and math.frexp(abs(factor))[0] != 0.5:
        return m.no(f"{m.w.dtype} weights would be rounded by the factor {factor}", at=m.w)
    return None


def _scaled(b: Any, value: Value | None, factor: float) -> Value | None:
    if value is None or value.weight is None:
        return None
    weight = value.weight
    return b.weight(f"{weight.name}.scaled", lambda: _product(weight, factor, f"{factor:.6g}"), weight.type)


def _product(weight: Weight, factor: torch.Tensor | float, what: str) -> torch.Tensor:
    """Raises CompileError where a product of finite numbers is none."""
    data = weight.load()
    product = data * factor
    lost = ~product.isfinite() & data.isfinite() & torch.as_tensor(factor).isfinite()
    if bool(lost.any()):
        raise CompileError(
            f"weight {weight.name!r} times {what} overflows {weight.type.dtype} in {int(lost.sum())} elements: "
            f"{float(data[lost][0])} is the first",
            code="weight",
            hint="leave the pass that folds factors into weights out",
        )
    return product


@dataclass(frozen=True)
class FoldScale(Rewrite):
    """linear(x, w, bias) · c or / c → linear(x, w · c, bias · c)"""

    def pattern(self, p: Any, x: Any, w: Any) -> Any:
        y = p.linear_linear(x, w, p.optional("bias"))
        return p.either(p.mul(y, p.const("factor")), p.div(y, p.const("divisor")))

    @staticmethod
    def _factor(m: Match) -> float:
        return float(m.factor) if m.get("factor") is not None else 1 / float(m.divisor) if m.divisor else math.nan

    def when(self, m: Match) -> Refused | None:
        return _why_not_stored(m, "w", "bias") or _why_not_exact(m, self._factor(m))

    def replace(self, b: Any, m: Match) -> Any:
        return b.linear_linear(m.x, *(_scaled(b, v, self._factor(m)) for v in (m.w, m.bias)))


@dataclass(frozen=True)
class FoldInputScale(Rewrite):
    """linear(x · c, w, bias) → linear(x, w · c, bias)"""

    def pattern(self, p: Any, x: Any, w: Any) -> Any:
        return p.linear_linear(p.mul(x, p.const("factor")), w, p.optional("bias"))

    def when(self, m: Match) -> Refused | None:
        return _why_not_stored(m, "w") or _why_not_exact(m, float(m.factor))

    def replace(self, b: Any, m: Match) -> Any:
        return b.linear_linear(m.x, _scaled(b, m.w, float(m.factor)), m.bias)


@dataclass(frozen=True)
class FoldScales(RuleSet):
    """Constant factors into the weights of linear layers."""

    rules: tuple[Rewrite, ...] = (FoldScale(), FoldInputScale())


@dataclass(frozen=True)
class FoldNormWeight(Rewrite):
    """linear(rms(x, weight), w) → linear(rms(x), w · weight), where all that use the norm are linear layers

    Without the weight the norm is the same for all of them. In narrow floats the products of weights would be rounded.
    """

    def pattern(self, p: Any, x: Any, weight: Any, w: Any) -> Any:
        normed = p.bind("normed", p.shared(p.rms(x, weight, eps=p.attr("eps"))))
        return p.linear_linear(normed, w, p.optional("bias"))

    def when(self, m: Match) -> Refused | None:
        if m.w.dtype not in (DType.F32, DType.F64):
            return m.no(f"{m.w.dtype} weights would be rounded by the norm's", at=m.w)
        if m.weight.weight is None:
            return m.no("the norm's weight is computed, not stored", at=m.weight)
        if m.normed.is_output or any(u.op != "linear.linear" or i != 0 for u, i in m.normed.uses):
            return m.no("the norm has other users than linear layers", at=m.normed)
        others = [u.operand("weight") for u in m.normed.users]
        if any(v.weight is None or len(v.uses) > 1 for v in others):
            return m.no("a linear layer behind the norm has a weight that is computed or has other uses", at=m.normed)
        return None

    def replace(self, b: Any, m: Match) -> Any:
        scale, weight = m.weight.weight, m.w.weight

        def compute() -> torch.Tensor:
            return _product(weight, scale.load(), f"the norm's weight {scale.name!r}")

        scaled = b.weight(f"{weight.name}.normed", compute, weight.type)
        return b.linear_linear(b.rms(m.x, eps=m.eps), scaled, m.bias)
