"""Transposes of heads and sequence, [B, S, H, D] → [B, H, S, D], below the ops that leave rows to themselves.

For backends whose attention takes heads next to their channels: the transposes end there and nothing is moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.passes.rewrite import Match, Refused, Rewrite, RuleSet

PERM = (0, 2, 1, 3)


def _transposed(p: Any, x: Any) -> Any:
    return p.transpose(x, perm=PERM)


@dataclass(frozen=True)
class SinkBelowSplit(Rewrite):
    """split(transpose(x)) along channels → transposes of split(x)"""

    parts: int = 2

    @property
    def name(self) -> str:
        return f"sink_below_split_{self.parts}"

    def pattern(self, p: Any, x: Any) -> Any:
        return p.split(_transposed(p, x), axis=p.attr("axis"), sizes=p.attr("sizes"), results=self.parts)

    def when(self, m: Match) -> Refused | None:
        return None if m.axis in (-1, 3) else m.no(f"it splits axis {m.axis}, not the channels")

    def replace(self, b: Any, m: Match) -> Any:
        return tuple(b.transpose(part, perm=PERM) for part in b.split(m.x, axis=-1, sizes=m.sizes))


@dataclass(frozen=True)
class SinkBelowNorm(Rewrite):
    """rms(transpose(x), w) → transpose(rms(x, w))"""

    def pattern(self, p: Any, x: Any) -> Any:
        return p.norm_rms(_transposed(p, x), p.optional("w"), eps=p.attr("eps"))

    def replace(self, b: Any, m: Match) -> Any:
        return b.transpose(b.norm_rms(m.x, m.w, eps=m.eps), perm=PERM)


@dataclass(frozen=True)
class SinkBelowRoPE(Rewrite):
    """rope(transpose(x), cos, sin) of angles that all heads share → transpose(rope(x, cos', sin'))"""

    def pattern(self, p: Any, x: Any, cos: Any, sin: Any) -> Any:
        attrs = {"interleaved": p.attr("interleaved"), "deinterleave": p.attr("deinterleave")}
        return p.rope_apply(_transposed(p, x), cos, sin, **attrs)

    def when(self, m: Match) -> Refused | None:
        heads = m.cos.shape[-3] if m.cos.type.rank >= 3 else 1
        return None if heads == 1 else m.no(f"angles {m.cos.type} differ from head to head", at=m.cos)

    def replace(self, b: Any, m: Match) -> Any:
        *lead, length, half = m.cos.shape
        shape = (*lead[:-1], length, 1, half)
        tables = [b.reshape(t, shape=shape) for t in (m.cos, m.sin)]
        y = b.rope_apply(m.x, *tables, interleaved=m.interleaved, deinterleave=m.deinterleave)
        return b.transpose(y, perm=PERM)


@dataclass(frozen=True)
class SinkBelowConcat(Rewrite):
    """concat(transpose(x), transpose(y)) along channels → transpose(concat(x, y))"""

    def pattern(self, p: Any, x: Any, y: Any) -> Any:
        return p.concat(_transposed(p, x), _transposed(p, y), axis=p.attr("axis"))

    def when(self, m: Match) -> Refused | None:
        return None if m.axis in (-1, 3) else m.no(f"it joins axis {m.axis}, not the channels")

    def replace(self, b: Any, m: Match) -> Any:
        return b.transpose(b.concat(m.x, m.y, axis=-1), perm=PERM)


@dataclass(frozen=True)
class SinkBesideShared(Rewrite):
    """concat(transpose(x), expand(y)) along channels, y [B, 1, S, D] → transpose(concat(x, expand(y')))"""

    def pattern(self, p: Any, x: Any, y: Any) -> Any:
        return p.concat(_transposed(p, x), p.expand(y, shape=p.attr("shape")), axis=p.attr("axis"))

    def when(self, m: Match) -> Refused | None:
        if m.axis not in (-1, 3):
            return m.no(f"it joins axis {m.axis}, not the channels")
        one = m.y.type.rank == 4 and m.y.shape[1] == 1
        return None if one else m.no(f"{m.y.type} is not one head for all", at=m.y)

    def replace(self, b: Any, m: Match) -> Any:
        rows, _, length, width = m.y.shape
        batch, heads, spread, _ = m.shape
        y = b.reshape(m.y, shape=(rows, length, 1, width))
        return b.transpose(b.concat(m.x, b.expand(y, shape=(batch, spread, heads, width)), axis=-1), perm=PERM)


@dataclass(frozen=True)
class MeetTransposes(Rewrite):
    """transpose(transpose(x)) → x"""

    def pattern(self, p: Any, x: Any) -> Any:
        return _transposed(p, _transposed(p, x))

    def replace(self, b: Any, m: Match) -> Any:
        return m.x


@dataclass(frozen=True)
class SinkTransposes(RuleSet):
    """Transposes of heads and sequence, down to attention. Not part of the default pipeline: elsewhere they are as
    good above."""

    rules: tuple[Rewrite, ...] = (
        SinkBelowSplit(2), SinkBelowSplit(3), SinkBelowNorm(), SinkBelowRoPE(), SinkBelowConcat(), SinkBesideShared(),
        MeetTransposes(),
    )  # fmt: skip
