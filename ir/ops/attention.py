"""`attention`: scaled dot-product attention."""

from __future__ import annotations

from typing import Any

import torch

from moec.ir.errors import require
from moec.ir.opdef import Attr, Operand, OptionalOperand, op
from moec.ir.ops.overflow import overflows
from moec.ir.types import DType, TensorType, broadcast


@op("attention.sdpa")
class ScaledDotProductAttention:
    """softmax(q kᵀ · scale + mask) v (Vaswani et al. 2017).

    q [B, H, S, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv] → [B, H, S, Dv]; H is a multiple of Hkv (grouped
    queries share a head). `mask` broadcasts to [B, H, S, T]: bool (True: may attend) or the dtype of q
    (added); scores that it hides have to be finite. `causal`: query i sees keys j ≤ i + T − S (aligned to the last
    key, as with a cache).
    `softcap` c: scores become c · tanh(scores / c) before the mask (Gemma 2, arXiv:2408.00118 §2).
    `sinks` [H]: one more score per head and query that takes its share of the softmax and has no value (GPT-OSS;
    Xiao et al., arXiv:2309.17453). A row that may attend to nothing gives zeros. Scores and softmax are computed
    in f32 at least.
    """

    q: Operand
    k: Operand
    v: Operand
    mask: OptionalOperand
    sinks: OptionalOperand
    scale: Attr[float]
    causal: Attr[bool] = False
    softcap: Attr[float | None] = None

    def infer(self) -> TensorType:
        q, k, v, mask = self.q, self.k, self.v, self.mask
        require(q.rank == k.rank == v.rank == 4, f"q {q}, k {k}, v {v} must have rank 4")
        require(q.dtype == k.dtype == v.dtype and q.dtype.is_wide_float, f"dtypes {q.dtype}, {k.dtype}, {v.dtype}")
        require(q.shape[0] == k.shape[0] == v.shape[0], f"batch sizes differ: {q}, {k}, {v}")
        require(k.shape[1:3] == v.shape[1:3], f"k {k} and v {v} differ in heads or length")
        require(q.shape[3] == k.shape[3], f"q {q} and k {k} differ in head size")
        h, hkv = q.shape[1], k.shape[1]
        require(isinstance(h, int) and isinstance(hkv, int) and hkv > 0 and h % hkv == 0, f"{h} heads, {hkv} kv heads")
        if mask is not None:
            want = (*q.shape[:3], k.shape[2])
            require(mask.dtype in (DType.BOOL, q.dtype), f"mask is {mask.dtype}, not bool or {q.dtype}")
            require(broadcast(mask.shape, want) == want, f"mask {mask} does not broadcast to {list(want)}")
        sinks = self.sinks
        require(sinks is None or sinks == TensorType(q.dtype, (h,)), f"sinks {sinks}, expected {q.dtype}[{h}]")
        cap = self.softcap
        require(cap is None or (isinstance(cap, float) and cap > 0), f"softcap must be a positive float, got {cap!r}")
        return q.with_shape((*q.shape[:3], v.shape[3]))

    def _scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores without the mask, which of them a causal or boolean mask lets through)."""
        q, k = self.q, self.k
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        allowed = torch.ones((), dtype=torch.bool)
        if self.causal:
            s, t = scores.shape[-2:]
            allowed = torch.arange(t) <= torch.arange(s)[:, None] + (t - s)
        if self.mask is not None and self.mask.dtype == torch.bool:
            allowed = allowed & self.mask
        return scores, allowed

    def reference(self) -> torch.Tensor:
        q, (scores, allowed) = self.q, self._scores()
        if self.mask is not None and self.mask.dtype != torch.bool:
            scores = scores + self.mask.to(scores.dtype)
        scores = scores.masked_fill(~allowed, float("-inf"))
        v = self.v.repeat_interleave(q.shape[1] // self.v.shape[1], dim=1).to(scores.dtype)
        if self.sinks is not None:
            column = self.sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            return (torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1] @ v).to(q.dtype)
        dead = (scores == float("-inf")).all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(dead, 0.0), dim=-1).masked_fill(dead, 0.0)
        return (weights @ v).to(q.dtype)

    def undefined(self) -> bool:
        if overflows(self.q, self.k, self.v, self.mask, self.sinks):
            return True
        scores, allowed = self._scores()
        shut = ~allowed
        # a bool mask is −∞ that is added, or what stands in place of scores
        if bool((shut & ~scores.isfinite()).any()):
            return True
        if self.sinks is not None:
            return False
        # a row that may attend, but to scores of −∞ only, is 0 / 0
        if self.mask is not None and self.mask.dtype != torch.bool:
            shut = shut | (self.mask == float("-inf"))
        hopeless = (shut | (scores == float("-inf"))).all(-1) & ~shut.expand_as(scores).all(-1)
        return bool(hopeless.any())

    @staticmethod
    def samples(r: Any) -> Any:
        n = r.n
        yield [r.floats(2, 4, n, 8), r.floats(2, 2, n + 3, 8), r.floats(2, 2, n + 3, 5)], {"scale": 0.3, "causal": True}
        yield [r.floats(2, 4, n, 8), r.floats(2, 4, r.k, 8), r.floats(2, 4, r.k, 8)], {"scale": 0.5}
        q, k, v = r.floats(1, 2, n, 4), r.floats(1, 1, r.k, 4), r.floats(1, 1, r.k, 4)
        yield [q, k, v, r.bools(1, 1, n, r.k)], {"scale": 0.5}
        yield [q, k, v, r.floats(1, 1, n, r.k)], {"scale": 0.5}
        yield [q, k, v, r.bools(1, 1, n, r.k)], {"scale": 0.5, "softcap": 2.0}
        yield [q, k, v, r.bools(1, 1, n, r.k), r.floats(2)], {"scale": 0.5}
        yield [q, k, v, r.floats(1, 1, n, r.k), r.floats(2)], {"scale": 0.5, "causal": True, "softcap": 1.5}
