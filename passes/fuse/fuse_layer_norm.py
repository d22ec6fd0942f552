"""LayerNorm as models write it out, to `norm.layer`: in f32 or with casts, with or without weight and bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.ir import Value
from moec.passes.rewrite import Match, Refused, Rewrite


@dataclass(frozen=True)
class LayerNormCore(Rewrite):
    """(x − mean(x)) · rsqrt(mean((x − mean(x))²) + eps) → layer(x)

    mean(x²) − mean(x)² stands for the same variance; in f32 it loses digits where the mean is large, which `norm.layer`
    keeps, and in narrower floats little else is left of it, so that there is nothing to agree with.
    """

    def pattern(self, p: Any, x: Any) -> Any:
        mean = p.mean(x, axes=(-1,), keepdim=True)
        centred = p.sub(x, mean)
        squares = p.mean(p.mul(centred, centred), axes=(-1,), keepdim=True)
        difference = p.sub(p.mean(p.bind("squared", p.mul(x, x)), axes=(-1,), keepdim=True), p.mul(mean, mean))
        return p.mul(centred, p.rsqrt(p.add(p.either(squares, difference), p.const("eps"))))

    def when(self, m: Match) -> Refused | None:
        if m.get("squared") is not None and m.x.dtype not in ("f32", "f64"):
            return m.no(f"the variance as a difference of means in {m.x.dtype}", at=m.x)
        return None

    def replace(self, b: Any, m: Match) -> Any:
        return b.layer(m.x, eps=m.eps)


def _vector(m: Match, name: str, x: Value) -> Refused | None:
    """Refuses what is not one number per channel: [d] or [1, …, 1, d]."""
    value = m.get(name)
    d = x.shape[-1]
    if value.shape[-1:] != (d,) or any(s != 1 for s in value.shape[:-1]) or value.type.rank > x.type.rank:
        return m.no(f"{name} {value.type} is not one number per channel of {x.type}", at=value)
    return None


def _flat(b: Any, v: Value) -> Value:
    return v if v.type.rank == 1 else b.reshape(v, shape=v.shape[-1:])


@dataclass(frozen=True)
class LayerNormWeight(Rewrite):
    """layer(x) · weight → layer(x, weight)"""

    def pattern(self, p: Any, x: Any, weight: Any) -> Any:
        return p.mul(p.layer(x, None, None, eps=p.attr("eps")), weight)

    def when(self, m: Match) -> Refused | None:
        return _vector(m, "weight", m.x)

    def replace(self, b: Any, m: Match) -> Any:
        return b.layer(m.x, _flat(b, m.weight), eps=m.eps)


@dataclass(frozen=True)
class LayerNormBias(Rewrite):
    """layer(x, weight) + bias → layer(x, weight, bias)"""

    def pattern(self, p: Any, x: Any, bias: Any) -> Any:
        return p.add(p.layer(x, p.optional("weight"), None, eps=p.attr("eps")), bias)

    def when(self, m: Match) -> Refused | None:
        return _vector(m, "bias", m.x)

    def replace(self, b: Any, m: Match) -> Any:
        return b.layer(m.x, m.weight, _flat(b, m.bias), eps=m.eps)


@dataclass(frozen=True)
class LayerNormCast(Rewrite):
    """cast(layer(cast(x, f32), cast(weight, f32), cast(bias, f32)), dtype of x) → layer(x, weight, bias), which
    computes in f32 and rounds once"""

    def pattern(self, p: Any, x: Any) -> Any:
        def widened(name: str) -> Any:
            return p.either(None, p.cast(p.any(name), dtype="f32"))

        inner = p.layer(p.cast(x, dtype="f32"), widened("weight"), widened("bias"), eps=p.attr("eps"))
        return p.cast(inner, dtype=p.attr("dtype"))

    def when(self, m: Match) -> Refused | None:
        if m.dtype != m.x.dtype or m.x.dtype not in ("bf16", "f16"):
            return m.no(f"x is {m.x.dtype}, the result {m.dtype}", at=m.x)
        for name in ("weight", "bias"):
            if m.get(name) is not None and m.get(name).dtype != m.x.dtype:
                return m.no(f"{name} is {m.get(name).dtype}, x {m.x.dtype}", at=m.get(name))
        return None

    def replace(self, b: Any, m: Match) -> Any:
        return b.layer(m.x, m.get("weight"), m.get("bias"), eps=m.eps)


LAYER_NORM_RULES: tuple[Rewrite, ...] = (LayerNormCore(), LayerNormWeight(), LayerNormBias(), LayerNormCast())
