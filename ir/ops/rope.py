"""`rope`: rotary position embedding (Su et al. 2021)."""

from __future__ import annotations

from typing import Any

import torch

from moec.ir.errors import require
from moec.ir.opdef import Attr, Operand, op
from moec.ir.types import TensorType, broadcast


@op("rope.apply")
class Rope:
    """Rotate the last axis of x [..., D] by angles whose cos and sin [..., D/2] broadcast against it.

    Half-rotated (default): pair i is (x[i], x[i + D/2]) and the result keeps that layout. `interleaved`:
    the pairs of x are (x[2i], x[2i + 1]); the result is interleaved too, or with `deinterleave` comes out
    in the half-rotated layout (as DeepSeek-V3's transformers code does).
    """

    x: Operand
    cos: Operand
    sin: Operand
    interleaved: Attr[bool] = False
    deinterleave: Attr[bool] = False

    def infer(self) -> TensorType:
        x = self.x
        require(x.dtype.is_wide_float and x.rank >= 1, f"takes floats, got {x}")
        require(self.cos == self.sin, f"cos {self.cos} and sin {self.sin} differ")
        require(self.cos.dtype == x.dtype, f"cos is {self.cos.dtype}, x {x.dtype}")
        require(isinstance(x.shape[-1], int) and x.shape[-1] % 2 == 0, f"last axis of {x} is not a known even size")
        require(self.interleaved or not self.deinterleave, "deinterleave without interleaved")
        half = (*x.shape[:-1], x.shape[-1] // 2)
        require(broadcast(self.cos.shape, half) == half, f"cos {self.cos} does not broadcast to {list(half)}")
        return x

    def reference(self) -> torch.Tensor:
        x, cos, sin = self.x, self.cos, self.sin
        if self.interleaved:
            a, b = x[..., 0::2], x[..., 1::2]
        else:
            a, b = x.chunk(2, dim=-1)
        ra, rb = a * cos - b * sin, b * cos + a * sin
        if self.interleaved and not self.deinterleave:
            return torch.stack((ra, rb), dim=-1).reshape(x.shape)
        return torch.cat((ra, rb), dim=-1)

    def decompose(self, b: Any) -> Any:
        x, d = self.x, self.x.shape[-1]
        if self.interleaved:
            p = b.slice(x, axis=-1, start=0, end=d, step=2)
            q = b.slice(x, axis=-1, start=1, end=d, step=2)
        else:
            p, q = b.split(x, axis=-1, sizes=(d // 2, d // 2))
        rp = b.sub(b.mul(p, self.cos), b.mul(q, self.sin))
        rq = b.add(b.mul(q, self.cos), b.mul(p, self.sin))
        if self.interleaved and not self.deinterleave:
            pair = (*rp.shape, 1)
            both = b.concat(b.reshape(rp, shape=pair), b.reshape(rq, shape=pair), axis=-1)
            return b.reshape(both, shape=x.shape)
        return b.concat(rp, rq, axis=-1)

    @staticmethod
    def samples(r: Any) -> Any:
        x, angle = r.floats(2, 3, r.n, 8), r.floats(1, 1, r.n, 4)
        for attrs in ({}, {"interleaved": True}, {"interleaved": True, "deinterleave": True}):
            yield [x, angle.cos(), angle.sin()], attrs
