"""Reductions, softmax, scans, sorting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moec.frontend.onnx.context import ImportContext
from moec.frontend.onnx.registry import imports
from moec.ir import DType, Value
from moec.ir.dims import product


def _axes(c: ImportContext, x: Value, axes: Any) -> tuple[int, ...]:
    if axes is None or len(axes) == 0:
        return tuple(range(x.type.rank))
    return tuple(sorted(c.norm_axis(a, x.type.rank) for a in axes))


def _sum(c: ImportContext, x: Value, axes: tuple[int, ...], keep: bool) -> Value:
    return c.b.sum(x, axes=axes, keepdim=keep)


def _mean(c: ImportContext, x: Value, axes: tuple[int, ...], keep: bool) -> Value:
    return c.b.mean(x, axes=axes, keepdim=keep)


def _max(c: ImportContext, x: Value, axes: tuple[int, ...], keep: bool) -> Value:
    return c.b.op("math.any" if x.dtype is DType.BOOL else "math.amax", (x,), {"axes": axes, "keepdim": keep})


def _min(c: ImportContext, x: Value, axes: tuple[int, ...], keep: bool) -> Value:
    return c.b.op("math.all" if x.dtype is DType.BOOL else "math.amin", (x,), {"axes": axes, "keepdim": keep})


def _l1(c: ImportContext, x: Value, axes: tuple[int, ...], keep: bool) -> Value:
    return _sum(c, c.b.abs(x), axes, keep)


def _square(c: ImportContext, x: Value, axes: tuple[int, ...], keep: bool) -> Value:
    return _sum(c, c.b.mul(x, x), axes, keep)


def _l2(c: ImportContext, x: Value, axes: tuple[int, ...], keep: bool) -> Value:
    c.floats(x)
    return c.b.sqrt(_square(c, x, axes, keep))


def _log_sum(c: ImportContext, x: Value, axes: tuple[int, ...], keep: bool) -> Value:
    c.floats(x)
    return c.b.log(_sum(c, x, axes, keep))


def _log_sum_exp(c: ImportContext, x: Value, axes: tuple[int, ...], keep: bool) -> Value:
    """Relative to the maximum, so that nothing overflows; an infinite maximum is taken for 0."""
    c.floats(x)
    if any(x.shape[a] == 0 or not isinstance(x.shape[a], int) for a in axes):
        raise c.refuse("over axes that may be empty")
    top = c.b.amax(x, axes=axes, keepdim=True)
    top = c.b.where(c.b.lt(c.b.abs(top), float("inf")), top, c.b.const(0.0, x.dtype))
    total = c.b.add(c.b.log(c.b.sum(c.b.exp(c.b.sub(x, top)), axes=axes, keepdim=True)), top)
    return total if keep else c.reshape(total, [s for i, s in enumerate(x.shape) if i not in axes])


def _product(c: ImportContext, x: Value, axes: tuple[int, ...], keep: bool) -> Value:
    """Of sizes: how many elements there are."""
    sizes = c.elements(x)
    if sizes is None or x.dtype is not DType.I64:
        raise c.refuse("of anything but sizes")
    if not axes:
        return x
    return c.of_sizes([product(sizes)], scalar=not keep)


# the opset from which axes are an operand
REDUCTIONS: dict[str, tuple[int, Callable[..., Value]]] = {
    "ReduceSum": (13, _sum), "ReduceMean": (18, _mean), "ReduceMax": (18, _max), "ReduceMin": (18, _min),
    "ReduceL1": (18, _l1), "ReduceL2": (18, _l2), "ReduceSumSquare": (18, _square), "ReduceLogSum": (18, _log_sum),
    "ReduceLogSumExp": (18, _log_sum_exp), "ReduceProd": (18, _product),
}  # fmt: skip


def _reduction(name: str, since: int, build: Callable[..., Value]) -> None:
    @imports(name, since=since)
    def by_operand(
        c: ImportContext, x: Value, axes: Value | None = None, *, keepdims: int, noop_with_empty_axes: int
    ) -> Value:
        given = c.ints(axes, "axes")
        if noop_with_empty_axes and not given:
            if name not in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd"):
                raise c.refuse("without axes and noop_with_empty_axes")
            return x
        return build(c, x, _axes(c, x, given), bool(keepdims))

    @imports(name)
    def by_attribute(c: ImportContext, x: Value, *, axes: Any, keepdims: int) -> Value:
        return build(c, x, _axes(c, x, axes), bool(keepdims))


for _name, (_since, _build) in REDUCTIONS.items():
    _reduction(_name, _since, _build)


@imports("ArgMax")
def argmax(c: ImportContext, x: Value, *, axis: int, keepdims: int, select_last_index: int | None) -> Value:
    if select_last_index:
        raise c.refuse("the last of several")
    return c.b.argmax(x, axis=c.norm_axis(axis, x.type.rank), keepdim=bool(keepdims))


@imports("ArgMin")
def argmin(c: ImportContext, x: Value, *, axis: int, keepdims: int, select_last_index: int | None) -> Value:
    c.floats(x)
    return argmax(c, c.b.neg(x), axis=axis, keepdims=keepdims, select_last_index=select_last_index)


def _softmax(name: str, op: str) -> None:
    @imports(name, since=13)
    def softmax(c: ImportContext, x: Value, *, axis: int) -> Value:
        return c.b.op(op, (x,), {"axis": c.norm_axis(axis, x.type.rank)})

    @imports(name)
    def softmax_of_rows(c: ImportContext, x: Value, *, axis: int) -> Value:
        """Until opset 12: over all axes from `axis` on."""
        axis = c.norm_axis(axis, x.type.rank) if x.type.rank else 0
        if axis == x.type.rank - 1:
            return c.b.op(op, (x,), {"axis": axis})
        flat = c.reshape(x, (*x.shape[:axis], x.type.with_shape(x.shape[axis:]).numel))
        return c.reshape(c.b.op(op, (flat,), {"axis": axis}), x.shape)


_softmax("Softmax", "math.softmax")
_softmax("LogSoftmax", "math.log_softmax")


def _hardmax(c: ImportContext, x: Value, axis: int) -> Value:
    """1 at the first maximum along an axis, 0 elsewhere."""
    rank, size = x.type.rank, x.shape[axis]
    if not isinstance(size, int):
        raise c.refuse(f"along an axis of unknown size {size}")
    ones = c.cast(c.b.one_hot(c.b.argmax(x, axis=axis), depth=size), x.dtype)
    perm = [*range(axis), rank - 1, *range(axis, rank - 1)]
    return c.transpose(ones, perm)


@imports("Hardmax", since=13)
def hardmax(c: ImportContext, x: Value, *, axis: int) -> Value:
    return _hardmax(c, x, c.norm_axis(axis, x.type.rank))


@imports("Hardmax")
def hardmax_of_rows(c: ImportContext, x: Value, *, axis: int) -> Value:
    """Until opset 12: over all axes from `axis` on."""
    axis = c.norm_axis(axis, x.type.rank)
    flat = c.reshape(x, (*x.shape[:axis], x.type.with_shape(x.shape[axis:]).numel))
    return c.reshape(_hardmax(c, flat, axis), x.shape)


@imports("CumSum", since=11)
def cumsum(c: ImportContext, x: Value, axis: Value, *, exclusive: int, reverse: int) -> Value:
    if reverse:
        raise c.refuse("in reverse")
    at = c.norm_axis(c.scalar(axis, "the axis"), x.type.rank)
    total = c.b.cumsum(x, axis=at)
    return c.b.sub(total, x) if exclusive and not x.dtype.is_float else _exclusive(c, total, at) if exclusive else total


def _exclusive(c: ImportContext, total: Value, axis: int) -> Value:
    size = total.shape[axis]
    if not isinstance(size, int):
        raise c.refuse("exclusive, along an axis of unknown size")
    before = [1 if i == axis else 0 for i in range(total.type.rank)]
    zero = [0] * total.type.rank
    padded = c.b.pad(total, before=tuple(before), after=tuple(zero), value=0.0)
    return c.slice(padded, axis, 0, size)


@imports("TopK", since=10)
def topk(c: ImportContext, x: Value, k: Value, *, axis: int, largest: int | None, sorted: int | None) -> list[Value]:
    axis = c.norm_axis(axis, x.type.rank)
    if c.elements(k) == (x.shape[axis],) and not isinstance(x.shape[axis], int):
        return list(c.b.sort(x, axis=axis, descending=largest is None or bool(largest)))
    count = c.ints(k, "k")
    if count is None or len(count) != 1:
        raise c.refuse(f"k is {count}, expected one number", code="type")
    return list(c.b.topk(x, k=count[0], axis=axis, largest=largest is None or bool(largest)))
