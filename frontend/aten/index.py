"""Indexing with tensors: gather, scatter, embedding, advanced indexing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from moec.frontend.aten.registry import lowers
from moec.frontend.context import Context, Number
from moec.ir import Dim, DType, Value
from moec.ir.types import broadcast

_INDEX = (DType.I64, DType.I32)
_MASK_HINT = "use torch.where(mask, a, b) or multiply by the mask: the number of selected elements is not fixed"


@lowers("embedding")
def embedding(c: Context, weight: Value, indices: Value) -> Value:
    return c.b.gather(weight, _as_index(c, indices), axis=0)


@lowers("index_select")
def index_select(c: Context, self: Value, dim: int, index: Value) -> Value:
    if self.type.rank == 0:
        return self
    index = c.reshape(index, (1,)) if index.type.rank == 0 else index
    return c.b.gather(self, _as_index(c, index), axis=c.axis(dim, self))


@lowers("gather")
def gather(c: Context, self: Value, dim: int, index: Value) -> Value:
    if index.type.numel == 0:  # of any rank
        return c.full(index.shape, 0, self.dtype)
    if self.type.rank == 0 or index.type.rank == 0:
        return c.expand(c.reshape(self, [1] * index.type.rank), index.shape)
    axis = c.axis(dim, self)
    x = self
    for i, (have, want) in enumerate(zip(self.shape, index.shape, strict=True)):
        if i != axis and have != want:  # torch lets the index be shorter on the other axes
            x = c.slice(x, i, 0, want)
    return c.b.gather_elements(x, c.cast(index, DType.I64), axis=axis)


@lowers("take_along_dim")
def take_along_dim(c: Context, self: Value, indices: Value, dim: int | None) -> Value:
    """`gather` of tensors that broadcast on every axis but `dim`, or of all their elements."""
    if dim is None:
        x, index = (c.reshape(v, (v.type.numel,)) for v in (self, indices))
        return gather(c, x, 0, index)
    axis = c.axis(dim, self)
    common = broadcast(*((*v.shape[:axis], 1, *v.shape[axis + 1 :]) for v in (self, indices)))
    x, index = (c.expand(v, common[:axis] + v.shape[axis : axis + 1] + common[axis + 1 :]) for v in (self, indices))
    return gather(c, x, dim, index)


@lowers("take")
def take(c: Context, self: Value, index: Value) -> Value:
    return c.b.gather(c.reshape(self, (self.type.numel,)), _as_index(c, index), axis=0)


@lowers("nonzero", "argwhere")
def nonzero(c: Context, self: Value) -> Value:
    return c.b.nonzero(c.truth(self), count=c.out_type.shape[0])


@lowers("nonzero_numpy")
def nonzero_numpy(c: Context, self: Value) -> list[Value]:
    x = self if self.type.rank else c.reshape(self, (1,))
    return _columns(c, x, c.out[0].shape[0])


@lowers("where")
def where(c: Context, condition: Value) -> list[Value]:
    return nonzero_numpy(c, condition)


def _columns(c: Context, mask: Value, count: Any) -> list[Value]:
    """The indices where a mask holds, one tensor [count] for each axis."""
    found = c.b.nonzero(c.truth(mask), count=count)
    parts = [found] if mask.type.rank == 1 else c.b.split(found, axis=1, sizes=(1,) * mask.type.rank)
    return [c.reshape(p, (count,)) for p in parts]


@lowers("masked_select")
def masked_select(c: Context, self: Value, mask: Value) -> Value:
    shape = broadcast(self.shape, mask.shape)
    x, where = (c.expand(v, shape) for v in (self, mask))
    flat = (x.type.numel,)
    (at,) = _columns(c, c.reshape(where, flat), c.out_type.shape[0])
    return c.b.gather(c.reshape(x, flat), at, axis=0)


@lowers("scatter.src", "scatter_add")
def scatter(c: Context, self: Value, dim: int, index: Value, src: Value) -> Value:
    return _scatter(c, self, dim, index, src, "add" if c.op == "aten::scatter_add" else "none")


@lowers("scatter.value_reduce")
def scatter_value_reduce(c: Context, self: Value, dim: int, index: Value, value: Number, reduce: str) -> Value:
    return _reduced(c, self, dim, index, c.full(index.shape, value, self.dtype), reduce, True)


@lowers("scatter.value")
def scatter_value(c: Context, self: Value, dim: int, index: Value, value: Number) -> Value:
    return _scatter(c, self, dim, index, c.full(index.shape, value, self.dtype), "none")


@lowers("scatter.reduce", "scatter_reduce.two")
def scatter_reduce(c: Context, self: Value, dim: int, index: Value, src: Value, reduce: str,
                   include_self: bool = True) -> Value:  # fmt: skip
    return _reduced(c, self, dim, index, src, reduce, include_self)


# torch's reductions: the IR's, and what they start from
_REDUCE = {"sum": "add", "add": "add", "prod": "mul", "multiply": "mul", "amax": "max", "amin": "min", "mean": "add"}


def _neutral(reduce: str, dtype: DType) -> Number:
    if reduce in ("add", "mul"):
        return int(reduce == "mul")
    sign = -1 if reduce == "max" else 1
    if dtype.is_float:
        return sign * math.inf
    info = torch.iinfo(dtype.torch)
    return info.min if sign < 0 else info.max


def _reduced(c: Context, x: Value, dim: int, index: Value, src: Value, reduce: str, include_self: bool) -> Value:
    """Scatter with a reduction; without self, the places that are written start from the neutral element."""
    if reduce not in _REDUCE:
        raise c.refuse(f"reduce={reduce!r}")
    kind, dtype = _REDUCE[reduce], x.dtype
    wide = c.widen(c.cast(x, DType.I64) if dtype is DType.BOOL else x)
    src = c.cast(src, wide.dtype)
    start = wide
    if not include_self:
        fill = c.full(index.shape, _neutral(kind, wide.dtype), wide.dtype)
        start = _scatter(c, wide, dim, index, fill, "none")
    out = _scatter(c, start, dim, index, src, kind)
    if reduce == "mean":
        ones = c.full(index.shape, 1, wide.dtype)
        count = _scatter(c, c.full(x.shape, int(include_self), wide.dtype), dim, index, ones, "add")
        count = c.b.max(count, c.value(1, wide.dtype))
        out = c.b.div(out, count) if wide.dtype.is_float else c.b.floordiv(out, count)
    return c.cast(out, dtype)


@lowers("index_reduce")
def index_reduce(c: Context, self: Value, dim: int, index: Value, source: Value, reduce: str,
                 include_self: bool) -> Value:  # fmt: skip
    if self.type.rank == 0:
        lifted = _reduced(
            c, c.reshape(self, (1,)), 0, c.reshape(index, (1,)), c.reshape(source, (1,)), reduce, include_self
        )
        return c.reshape(lifted, ())
    axis = c.axis(dim, self)
    rows = c.reshape(c.cast(index, DType.I64), [source.shape[i] if i == axis else 1 for i in range(self.type.rank)])
    return _reduced(c, self, dim, c.expand(rows, source.shape), source, reduce, include_self)


@lowers("put")
def put(c: Context, self: Value, index: Value, source: Value, accumulate: bool) -> Value:
    flat = c.reshape(self, (self.type.numel,))
    places, src = c.reshape(index, (index.type.numel,)), c.reshape(source, (source.type.numel,))
    return c.reshape(c.b.index_put(flat, _as_index(c, places), src, accumulate=accumulate), self.shape)


def _scatter(c: Context, x: Value, dim: int, index: Value, src: Value, reduce: str) -> Value:
    index = c.cast(index, DType.I64)
    if x.type.rank == 0:
        lifted = _scatter(c, c.reshape(x, (1,)), 0, c.reshape(index, (index.type.numel,)), c.reshape(src, (1,)), reduce)
        return c.reshape(lifted, ())
    for i, (have, want) in enumerate(zip(src.shape, index.shape, strict=True)):
        src = src if have == want else c.slice(src, i, 0, want)
    return c.b.scatter_elements(x, index, c.cast(src, x.dtype), axis=c.axis(dim, x), reduce=reduce)


@lowers("index_add")
def index_add(c: Context, self: Value, dim: int, index: Value, source: Value, alpha: Number) -> Value:
    source = source if alpha == 1 else c.binary("mul", source, alpha, source.dtype)
    return _put_rows(c, self, dim, index, source, accumulate=True)


@lowers("index_copy")
def index_copy(c: Context, self: Value, dim: int, index: Value, source: Value) -> Value:
    return _put_rows(c, self, dim, index, source, accumulate=False)


@lowers("index_fill.int_Scalar", "index_fill.int_Tensor")
def index_fill(c: Context, self: Value, dim: int, index: Value, value: Any) -> Value:
    return _put_rows(c, self, dim, index, c.value(value, self.dtype), accumulate=False)


def _put_rows(c: Context, x: Value, dim: int, index: Value, source: Value, accumulate: bool) -> Value:
    axis, rank = c.axis(dim, x), x.type.rank
    if rank == 0:
        return c.reshape(_put_rows(c, c.reshape(x, (1,)), 0, index, source, accumulate), ())
    index = c.reshape(index, (1,)) if index.type.rank == 0 else index
    front = [axis, *(i for i in range(rank) if i != axis)]
    rows = c.transpose(x, front)
    src = c.transpose(source, front) if source.type.rank == rank else source
    out = c.b.index_put(rows, _as_index(c, index), src, accumulate=accumulate)
    return c.transpose(out, [front.index(i) for i in range(rank)])


def _as_index(c: Context, index: Value) -> Value:
    return index if index.dtype in _INDEX else c.cast(index, DType.I64)


def _checked(c: Context, indices: Sequence[Value | None], x: Value) -> list[tuple[int, Value]]:
    """(axis, index) of the indexed axes. Raises CompileError on masks, whose result has no fixed shape."""
    result = []
    for axis, index in enumerate(indices):
        if index is None:
            continue
        if index.dtype in (DType.BOOL, DType.U8):
            raise c.refuse("indexing with a boolean mask", code="data-dependent", hint=_MASK_HINT)
        if isinstance(x.shape[axis], int) or index.dtype in _INDEX or index.dtype.is_integer:
            result.append((axis, _as_index(c, index)))
    return result


@lowers("index.Tensor", "_unsafe_index.Tensor")
def index(c: Context, self: Value, indices: Sequence[Value | None]) -> Value:
    new = [s for s in c.out_type.shape if isinstance(s, Dim) and s not in self.shape]
    masks = [i for i in indices if i is not None and i.dtype in (DType.BOOL, DType.U8)]
    if len(masks) == 1 and len(new) == 1 and masks[0].type.rank:
        indices = [x for i in indices for x in (_columns(c, i, new[0]) if i is masks[0] else [i])]
    picked = _checked(c, indices, self)
    if not picked:
        return self
    if len(picked) == 1:
        axis, idx = picked[0]
        return c.b.gather(self, idx, axis=axis)
    x, flat, rest = _flatten_indexed(c, self, picked)
    out = c.b.gather(x, flat, axis=0)
    axes = [a for a, _ in picked]
    if axes != list(range(axes[0], axes[0] + len(axes))) or axes[0] == 0:
        return out  # separated index axes come first, as in NumPy
    n, lead = flat.type.rank, axes[0]
    order = [*range(n, n + lead), *range(n), *range(n + lead, n + len(rest))]
    return c.transpose(out, order)


def _flatten_indexed(c: Context, x: Value, picked: Sequence[tuple[int, Value]]) -> tuple[Value, Value, list[int]]:
    """Merge the indexed axes into one in front: (x [product, …rest], one index into it, the other axes)."""
    axes = [a for a, _ in picked]
    rest = [i for i in range(x.type.rank) if i not in axes]
    sizes = [x.shape[a] for a in axes]
    moved = c.transpose(x, [*axes, *rest])
    merged = c.reshape(moved, (x.type.with_shape(sizes).numel, *(x.shape[i] for i in rest)))
    shape = broadcast(*(i.shape for _, i in picked))
    flat: Value | None = None
    for (_, idx), n in zip(picked, sizes, strict=True):
        at = c.cast(idx, DType.I64)
        if not _never_negative(idx):
            at = c.b.where(c.b.lt(at, 0), c.b.add(at, c.value(n, DType.I64)), at)
        flat = at if flat is None else c.b.add(c.b.mul(flat, c.value(n, DType.I64)), at)
    assert flat is not None
    return merged, c.expand(flat, shape), rest


def _never_negative(v: Value) -> bool:
    """Whether a value comes from arange, topk or sort by reshaping alone: the usual indices."""
    while v.producer is not None:
        if v.producer.op == "tensor.arange":
            return not isinstance(v.producer.attrs["start"], int) or v.producer.attrs["start"] >= 0
        if v.producer.op in ("math.topk", "math.sort"):
            return v.index == 1
        if v.producer.op not in ("tensor.reshape", "tensor.expand", "tensor.transpose", "tensor.slice"):
            return False
        source = v.producer.operands[0]
        assert source is not None
        v = source
    return False


@lowers("index_put", "_unsafe_index_put", "_index_put_impl")
def index_put(c: Context, self: Value, indices: Sequence[Value | None], values: Value, accumulate: bool) -> Value:
    masks = [i for i in indices if i is not None and i.dtype is DType.BOOL]
    if masks and values.type.numel == 1 and not accumulate and len(masks) == len(indices) == 1:
        mask = c.reshape(masks[0], (*masks[0].shape, *[1] * (self.type.rank - masks[0].type.rank)))
        return c.b.where(mask, c.cast(c.reshape(values, ()), self.dtype), self)
    if len(masks) == 1 and masks[0].type.rank:
        # where the values have an axis of the places at which it holds, as many as it says are expected
        place = next(i for i, x in enumerate(indices) if x is masks[0])
        axis = values.type.rank - (1 + self.type.rank - masks[0].type.rank - place)
        alone = all(x is None or x is masks[0] for x in indices)
        count = values.shape[axis] if alone and axis >= 0 else 1
        known = count.is_symbol if isinstance(count, Dim) else count != 1
        found = _columns(c, masks[0], count if known else c.symbols.fresh())
        indices = [x for i in indices for x in (found if i is masks[0] else [i])]
    picked = _checked(c, indices, self)
    values = c.cast(values, self.dtype)
    if [a for a, _ in picked] == [0]:
        return c.b.index_put(self, picked[0][1], values, accumulate=accumulate)
    axes = [a for a, _ in picked]
    if axes != list(range(axes[0], axes[0] + len(axes))):
        raise c.refuse("indices on axes that are not next to each other")
    x, flat, rest = _flatten_indexed(c, self, picked)
    n, lead = flat.type.rank, axes[0]
    if lead and values.type.rank == n + len(rest):
        # values lie as [leading axes, index axes, rest]; the merged axis comes first
        values = c.transpose(values, [*range(lead, lead + n), *range(lead), *range(lead + n, n + len(rest))])
    elif lead and values.type.rank > len(rest) - lead:
        wide = [*(self.shape[i] for i in range(lead)), *flat.shape, *(self.shape[i] for i in rest[lead:])]
        values = c.expand(values, wide)
        values = c.transpose(values, [*range(lead, lead + n), *range(lead), *range(lead + n, n + len(rest))])
    put = c.b.index_put(x, flat, values, accumulate=accumulate)
    moved = c.reshape(put, [self.shape[a] for a in axes] + [self.shape[i] for i in rest])
    order = [*axes, *rest]
    return c.transpose(moved, [order.index(i) for i in range(self.type.rank)])
