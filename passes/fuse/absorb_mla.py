"""Multi-head latent attention for few queries: attention over the latents themselves.

DeepSeek-V2 (arXiv:2405.04434 §2.1.2) keeps one latent c per token, from which every head's keys and values come:
k = [W_uk c, k_rope], v = W_uv c. Since q · (W_uk c) = (W_ukᵀ q) · c, and Σ p (W_uv c) = W_uv Σ p c, a step of decoding
can carry its few queries into the latent space, attend there, and leave it, where the plain form carries all cached
latents out of it in every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moec.ir import TensorType, Weight
from moec.passes.rewrite import Match, Refused, Rewrite


@dataclass(frozen=True)
class AbsorbMLA(Rewrite):
    """sdpa([q, q_rope], [W_uk c, k_rope], W_uv c) → W_uv sdpa([W_ukᵀ q, q_rope], [c, k_rope], c), one shared key head

    Not part of the default pipeline: for many queries it costs more. With Dn, Dv, R the sizes of a head's keys and
    values and of the latent, S queries pay (2R − Dn − Dv)·S more per key and head, and save R·(Dn + Dv).

    `max_queries`: the longest sequence of new tokens that it is applied to (None: where it stops saving).
    `dynamic`: apply it also where that length is symbolic, as in a program for prompts and steps alike. The two weights
    become parameters of matmuls, which FP8 quantisation leaves alone.
    """

    max_queries: int | None = None
    dynamic: bool = False

    def pattern(self, p: Any, latent: Any, w: Any, q_nope: Any, q_rope: Any, k_rope: Any) -> Any:
        heads = p.reshape(p.linear_linear(latent, w), shape=p.attr("heads"))
        both = p.transpose(heads, perm=(0, 2, 1, 3))
        k_nope, v = p.split(both, axis=-1, sizes=p.attr("sizes"), results=2)
        shared = p.maybe(lambda k: p.expand(k, shape=p.attr("all_heads")), k_rope)
        return p.sdpa(
            p.concat(q_nope, q_rope, axis=-1), p.concat(k_nope, shared, axis=-1), v, p.optional("mask"),
            p.optional("sinks"), scale=p.attr("scale"), causal=p.attr("causal"), softcap=p.attr("softcap"),
        )  # fmt: skip

    def when(self, m: Match) -> Refused | None:
        if m.w.weight is None:
            return m.no("the projection out of the latents is not a plain weight", at=m.w)
        return self._unlike(m) or self._too_many(m)

    def _unlike(self, m: Match) -> Refused | None:
        """Refuses what is no latent attention."""
        b, h, _, dn = m.q_nope.shape
        t, r = m.latent.shape[-2:]
        dv = m.root.shape[3]
        if m.heads != (b, t, h, dn + dv) or m.sizes != (dn, dv) or m.w.shape != (h * (dn + dv), r):
            return m.no(f"{list(m.heads)} split into {m.sizes} are not keys and values of {h} heads", at=m.latent)
        if m.k_rope.shape != (b, 1, t, m.q_rope.shape[3]):
            return m.no(f"the rotated part {m.k_rope.type} of the keys is not one for all heads", at=m.k_rope)
        return None

    def _too_many(self, m: Match) -> Refused | None:
        """Refuses what attends to more queries than it pays for."""
        _, _, s, dn = m.q_nope.shape
        r, dv = m.latent.shape[-1], m.root.shape[3]
        if not isinstance(s, int):
            return None if self.dynamic else m.no(f"the number of queries, {s}, is symbolic", at=m.q_nope)
        limit = self.max_queries
        if limit is None:
            more = 2 * r - dn - dv
            limit = r * (dn + dv) // more if more > 0 else s
        return m.no(f"{s} queries are more than {limit}", at=m.q_nope) if s > limit else None

    def replace(self, b: Any, m: Match) -> Any:
        h, dn, dv, r = m.q_nope.shape[1], m.q_nope.shape[3], m.root.shape[3], m.latent.shape[-1]
        weight, dtype = m.w.weight, m.w.dtype
        stem = weight.name.removesuffix(".weight")
        w_uk = b.weight(f"{stem}.absorbed_keys", _keys(weight, h, dn, dv), TensorType(dtype, (h, dn, r)))
        w_uv = b.weight(f"{stem}.absorbed_values", _values(weight, h, dn, dv), TensorType(dtype, (h, r, dv)))
        batch, t = m.k_rope.shape[0], m.k_rope.shape[2]
        latent = m.latent if m.latent.shape == (batch, 1, t, r) else b.reshape(m.latent, shape=(batch, 1, t, r))
        q = b.concat(b.matmul(m.q_nope, w_uk), m.q_rope, axis=-1)
        k = b.concat(latent, m.k_rope, axis=-1)
        y = b.sdpa(q, k, latent, m.mask, m.sinks, scale=m.scale, causal=m.causal, softcap=m.softcap)
        return b.matmul(y, w_uv)


def _keys(weight: Weight, h: int, dn: int, dv: int) -> Callable[[], torch.Tensor]:
    """W_uk [H, Dn, R]: the first Dn of each head's rows."""
    return lambda: weight.load().reshape(h, dn + dv, -1)[:, :dn].contiguous()


def _values(weight: Weight, h: int, dn: int, dv: int) -> Callable[[], torch.Tensor]:
    """W_uvᵀ [H, R, Dv]: the other rows, transposed."""
    return lambda: weight.load().reshape(h, dn + dv, -1)[:, dn:].transpose(1, 2).contiguous()
