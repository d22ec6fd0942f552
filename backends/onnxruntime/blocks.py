"""Block-scaled FP8 arithmetic on values that are computed in the graph; FP8 values are carried in f32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as onnx

from moec.backends.onnxruntime.emit import Emitter
from moec.backends.onnxruntime.reduction import reduce_extreme
from moec.ir import Dim, DType
from moec.ir.dims import ceil_div
from moec.ir.ops.block_codes import E4M3_MAX

Shape = Sequence[int | Dim]


@dataclass(frozen=True)
class Blocks:
    """x [..., R, C] in the view [..., R blocks, rows, C blocks, columns], in which a block's scale
    broadcasts. An axis of length 1 by construction (blocks of one row, one block of columns) is left out."""

    shape: tuple[int | Dim, ...]
    rows: int
    columns: int

    @staticmethod
    def of(shape: Shape, block: tuple[int, int]) -> Blocks:
        """A block never exceeds a known size: nothing is padded to a single block."""
        rows, columns = (min(b, max(s, 1)) if isinstance(s, int) else b for b, s in zip(block, shape[-2:], strict=True))
        return Blocks(tuple(shape), rows, columns)

    @property
    def one_block_of_columns(self) -> bool:
        return self.columns == self.shape[-1]

    @property
    def padded(self) -> tuple[int | Dim, ...]:
        *lead, r, c = self.shape
        return (*lead, ceil_div(r, self.rows) * self.rows, ceil_div(c, self.columns) * self.columns)

    @property
    def view(self) -> tuple[int | Dim, ...]:
        *lead, r, c = self.shape
        rows = [r] if self.rows == 1 else [ceil_div(r, self.rows), self.rows]
        columns = [c] if self.one_block_of_columns else [ceil_div(c, self.columns), self.columns]
        return (*lead, *rows, *columns)

    @property
    def inner(self) -> tuple[int, ...]:
        """Axes of the view within a block."""
        rows = () if self.rows == 1 else (-2,) if self.one_block_of_columns else (-3,)
        return (*rows, -1)

    @property
    def added(self) -> tuple[int, ...]:
        """Axes of size 1 that a scale [..., R blocks, C blocks] needs to broadcast in the view."""
        return self.inner[:-1] if self.one_block_of_columns else self.inner

    def split(self, e: Emitter, x: onnx.Value) -> onnx.Value:
        """x, padded with zeros to whole blocks, in the view."""
        if self.padded != self.shape:
            after = [w - s for w, s in zip(self.padded, self.shape, strict=True)]
            x = e.op("Pad", x, e.sizes.vector((*[0] * len(after), *after)), e.scalar(0, DType.F32))
        return e.reshape(x, self.padded, self.view)

    def join(self, e: Emitter, x: onnx.Value) -> onnx.Value:
        """The inverse of `split`."""
        x = e.reshape(x, self.view, self.padded)
        cut = [i for i in (-2, -1) if self.padded[i] != self.shape[i]]
        if not cut:
            return x
        return e.op(
            "Slice", x, np.zeros(len(cut), np.int64), e.sizes.vector([self.shape[i] for i in cut]), np.array(cut)
        )

    def scales(self, e: Emitter, scale: onnx.Value) -> onnx.Value:
        """Scales of the view as [..., R blocks, C blocks]."""
        return e.op("Squeeze", scale, np.array(self.added)) if self.added else scale

    def spread(self, e: Emitter, scale: onnx.Value) -> onnx.Value:
        """The inverse of `scales`."""
        return e.op("Unsqueeze", scale, np.array(self.added)) if self.added else scale

    def quantize(self, e: Emitter, x: onnx.Value) -> tuple[onnx.Value, onnx.Value]:
        """Of x in the view: its E4M3 values in f32, and the scales, both in the view."""
        amax = reduce_extreme(e, "ReduceMax", e.op("Abs", x), self.inner, True, DType.F32)
        scale = e.op("Div", amax, e.scalar(E4M3_MAX, DType.F32))
        scale = e.op("Where", e.op("Equal", scale, e.scalar(0, DType.F32)), e.scalar(1, DType.F32), scale)
        return e.round_to(e.op("Div", x, scale), DType.F8E4M3), scale


def rounded(e: Emitter, x: onnx.Value, shape: Shape, group: int) -> onnx.Value:
    """f32 rows quantised per (1, group) and dequantised at once."""
    blocks = Blocks.of(shape, (1, group))
    return blocks.join(e, e.op("Mul", *blocks.quantize(e, blocks.split(e, x))))
