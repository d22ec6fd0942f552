"""`linear.conv`: convolution."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F

from moec.ir.dims import product
from moec.ir.errors import require
from moec.ir.opdef import Attr, Operand, OptionalOperand, op
from moec.ir.ops.overflow import overflows
from moec.ir.types import TensorType

_TORCH = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@op("linear.conv")
class Convolution:
    """Convolution (cross-correlation, Goodfellow et al. 2016, eq. 9.6) over one to three spatial axes.

    x [B, C, *S], weight [O, C/groups, *K] (+ bias [O]) → [B, O, *R], all of one float dtype. x is padded with
    `before` and `after` zeros on each spatial axis; element r of an axis sees the padded elements
    r · stride + j · dilation, 0 ≤ j < K: R = ⌊(before + S + after − dilation · (K − 1) − 1) / stride⌋ + 1.
    Channels fall into `groups` runs that see one another only; groups = C = O is a depthwise convolution. Sums are
    in f32 at least.
    """

    x: Operand
    weight: Operand
    bias: OptionalOperand
    stride: Attr[tuple[int, ...]]
    before: Attr[tuple[int, ...]]
    after: Attr[tuple[int, ...]]
    dilation: Attr[tuple[int, ...]]
    groups: Attr[int] = 1

    def infer(self) -> TensorType:
        x, w, b, groups = self.x, self.weight, self.bias, self.groups
        n = x.rank - 2
        require(x.dtype == w.dtype and x.dtype.is_wide_float, f"needs equal float dtypes, got {x.dtype} and {w.dtype}")
        require(1 <= n <= 3, f"x {x} must have one to three spatial axes after batch and channels")
        require(w.rank == x.rank and w.is_static, f"weight {w} must have rank {x.rank} and known sizes")
        require(0 not in w.shape, f"weight {w} is empty")
        for name in ("stride", "before", "after", "dilation"):
            given, least = getattr(self, name), int(name in ("stride", "dilation"))
            fits = len(given) == n and all(g >= least for g in given)
            require(fits, f"{name} {given}, expected {n} integers of at least {least}")
        outputs, channels = w.shape[:2]
        require(groups > 0 and outputs % groups == 0, f"{outputs} output channels in {groups} groups")
        require(x.shape[1] == channels * groups, f"x has {x.shape[1]} channels, weight takes {channels} × {groups}")
        require(b is None or b == TensorType(x.dtype, (outputs,)), f"bias {b} does not fit weight {w}")
        sizes = self._sizes()
        for axis, size in enumerate(sizes):
            fits = not isinstance(size, int) or size >= 0
            require(fits, f"the kernel of {w} does not fit axis {axis + 2} of {x}")
        return x.with_shape((x.shape[0], outputs, *sizes))

    def _sizes(self) -> list[Any]:
        """R of every spatial axis."""
        result = []
        for i, (n, k) in enumerate(zip(self.x.shape[2:], self.weight.shape[2:], strict=True)):
            room = n + self.before[i] + self.after[i] - self.dilation[i] * (k - 1) - 1
            result.append(room // self.stride[i] + 1)
        return result

    def reference(self) -> torch.Tensor:
        x, w, b = self.x, self.weight, self.bias
        wide = torch.promote_types(x.dtype, torch.float32)
        sizes = self._sizes()
        if 0 in (x.shape[0], *sizes):  # torch refuses some of these
            return x.new_zeros(x.shape[0], w.shape[0], *sizes)
        padded = F.pad(x.to(wide), _pads(self.before, self.after))
        bias = None if b is None else b.to(wide)
        y = _TORCH[x.dim() - 2](padded, w.to(wide), bias, self.stride, 0, self.dilation, self.groups)
        return y.to(x.dtype)

    def decompose(self, b: Any) -> Any:
        """For each place of the kernel, a product with the elements of x that it meets."""
        x, w, groups = self.x, self.weight, self.groups
        batch, outputs, kernel, sizes = x.shape[0], w.shape[0], w.shape[2:], self._sizes()
        # with stride − 1 more at the end, each place meets as many whole strides as there are results
        after = [a + s - 1 for a, s in zip(self.after, self.stride, strict=True)]
        padded = b.pad(x, before=(0, 0, *self.before), after=(0, 0, *after), value=0.0)
        matrices = b.reshape(w, shape=(groups, outputs // groups, w.shape[1], math.prod(kernel)))
        total = None
        for i, place in enumerate(itertools.product(*map(range, kernel))):
            met = padded
            for axis, (j, d, s, n) in enumerate(zip(place, self.dilation, self.stride, sizes, strict=True)):
                met = b.slice(met, axis=axis + 2, start=j * d, end=j * d + n * s, step=s)
            met = b.reshape(met, shape=(batch, groups, w.shape[1], product(sizes)))
            matrix = b.slice(matrices, axis=3, start=i, end=i + 1)
            part = b.matmul(b.reshape(matrix, shape=matrices.shape[:3]), met)
            total = part if total is None else b.add(total, part)
        y = b.reshape(total, shape=(batch, outputs, *sizes))
        if self.bias is None:
            return y
        return b.add(y, b.reshape(self.bias, shape=(outputs, *[1] * len(sizes))))

    def undefined(self) -> bool:
        return overflows(self.x, self.weight, self.bias)

    @staticmethod
    def samples(r: Any) -> Any:
        plain = {"stride": (1,), "before": (0,), "after": (0,), "dilation": (1,)}
        yield [r.floats(2, r.k, r.n + 2), r.floats(r.m, r.k, 3)], plain
        # depthwise and causal, as in Mamba
        x, w, bias = r.floats(r.n, r.k, r.m), r.floats(r.k, 1, 4), r.floats(r.k)
        yield [x, w, bias], plain | {"before": (3,), "groups": r.k}
        plane = {"stride": (2, 1), "before": (1, 0), "after": (0, 2), "dilation": (1, 2), "groups": 2}
        yield [r.floats(2, 4, r.n + 1, r.k + 1), r.floats(6, 2, 2, 2), r.floats(6)], plane


def _pads(before: tuple[int, ...], after: tuple[int, ...]) -> list[int]:
    """As F.pad takes them: the last axis first."""
    return [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
