"""Attention: the eager form to `attention.sdpa`, head sharing, scales, and what masks prove."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.ir import DType, Value
from moec.passes.clean.canonicalise import TransposeOfTranspose
from moec.passes.fuse.fuse_mask import (
    MASK_RULES,
    allowed_where,
    attention,
    attention_again,
    fits,
    keeps_own_key,
    lowest,
)
from moec.passes.rewrite import Match, Refused, Rewrite, RuleSet


def _repeated(m: Match, x: Value, expanded: tuple, flat: Value) -> str | None:
    """Why expand + reshape is not repeat_interleave over axis 1 of x [B, Hkv, T, D]; None where it is."""
    b, h, t, d = x.shape
    if len(expanded) != 5 or (expanded[0], expanded[1], expanded[3], expanded[4]) != (b, h, t, d):
        return f"expand to {list(expanded)} does not repeat the heads of {x.type}"
    return None if flat.shape == (b, h * expanded[2], t, d) else f"{flat.type} are not the repeated heads"


@dataclass(frozen=True)
class SharedHeads(Rewrite):
    """sdpa(q, repeat(k), repeat(v)) → sdpa(q, k, v): grouped queries share heads by themselves"""

    def pattern(self, p: Any, q: Any, k: Any, v: Any) -> Any:
        k_all = p.reshape(p.expand(p.reshape(k, shape=p.attr("k5")), shape=p.attr("k_rep")), shape=p.attr())
        v_all = p.reshape(p.expand(p.reshape(v, shape=p.attr("v5")), shape=p.attr("v_rep")), shape=p.attr())
        return p.sdpa(
            q, p.bind("k_all", p.shared(k_all)), p.bind("v_all", p.shared(v_all)), p.optional("mask"),
            p.optional("sinks"), scale=p.attr("scale"), causal=p.attr("causal"), softcap=p.attr("softcap"),
        )  # fmt: skip

    def when(self, m: Match) -> Refused | None:
        for x, five, rep, flat in ((m.k, m.k5, m.k_rep, m.k_all), (m.v, m.v5, m.v_rep, m.v_all)):
            if five != (*x.shape[:2], 1, *x.shape[2:]):
                return m.no(f"reshape to {list(five)} adds no repeat axis", at=x)
            reason = _repeated(m, x, rep, flat)
            if reason:
                return m.no(reason, at=x)
        return None

    def replace(self, b: Any, m: Match) -> Any:
        return attention_again(b, m)


@dataclass(frozen=True)
class SoftmaxShift(Rewrite):
    """softmax(x − amax(x)) → softmax(x), which takes its largest element off by itself"""

    def pattern(self, p: Any, x: Any) -> Any:
        return p.softmax(p.sub(x, p.amax(x, axes=(-1,), keepdim=True)), axis=-1)

    def replace(self, b: Any, m: Match) -> Any:
        return b.softmax(m.x, axis=-1)


@dataclass(frozen=True)
class EagerAttention(Rewrite):
    """softmax(cap · tanh(q kᵀ · scale / cap) + mask) v → sdpa(q, k, v, mask), with or without scale, cap and mask; the
    scale may divide, the mask may choose by `where`, the softmax may run in f32. `sunk`: with a column of sinks that
    is cut off after the softmax."""

    sunk: bool = False

    @property
    def name(self) -> str:
        return "eager_attention_sinks" if self.sunk else "eager_attention"

    def pattern(self, p: Any, q: Any, keys: Any, v: Any) -> Any:
        raw = p.matmul(q, keys)
        scores = p.either(p.mul(raw, p.const("scale")), p.div(raw, p.const("divisor")), raw)
        inner = p.either(p.div(scores, p.const("softcap")), p.mul(scores, p.const("inverse_cap")))
        scores = p.either(p.mul(p.tanh(inner), p.const("cap")), scores)
        masked = p.either(_masked(p, p.either(_masked(p, scores, "inner_"), scores), ""), scores)
        wide = p.maybe(lambda s: p.cast(s, dtype=p.attr("wide")), masked)
        if self.sunk:
            wide = p.concat(wide, p.bind("column", p.expand(p.any("sinks"), shape=p.attr())), axis=-1)
        weights = p.maybe(lambda w: p.cast(w, dtype=p.attr("narrow")), p.softmax(wide, axis=-1))
        if self.sunk:
            weights = p.slice(weights, axis=-1, start=0, end=p.attr("end"))
        return p.matmul(p.maybe(lambda w: p.cast(w, dtype=p.attr("narrow_later")), weights), v)

    def when(self, m: Match) -> Refused | None:
        q, keys, v = m.q, m.keys, m.v
        if not (q.type.rank == keys.type.rank == v.type.rank == 4):
            return m.no(f"q {q.type}, kᵀ {keys.type} and v {v.type} must have rank 4", at=q)
        if q.shape[:2] != keys.shape[:2] or v.shape[:2] != keys.shape[:2] or not isinstance(q.shape[1], int):
            return m.no(f"q {q.type}, kᵀ {keys.type} and v {v.type} broadcast", at=keys)
        if v.shape[2] != keys.shape[3] or not q.dtype == keys.dtype == v.dtype:
            return m.no(f"v {v.type} are not the values of the keys {keys.type}", at=v)
        wide = m.get("wide")
        if wide is not None and wide not in (DType.F32, DType.F64, q.dtype):
            return m.no(f"the softmax runs in {wide}", at=q)
        if m.get("softcap", 1.0) <= 0 or (m.get("cap") is not None and not _same_cap(m)):
            return m.no("the factors around tanh are not each other's inverse", at=q)
        return self._check_mask(m) or (self._check_sinks(m) if self.sunk else None)

    @staticmethod
    def _check_mask(m: Match) -> Refused | None:
        scores = (*m.q.shape[:3], m.keys.shape[3])
        for name in ("mask", "keep", "drop"):
            for v in (m.get(name), m.get(f"inner_{name}")):
                if v is not None and not fits(v, scores):
                    return m.no(f"mask {v.type} does not broadcast to the scores {list(scores)}", at=v)
        for each in ("", "inner_"):
            mask, low = m.get(f"{each}mask"), m.get(f"{each}low")
            if mask is not None and mask.dtype != m.q.dtype:
                return m.no(f"mask {mask.type} cannot be added in attention", at=mask)
            choice = m.get(f"{each}keep") or m.get(f"{each}drop")
            if low is not None and not lowest(low, m.q):
                return m.no(f"the mask writes {low}, which is not the lowest number", at=choice)
            if low is not None and m.q.dtype == "f16" and not _never_empty(m, each):
                return m.no(
                    "a query may be allowed no key at all, and f16 scores count beside the lowest number", at=choice
                )
        masks = [m.get(f"{each}mask") for each in ("", "inner_") if m.get(f"{each}mask") is not None]
        lows = [m.get(f"{each}low") for each in ("", "inner_") if m.get(f"{each}low") is not None]
        if len({*lows, *([float("-inf")] if masks and lows else [])}) > 1:
            return m.no(f"one mask writes {max(lows)}, which is not what the other one writes or adds to")
        return None

    @staticmethod
    def _check_sinks(m: Match) -> Refused | None:
        heads = m.q.shape[1]
        if m.sinks.shape not in ((1, heads, 1, 1), (heads, 1, 1)):
            return m.no(f"sinks {m.sinks.type} are not one number per head", at=m.sinks)
        if m.column.shape[-1] != 1 or m.end != m.keys.shape[3]:
            return m.no(f"what is cut off after the softmax is not the sinks' column {m.column.type}", at=m.column)
        return m.no(f"sinks {m.sinks.type} with q {m.q.type}", at=m.sinks) if m.sinks.dtype != m.q.dtype else None

    def replace(self, b: Any, m: Match) -> Any:
        scale = float(m.get("scale", 1.0)) / float(m.get("divisor", 1.0))
        masks = [m.get(f"{each}mask") for each in ("inner_", "") if m.get(f"{each}mask") is not None]
        chosen = [each for each in ("inner_", "") if m.get(f"{each}low") is not None]
        if chosen:
            allowed = self._allowed(b, m, chosen)
            if masks or not all(_never_empty(m, each) for each in chosen) or len(chosen) > 1:
                zero, low = b.const(0.0, m.q.dtype), b.const(m.get(f"{chosen[0]}low"), m.q.dtype)
                allowed = b.where(allowed, zero, low)
            masks.append(allowed)
        mask = masks[0] if len(masks) == 1 else b.add(*masks) if masks else None
        k = b.transpose(m.keys, perm=(0, 1, 3, 2))
        cap = m.get("cap")
        sinks = b.reshape(m.sinks, shape=m.q.shape[1:2]) if self.sunk else None
        return b.sdpa(m.q, k, m.v, mask, sinks, scale=scale, softcap=None if cap is None else float(cap))

    @staticmethod
    def _allowed(b: Any, m: Match, chosen: list[str]) -> Value:
        """Where all conditions of the masks that choose let attend."""
        both = [m.get(f"{each}keep") or b.not_(m.get(f"{each}drop")) for each in chosen]
        allowed: Value = both[0] if len(both) == 1 else b.and_(*both)
        return allowed


def _masked(p: Any, scores: Any, name: str) -> Any:
    """Scores with a mask, added or chosen by, captured under names that begin with `name`."""
    keep, drop, low = p.any(f"{name}keep"), p.any(f"{name}drop"), p.const(f"{name}low")
    return p.either(
        p.add(scores, p.any(f"{name}mask")),
        p.where(keep, scores, low),
        p.where(p.not_(keep), low, scores),
        p.where(drop, low, scores),
    )


def _same_cap(m: Match) -> bool:
    """tanh(x / cap) · cap, the division maybe a product with the inverse."""
    inner = m.get("softcap") or 1.0 / m.inverse_cap
    return m.cap > 0 and abs(inner - m.cap) <= 1e-5 * m.cap


def _never_empty(m: Match, name: str) -> bool:
    keep = m.get(f"{name}keep")
    return keep is not None and keeps_own_key(allowed_where(keep), m.q.shape[2], m.keys.shape[3])


@dataclass(frozen=True)
class ScaledOperand(Rewrite):
    """sdpa(q · c, k, v) or sdpa(q, k · c, v), c a number → sdpa(q, k, v) with scale · c"""

    side: str = "q"
    divides: bool = False

    @property
    def name(self) -> str:
        return f"scaled_{self.side}{'_divided' if self.divides else ''}"

    def pattern(self, p: Any, x: Any) -> Any:
        factor = p.const("factor")
        scaled = p.bind("scaled", p.shared(p.div(x, factor) if self.divides else p.mul(x, factor)))
        if self.side == "q":
            return attention(p, p.optional("mask"), q=scaled)
        return attention(p, p.optional("mask"), k=scaled)

    def when(self, m: Match) -> Refused | None:
        return m.no(f"{m.scaled.type} broadcasts {m.x.type}", at=m.x) if m.x.type != m.scaled.type else None

    def replace(self, b: Any, m: Match) -> Any:
        scale = m.scale / m.factor if self.divides else m.scale * m.factor
        return attention_again(b, m, **{self.side: m.x}, scale=scale)


@dataclass(frozen=True)
class FuseAttention(RuleSet):
    """Attention however it is written, to `attention.sdpa` with as little mask as there has to be."""

    rules: tuple[Rewrite, ...] = (
        SoftmaxShift(),
        EagerAttention(),
        EagerAttention(sunk=True),
        TransposeOfTranspose(),
        SharedHeads(),
        *(ScaledOperand(side, divides) for side in ("q", "k") for divides in (False, True)),
        *MASK_RULES,
    )
