"""`attention.linear_attention`: attention through a state of fixed size."""

from __future__ import annotations

from typing import Any

import torch

from moec.ir.errors import require
from moec.ir.opdef import Attr, Operand, OptionalOperand, op
from moec.ir.ops.overflow import overflows
from moec.ir.types import TensorType


@op("attention.linear_attention", results=2)
class LinearAttention:
    """Linear attention with decay and delta rule: a recurrence over a matrix S per head.

    q, k [B, T, Hk, K], v [B, T, H, V] → o [B, T, H, V] and the last S [B, H, K, V], all of one float dtype; H is a
    multiple of Hk (H / Hk neighbouring heads share a query and key). For t = 1 … T, from S = `state` [B, H, K, V] or 0:

        S ← exp(decay_t) · S             decay [B, T, H], or [B, T, H, K] for one per row of S; absent: no decay
        u = v_t, or with beta [B, T, H]: beta_t · (v_t − Sᵀ k_t)
        S ← S + k_t uᵀ
        o_t = scale · Sᵀ q_t

    Without beta this is lightning attention (constant decay; arXiv:2401.04658), Mamba-2 (arXiv:2405.21060) and, with
    V = 1 and a decay per row, Mamba (arXiv:2312.00752); with beta the gated delta rule (arXiv:2412.06464) and Kimi
    Delta Attention (arXiv:2510.26692). Computed in f32 at least.
    """

    q: Operand
    k: Operand
    v: Operand
    decay: OptionalOperand
    beta: OptionalOperand
    state: OptionalOperand
    scale: Attr[float] = 1.0

    def infer(self) -> tuple[TensorType, TensorType]:
        q, k, v, decay, beta, state = self.q, self.k, self.v, self.decay, self.beta, self.state
        given = [t for t in (q, k, v, decay, beta, state) if t is not None]
        one = len({t.dtype for t in given}) == 1 and q.dtype.is_wide_float
        require(one, f"needs equal float dtypes, got {', '.join(str(t.dtype) for t in given)}")
        require(q.rank == v.rank == 4 and q == k, f"q {q} and k {k} must be equal and of rank 4, as v {v}")
        require(q.shape[:2] == v.shape[:2], f"q {q} and v {v} differ in batch or length")
        (batch, length, shared, rows), (heads, columns) = q.shape, v.shape[2:]
        known = all(isinstance(n, int) and n > 0 for n in (shared, heads, rows, columns))
        require(known, f"heads and head sizes of q {q} and v {v} must be known and positive")
        require(heads % shared == 0, f"{heads} heads of v share {shared} of k")
        each = (batch, length, heads)
        fits = decay is None or decay.shape in (each, (*each, rows))
        require(fits, f"decay {decay}, expected the shape {list(each)}, or with {rows} at the end")
        require(beta is None or beta.shape == each, f"beta {beta}, expected the shape {list(each)}")
        last = v.with_shape((batch, heads, rows, columns))
        require(state is None or state == last, f"state {state}, expected {last}")
        return v, last

    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(self.v.dtype, torch.float32)
        v = self.v.to(wide)
        (batch, length, heads, columns), rows = v.shape, self.q.shape[3]
        q, k = (x.to(wide).repeat_interleave(heads // x.shape[2], dim=2).unsqueeze(-1) for x in (self.q, self.k))
        kept = None if self.decay is None else torch.exp(self.decay.to(wide))[..., None]
        kept = kept[..., None] if kept is not None and kept.dim() == 4 else kept
        beta = None if self.beta is None else self.beta.to(wide)[..., None]
        state = v.new_zeros(batch, heads, rows, columns) if self.state is None else self.state.to(wide)
        out = torch.empty_like(v)
        for t in range(length):
            if kept is not None:
                state = state * kept[:, t]
            update = v[:, t]
            if beta is not None:
                update = beta[:, t] * (update - (state * k[:, t]).sum(-2))
            state = state + k[:, t] * update.unsqueeze(-2)
            out[:, t] = (state * q[:, t]).sum(-2)
        return (out * self.scale).to(self.v.dtype), state.to(self.v.dtype, copy=True)

    def undefined(self) -> bool:
        given = [x for x in (self.q, self.k, self.v, self.decay, self.beta, self.state) if x is not None]
        results = self.reference()
        grown = all(bool(x.isfinite().all()) for x in given) and not all(bool(y.isfinite().all()) for y in results)
        return grown or overflows(*given, *results)

    @staticmethod
    def samples(r: Any) -> Any:
        n, m, k = r.n, r.m, r.k
        q, v, gone = r.floats(2, n, 2, k), r.floats(2, n, 4, m), -r.floats(2, n, 4, positive=True)
        keys, beta, state = r.floats(2, n, 2, k) / k**0.5, torch.sigmoid(r.floats(2, n, 4)), r.floats(2, 4, k, m)
        yield [q, keys, v], {"scale": 0.5}
        yield [q, keys, v, gone, None, state], {}
        yield [q, keys, v, gone, beta, state], {"scale": k**-0.5}
        yield [q, keys, v, None, beta], {}
        # Mamba: heads share queries and keys, a decay per row
        row = -r.floats(n, k, 3, m, positive=True)
        yield [r.floats(n, k, 1, m), r.floats(n, k, 1, m), r.floats(n, k, 3, 1), row], {}
