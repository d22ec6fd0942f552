"""One product per expert: the weights of experts, unrolled or in a Loop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as onnx
import torch

from moec.backends.onnxruntime.backend import backend
from moec.backends.onnxruntime.emit import Emitter, given
from moec.backends.onnxruntime.quant import dequantized, stored_blocks
from moec.backends.onnxruntime.types import numpy_type, onnx_type
from moec.ir import DType, Node, Value


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """Matrices [E, N, K], plain or as FP8 codes with scales, their N rows taken in the order `rows`; a
    product takes their transposes, or with `transposed=False` (then [E, K, N]) themselves."""

    e: Emitter
    value: Value
    scale: Value | None
    block: tuple[int, int]
    rows: torch.Tensor | None
    transposed: bool = True

    @property
    def stored(self) -> bool:
        return self.value.weight is not None and (self.scale is None or self.scale.weight is not None)

    @property
    def dtype(self) -> DType:
        return DType.F32 if self.scale is not None else self.value.dtype

    def product(self, x: onnx.Value, index: int) -> onnx.Value:
        """x [R, K] times matrix `index`."""
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


def grouped_product(e: Emitter, x: onnx.Value, counts: onnx.Value, weights: ExpertWeights, unroll: bool) -> onnx.Value:
    """Rows x [R, K], counts i64[E] that add up to R → each group of rows times its expert's [K, N]."""
    num = int(weights.value.shape[0])
    if not unroll:
        return _loop(e, x, counts, weights, num)
    parts = e.op("Split", x, counts, outputs=num, axis=0)
    parts = parts if num > 1 else (parts,)
    if e.options.compact and weights.stored:
        outputs = [
            _where_used(e, part, e.op("Gather", counts, np.int64(i)), weights, i) for i, part in enumerate(parts)
        ]
    else:
        outputs = [weights.product(part, i) for i, part in enumerate(parts)]
    return e.op("Concat", *outputs, axis=0) if num > 1 else outputs[0]


def _where_used(e: Emitter, part: onnx.Value, count: onnx.Value, weights: ExpertWeights, index: int) -> onnx.Value:
    """The product of an expert that has rows; another's weights are not widened in vain."""
    with e.body() as used:
        product = weights.product(part, index)
    _, n, k = weights.value.shape
    width = n if weights.transposed else k
    with e.body() as idle:
        zero = onnx.tensor(np.zeros(1, numpy_type(weights.dtype)))
        nothing = e.op("ConstantOfShape", np.array([0, width], np.int64), value=zero)
    for out in (product, nothing):
        out.type = onnx.TensorType(onnx_type(weights.dtype))
    return e.op(
        "If",
        e.op("Greater", count, np.int64(0)),
        then_branch=onnx.Graph([], [product], nodes=used, name=e.unique("used")),
        else_branch=onnx.Graph([], [nothing], nodes=idle, name=e.unique("idle")),
    )


def _loop(e: Emitter, x: onnx.Value, counts: onnx.Value, weights: ExpertWeights, num: int) -> onnx.Value:
    matrices = weights.stack(transpose=weights.transposed)
    ends = e.op("CumSum", counts, np.int64(0))
    starts = e.op("Sub", ends, counts)
    dtype, first = onnx_type(weights.dtype), e.constant(np.array([0]))
    sequence = onnx.SequenceType(onnx.TensorType(dtype))
    step = onnx.Value(name=e.unique("step"), type=onnx.TensorType(onnx.DataType.INT64), shape=onnx.Shape([]))
    going = onnx.Value(name=e.unique("going"), type=onnx.TensorType(onnx.DataType.BOOL), shape=onnx.Shape([]))
    done = onnx.Value(name=e.unique("done"), type=sequence)
    with e.body() as nodes:
        start, end = (e.op("Unsqueeze", e.op("Gather", bounds, step), first) for bounds in (starts, ends))
        part = e.op("MatMul", e.op("Slice", x, start, end, first), e.op("Gather", matrices, step))
        more = e.op("SequenceInsert", done, part)
        still = e.op("Identity", going)
    more.type, still.type, still.shape = sequence, onnx.TensorType(onnx.DataType.BOOL), onnx.Shape([])
    body = onnx.Graph([step, going, done], [still, more], nodes=nodes, name=e.unique("each_expert"))
    empty = e.op("SequenceEmpty", dtype=dtype.value)
    results = e.op("Loop", np.int64(num), None, empty, body=body)
    return e.op("ConcatFromSequence", results, axis=0)


@backend.lowers("linear.grouped_matmul")
def grouped_matmul(e: Emitter, node: Node) -> onnx.Value:
    x, w, offsets = given(node)
    num, _, width = w.shape
    rows, ends = e.value(x), e.cast(e.value(offsets), offsets.dtype, DType.I64)
    last = e.op("Slice", ends, np.array([num - 1]), np.array([num]))
    starts = e.op("Concat", np.array([0]), e.op("Slice", ends, np.array([0]), np.array([num - 1])), axis=0)
    counts = e.op("Sub", ends, starts)
    used = e.op("Slice", rows, np.array([0]), last)
    weights = ExpertWeights(e, w, None, (1, 1), None, transposed=False)
    y = grouped_product(e, used, counts, weights, unroll=e.options.experts != "loop")
    beyond = e.op("Concat", e.op("Sub", e.sizes.one(x.shape[0]), last), e.sizes.one(width), axis=0)
    return e.op("Concat", y, e.op("Expand", e.scalar(0, x.dtype), beyond), axis=0)
