"""Multi-head latent attention as one operation, for backends that choose at run time where to attend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.passes.fuse.absorb_mla import AbsorbMLA
from moec.passes.rewrite import Match, Refused


@dataclass(frozen=True)
class FuseLatentAttention(AbsorbMLA):
    """sdpa([q, q_rope], [W_uk c, k_rope], W_uv c) → attention.latent of q, c and W, where there may be fewer queries
    than keys

    Not part of the default pipeline: it is for backends that attend to the latents themselves where that takes fewer
    operations (`attention.latent` has the formula). Where both lengths are known and equal it never does.
    """

    dynamic: bool = True

    def when(self, m: Match) -> Refused | None:
        if m.q_nope.shape[2] == m.latent.shape[-2]:
            return m.no(f"{m.q_nope.shape[2]} queries of as many keys attend to keys", at=m.q_nope)
        if m.mask is not None and m.mask.dtype.is_float:
            return m.no("its mask is added", at=m.mask)
        if m.sinks is not None or m.softcap is not None:
            return m.no("it has sinks or capped scores", at=m.root)
        return self._unlike(m)

    def replace(self, b: Any, m: Match) -> Any:
        batch, t, r = m.k_rope.shape[0], m.k_rope.shape[2], m.latent.shape[-1]
        latent = m.latent if m.latent.shape == (batch, 1, t, r) else b.reshape(m.latent, shape=(batch, 1, t, r))
        q_nope, q_rope = (b.transpose(q, perm=(0, 2, 1, 3)) for q in (m.q_nope, m.q_rope))
        operands = [q_nope, q_rope, latent, m.k_rope, m.w, m.mask]
        y = b.op("attention.latent", operands, {"scale": m.scale, "causal": m.causal})
        return b.transpose(y, perm=(0, 2, 1, 3))
