"""`attention.latent`: multi-head latent attention."""

from __future__ import annotations

from typing import Any

import torch

from moec.ir.errors import require
from moec.ir.opdef import Attr, Operand, OptionalOperand, op
from moec.ir.ops.attention import ScaledDotProductAttention
from moec.ir.types import DType, TensorType, broadcast


@op("attention.latent")
class LatentAttention:
    """Attention to keys and values that are projected from one latent per token (DeepSeek-V2, arXiv:2405.04434 §2.1.2):
    attention.sdpa of [q_nope, q_rope] to keys [W_uk c, k_rope] and values W_uv c.

    q_nope [B, S, H, Dn], q_rope [B, S, H, Dr], latent c [B, 1, T, R], k_rope [B, 1, T, Dr] (one for all heads), weight
    [H·(Dn + Dv), R] (of each head the rows of W_uk, then those of W_uv) → [B, S, H, Dv]. `mask`, `scale` and `causal`
    as in attention.sdpa. Since q · (W_uk c) = (W_ukᵀ q) · c and Σ p (W_uv c) = W_uv Σ p c, few queries may as well
    attend to the latents themselves.
    """

    q_nope: Operand
    q_rope: Operand
    latent: Operand
    k_rope: Operand
    weight: Operand
    mask: OptionalOperand
    scale: Attr[float]
    causal: Attr[bool] = False

    def infer(self) -> TensorType:
        q, r, c, k, w, mask = self.q_nope, self.q_rope, self.latent, self.k_rope, self.weight, self.mask
        require(q.rank == r.rank == c.rank == k.rank == 4, f"q {q}, {r}, latent {c}, k_rope {k} must have rank 4")
        require(q.dtype == r.dtype == c.dtype == k.dtype == w.dtype, f"dtypes of {q}, {r}, {c}, {k}, {w} differ")
        require(q.dtype.is_wide_float, f"dtype {q.dtype}")
        require(q.shape[:3] == r.shape[:3], f"q_nope {q} and q_rope {r} differ in more than their last axis")
        require(q.shape[0] == c.shape[0] and c.shape[:3] == k.shape[:3], f"q_nope {q}, latent {c}, k_rope {k}")
        require(c.shape[1] == 1, f"latent {c} is not one for all heads")
        require(r.shape[3] == k.shape[3], f"q_rope {r} and k_rope {k} differ in head size")
        heads, dn = q.shape[2], q.shape[3]
        require(isinstance(heads, int) and heads > 0 and isinstance(dn, int), f"{heads} heads of {dn}")
        require(w.rank == 2 and w.shape[1] == c.shape[3], f"weight {w} for latent {c}")
        rows = w.shape[0]
        require(isinstance(rows, int) and rows % heads == 0 and rows // heads >= dn, f"weight {w} for {heads} heads")
        if mask is not None:
            want = (q.shape[0], heads, q.shape[1], c.shape[2])
            require(mask.dtype in (DType.BOOL, q.dtype), f"mask is {mask.dtype}, not bool or {q.dtype}")
            require(broadcast(mask.shape, want) == want, f"mask {mask} does not broadcast to {list(want)}")
        return q.with_shape((*q.shape[:3], rows // heads - dn))

    def _sdpa(self) -> ScaledDotProductAttention:
        """The attention that it stands for, on tensors in f32 at least."""
        wide = torch.float64 if self.q_nope.dtype == torch.float64 else torch.float32
        b, _, h, dn = self.q_nope.shape
        t = self.latent.shape[2]
        kv = (self.latent.to(wide) @ self.weight.to(wide).T).to(self.latent.dtype)
        kv = kv.reshape(b, t, h, self.weight.shape[0] // h).transpose(1, 2)
        found: Any = object.__new__(ScaledDotProductAttention)
        found.q = torch.cat((self.q_nope, self.q_rope), -1).transpose(1, 2)
        found.k = torch.cat((kv[..., :dn], self.k_rope.expand(b, h, t, -1)), -1)
        found.v, found.mask, found.sinks = kv[..., dn:], self.mask, None
        found.scale, found.causal, found.softcap = self.scale, self.causal, None
        return found

    def reference(self) -> torch.Tensor:
        return self._sdpa().reference().transpose(1, 2)

    def undefined(self) -> bool:
        return self._sdpa().undefined()

    def decompose(self, b: Any) -> Any:
        batch, _, heads, dn = self.q_nope.shape
        t, dr = self.k_rope.shape[2:]
        dv = self.weight.shape[0] // heads - dn
        kv = b.reshape(b.linear(self.latent, self.weight), shape=(batch, t, heads, dn + dv))
        k_nope, v = b.split(kv, axis=-1, sizes=(dn, dv))
        shared = b.expand(b.reshape(self.k_rope, shape=(batch, t, 1, dr)), shape=(batch, t, heads, dr))
        q, k = b.concat(self.q_nope, self.q_rope, axis=-1), b.concat(k_nope, shared, axis=-1)
        q, k, v = (b.transpose(x, perm=(0, 2, 1, 3)) for x in (q, k, v))
        return b.transpose(b.sdpa(q, k, v, self.mask, scale=self.scale, causal=self.causal), perm=(0, 2, 1, 3))

    @staticmethod
    def samples(r: Any) -> Any:
        def of(b: int, s: int, t: int, h: int, dims: tuple[int, int, int, int]) -> list[torch.Tensor]:
            dn, dr, rank, dv = dims
            queries, keys = [r.floats(b, s, h, n) for n in (dn, dr)], [r.floats(b, 1, t, n) for n in (rank, dr)]
            return [*queries, *keys, r.floats(h * (dn + dv), rank) / 4]

        n, k = r.n, r.k
        yield of(2, n, n + 3, 2, (4, 2, 8, 5)), {"scale": 0.3, "causal": True}
        yield of(1, 1, n + 1, 3, (4, 2, 6, 3)), {"scale": 0.5, "causal": True}
        yield of(2, n, k, 2, (3, 2, 2, 4)), {"scale": 0.5}
        yield [*of(1, n, k, 2, (4, 2, 6, 4)), r.bools(1, 1, n, k)], {"scale": 0.5}
        yield [*of(1, n, k, 2, (4, 2, 6, 4)), r.floats(1, 2, n, k)], {"scale": 0.5}
