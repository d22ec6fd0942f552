"""One thing per expert: the weights of experts, and ways to go through them: all, those that have rows, in a Loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as onnx
import torch

from moec.backends.onnxruntime import nbits
from moec.backends.onnxruntime.backend import backend
from moec.backends.onnxruntime.emit import Emitter, given
from moec.backends.onnxruntime.quant import dequantized, stored_blocks
from moec.backends.onnxruntime.types import numpy_type, onnx_type
from moec.ir import DType, Node, Value

# of the rows of a group and its index
PerExpert = Callable[[onnx.Value, Any], onnx.Value]


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """Matrices [E, N, K], plain or as codes with scales, their N rows taken in the order `rows`; a product takes their
    transposes, or with `transposed=False` (then [E, K, N]) themselves; with `nbits` it takes stored integers as they
    are."""

    e: Emitter
    value: Value
    scale: Value | None
    block: tuple[int, int]
    rows: torch.Tensor | None
    transposed: bool = True
    nbits: bool = False

    @property
    def stored(self) -> bool:
        return self.value.weight is not None and (self.scale is None or self.scale.weight is not None)

    @property
    def dtype(self) -> DType:
        return DType.F32 if self.scale is not None else self.value.dtype

    def ready(self) -> None:
        """Make what a product in a body reads from outside of it."""
        if not self.stored:
            self.stack(transpose=self.transposed)

    def product(self, x: onnx.Value, index: int | onnx.Value) -> onnx.Value:
        """x [R, K] times matrix `index`, which may be a value i64[]."""
        if isinstance(index, onnx.Value):
            return self.e.op("MatMul", x, self.e.op("Gather", self.stack(transpose=self.transposed), index, axis=0))
        if self.nbits:
            assert self.scale is not None
            key = f".{index}" + ("" if self.rows is None else ".reordered")
            stored = self.value, self.scale, self.block
            return nbits.product(self.e, x, *stored, index=index, rows=self.rows, key=key)
        if not (self.stored and self.transposed):
            return self.e.op("MatMul", x, self.one(index))
        _, n, k = self.value.shape

        def some(rows: torch.Tensor | None) -> onnx.Value:
            if rows is None:
                return self.one(index)
            order = rows if self.rows is None else self.rows[rows]
            return self._initializer(f".{index}.{int(rows[0])}", index, (k, len(rows)), True, order)

        return self.e.product(x, (n, k), some)

    def one(self, index: int) -> onnx.Value:
        """Matrix `index` as [K, N]; a stored one is an initialiser of its own, so that MatMul packs it."""
        if not self.stored:
            return self.e.op("Gather", self.stack(transpose=self.transposed), np.int64(index), axis=0)
        _, n, k = self.value.shape
        shape = (k, n) if self.transposed else (n, k)
        return self._initializer(f".{index}", index, shape, self.transposed, self.rows)

    def stack(self, *, transpose: bool) -> onnx.Value:
        """All, with the last two axes exchanged or not."""
        num, n, k = self.value.shape
        if self.stored:
            return self._initializer(".all", None, (num, k, n) if transpose else (num, n, k), transpose, self.rows)
        if self.scale is None:
            x = self.e.value(self.value)
        else:
            x = dequantized(self.e, self.value, self.scale, self.block)
        memo = ("stack", x, self.rows is None, transpose)
        if memo not in self.e.memo:
            if self.rows is not None:
                x = self.e.op("Gather", x, self.rows.numpy(), axis=1)
            self.e.memo[memo] = self.e.op("Transpose", x, perm=[0, 2, 1]) if transpose else x
        return self.e.memo[memo]

    def _initializer(
        self, key: str, index: int | None, shape: tuple, transpose: bool, rows: torch.Tensor | None
    ) -> onnx.Value:
        key += (".T" if transpose else "") + ("" if self.rows is None else ".reordered")
        if self.scale is not None:
            codes = (self.value, self.scale, self.block)
            return stored_blocks(self.e, *codes, shape, key=key, index=index, rows=rows, transpose=transpose)

        def pick(t: torch.Tensor) -> torch.Tensor:
            t = t if rows is None else t.index_select(-2, rows)
            return t.transpose(-1, -2) if transpose else t

        return self.e.weight(self.value, key, shape, pick, index=index)


def by_split(e: Emitter, x: onnx.Value, counts: onnx.Value, num: int, one: PerExpert) -> onnx.Value:
    """`one` of every group of rows of x [R, …], counts i64[num] of which add up to R; empty groups too."""
    parts = _parts(e, x, counts, num)
    return _joined(e, [one(part, i) for i, part in enumerate(parts)])


def by_if(
    e: Emitter, x: onnx.Value, counts: onnx.Value, num: int, one: PerExpert, width: int, dtype: DType
) -> onnx.Value:
    """As `by_split`, but nothing runs of groups without rows. `one` gives [rows, width] of `dtype`."""
    parts = _parts(e, x, counts, num)
    if num == 1:
        return one(parts[0], 0)
    flags = e.op("Split", e.op("Greater", counts, np.int64(0)), outputs=num, axis=0, num_outputs=num)
    return _joined(e, [_where(e, flags[i], part, i, one, width, dtype) for i, part in enumerate(parts)])


def _parts(e: Emitter, x: onnx.Value, counts: onnx.Value, num: int) -> tuple[onnx.Value, ...]:
    """The groups; of one too, so that counts which are wrong are an error."""
    parts: Any = e.op("Split", x, counts, outputs=num, axis=0)
    return parts if num > 1 else (parts,)


def _joined(e: Emitter, parts: list[onnx.Value]) -> onnx.Value:
    return e.op("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]


def _where(
    e: Emitter, used: onnx.Value, part: onnx.Value, index: int, one: PerExpert, width: int, dtype: DType
) -> onnx.Value:
    def nothing() -> onnx.Value:
        zero = onnx.tensor(np.zeros(1, numpy_type(dtype)))
        return e.op("ConstantOfShape", np.array([0, width], np.int64), value=zero)

    return e.either(used, lambda: one(part, index), nothing, dtype, plain="then_branch")


def by_loop(e: Emitter, x: onnx.Value, counts: onnx.Value, one: PerExpert, dtype: DType) -> onnx.Value:
    """As `by_split`, in a Loop over the groups that have rows; `one` gets the index as i64[]. What it reads beside its
    arguments has to be there before."""
    ends = e.op("CumSum", counts, np.int64(0))
    starts = e.op("Sub", ends, counts)
    # where there are no rows at all the first group stands for the result, which a sequence without entries has not
    used = e.op("Concat", e.op("Reshape", e.op("NonZero", counts), np.array([-1])), np.array([0]), axis=0)
    trips = e.op("Max", e.op("Sub", e.op("Size", used), np.int64(1)), np.int64(1))
    first = e.constant(np.array([0]))
    sequence = onnx.SequenceType(onnx.TensorType(onnx_type(dtype)))
    step = onnx.Value(name=e.unique("step"), type=onnx.TensorType(onnx.DataType.INT64), shape=onnx.Shape([]))
    going = onnx.Value(name=e.unique("going"), type=onnx.TensorType(onnx.DataType.BOOL), shape=onnx.Shape([]))
    done = onnx.Value(name=e.unique("done"), type=sequence)
    with e.body() as nodes:
        index = e.op("Gather", used, step)
        start, end = (e.op("Unsqueeze", e.op("Gather", bounds, index), first) for bounds in (starts, ends))
        more = e.op("SequenceInsert", done, one(e.op("Slice", x, start, end, first), index))
        still = e.op("Identity", going)
    more.type, still.type, still.shape = sequence, onnx.TensorType(onnx.DataType.BOOL), onnx.Shape([])
    body = onnx.Graph([step, going, done], [still, more], nodes=nodes, name=e.unique("each_expert"))
    empty = e.op("SequenceEmpty", dtype=onnx_type(dtype).value)
    return e.op("ConcatFromSequence", e.op("Loop", trips, None, empty, body=body), axis=0)


@backend.lowers("linear.grouped_matmul")
def grouped_matmul(e: Emitter, node: Node) -> onnx.Value:
    x, w, offsets = given(node)
    num, _, width = (int(s) for s in w.shape)
    rows, ends = e.value(x), e.cast(e.value(offsets), offsets.dtype, DType.I64)
    last = e.op("Slice", ends, np.array([num - 1]), np.array([num]))
    starts = e.op("Concat", np.array([0]), e.op("Slice", ends, np.array([0]), np.array([num - 1])), axis=0)
    counts = e.op("Sub", ends, starts)
    used = e.op("Slice", rows, np.array([0]), last)
    weights = ExpertWeights(e, w, None, (1, 1), None, transposed=False)
    weights.ready()
    if e.options.experts == "loop":
        weights.stack(transpose=False)
        y = by_loop(e, used, counts, weights.product, w.dtype)
    elif e.options.compact and weights.stored:  # weights of groups without rows are not widened in vain
        y = by_if(e, used, counts, num, weights.product, width, w.dtype)
    else:
        y = by_split(e, used, counts, num, weights.product)
    beyond = e.op("Concat", e.op("Sub", e.sizes.one(x.shape[0]), last), e.sizes.one(width), axis=0)
    return e.op("Concat", y, e.op("Expand", e.scalar(0, x.dtype), beyond), axis=0)
