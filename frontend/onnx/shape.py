"""Shapes, and what makes, joins, cuts and pads tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import sympy

from moec.frontend.onnx.context import ImportContext, Size
from moec.frontend.onnx.grouped import joined_products
from moec.frontend.onnx.index import ascends
from moec.frontend.onnx.registry import imports
from moec.ir import Dim, DType, Value
from moec.ir.arrays import dtype_of
from moec.ir.dims import product
from moec.ir.dims import size as as_size
from moec.ir.types import broadcast


@imports("Shape")
def shape(c: ImportContext, x: Value, *, start: int | None, end: int | None) -> Value:
    return c.of_sizes(x.shape[slice(start or 0, end)])


@imports("Size")
def size(c: ImportContext, x: Value) -> Value:
    return c.of_sizes([x.type.numel], scalar=True)


def _target(c: ImportContext, x: Value, wanted: tuple[Size, ...], allowzero: int | None) -> list[Size]:
    """The shape that a Reshape gives, −1 and 0 resolved."""
    found: list[Any] = []
    for i, s in enumerate(wanted):
        if s == 0 and not allowzero:
            if i >= x.type.rank:
                raise c.refuse(f"copies axis {i} of {x.type}", code="type")
            s = x.shape[i]
        found.append(s)
    if sum(1 for s in found if s == -1) > 1:
        raise c.refuse("two sizes of −1", code="type")
    if -1 in found:
        rest = product([s for s in found if s != -1])
        numel = x.type.numel
        if rest == 0:
            raise c.refuse("−1 beside an axis of size 0")
        if isinstance(rest, int) and isinstance(numel, int) and numel % rest:
            raise c.refuse(f"{numel} elements do not divide by {rest}", code="type")
        quotient = _quotient(numel, rest)
        if quotient is None:
            raise c.refuse(f"−1 stands for {numel} / {rest}")
        found[found.index(-1)] = quotient
    if any(isinstance(s, int) and s < 0 for s in found):
        raise c.refuse(f"a negative size in {found}", code="type")
    return found


def _quotient(a: Size, b: Size) -> Size | None:
    """a / b where it divides whatever the symbols are; `floor` of anything else would be another size."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    ratio = sympy.cancel(_expr(a) / _expr(b))
    if sympy.fraction(ratio)[1] != 1:
        return a // b if isinstance(b, int) else None
    return as_size(ratio)


def _expr(x: Size) -> Any:
    return x.expr if isinstance(x, Dim) else sympy.Integer(x)


@imports("Reshape", since=5)
def reshape(c: ImportContext, x: Value, shape: Value, *, allowzero: int | None) -> Value:
    wanted = c.elements(shape)
    if wanted is None:
        raise c.refuse("the shape is known only at run time")
    target = _target(c, x, wanted, allowzero)
    many, wanted_many = x.type.numel, product(target)
    if many != wanted_many and 0 not in (many, wanted_many):
        left, right = sympy.fraction(sympy.cancel(_expr(many) / _expr(wanted_many)))
        c.need(as_size(left), as_size(right))
    return c.reshape(x, target)


@imports("Reshape")
def reshape_1(c: ImportContext, x: Value, *, shape: Any) -> Value:
    return c.reshape(x, _target(c, x, tuple(shape or ()), 0))


@imports("Flatten")
def flatten(c: ImportContext, x: Value, *, axis: int) -> Value:
    at = axis + x.type.rank if axis < 0 else axis
    parts = x.shape[:at], x.shape[at:]
    return c.reshape(x, [product(p) for p in parts])


@imports("Squeeze", since=13)
def squeeze(c: ImportContext, x: Value, axes: Value | None = None) -> Value:
    return _squeeze(c, x, c.ints(axes, "axes"))


@imports("Squeeze")
def squeeze_1(c: ImportContext, x: Value, *, axes: Any) -> Value:
    return _squeeze(c, x, axes)


def _squeeze(c: ImportContext, x: Value, axes: Any) -> Value:
    if axes is None:
        if not x.type.is_static:
            raise c.refuse("without axes, of unknown sizes")
        axes = [i for i, s in enumerate(x.shape) if s == 1]
    axes = [c.norm_axis(a, x.type.rank) for a in axes]
    if any(x.shape[a] != 1 for a in axes):
        raise c.refuse(f"axes {axes} of {x.type} are not all 1")
    return c.reshape(x, [s for i, s in enumerate(x.shape) if i not in axes])


@imports("Unsqueeze", since=13)
def unsqueeze(c: ImportContext, x: Value, axes: Value) -> Value:
    return _unsqueeze(c, x, c.ints(axes, "axes"))


@imports("Unsqueeze")
def unsqueeze_1(c: ImportContext, x: Value, *, axes: Any) -> Value:
    return _unsqueeze(c, x, axes)


def _unsqueeze(c: ImportContext, x: Value, axes: Any) -> Value:
    rank = x.type.rank + len(axes)
    new = {c.norm_axis(a, rank) for a in axes}
    if len(new) < len(axes):
        raise c.refuse(f"axes {axes} repeat", code="type")
    old = iter(x.shape)
    return c.reshape(x, [1 if i in new else next(old) for i in range(rank)])


@imports("Transpose")
def transpose(c: ImportContext, x: Value, *, perm: Any) -> Value:
    rank = x.type.rank
    return c.transpose(x, tuple(reversed(range(rank))) if perm is None else [c.norm_axis(p, rank) for p in perm])


@imports("Expand", since=8)
def expand(c: ImportContext, x: Value, shape: Value) -> Value:
    wanted = c.elements(shape)
    if wanted is None:
        raise c.refuse("the shape is known only at run time")
    return c.expand(x, broadcast(x.shape, wanted))


@imports("Tile", since=6)
def tile(c: ImportContext, x: Value, repeats: Value) -> Value:
    counts = c.ints(repeats, "repeats")
    if counts is None or len(counts) != x.type.rank:
        raise c.refuse(f"repeats {counts} of {x.type}", code="type")
    if all(n == 1 for n in counts):
        return x
    split = [s for n in x.shape for s in (1, n)]
    wide = [s for n, size in zip(counts, x.shape, strict=True) for s in (n, size)]
    repeated = c.expand(c.reshape(x, split), wide)
    return c.reshape(repeated, [n * s for n, s in zip(counts, x.shape, strict=True)])


@imports("Concat", since=4)
def concat(c: ImportContext, *xs: Value, axis: int) -> Value:
    axis = c.norm_axis(axis, xs[0].type.rank)
    if len({x.type.rank for x in xs}) > 1:
        raise c.refuse(f"of {', '.join(str(x.type) for x in xs)}: they differ in rank", code="type")
    for x in xs[1:]:
        for i, (a, b) in enumerate(zip(xs[0].shape, x.shape, strict=True)):
            if i != axis and isinstance(a, Dim) and isinstance(b, Dim) and a.is_symbol and b.is_symbol:
                c.need(a, b)
    found = joined_products(c, xs, axis)
    return c.concat(list(xs), axis) if found is None else found


@imports("Split", since=13)
def split(c: ImportContext, x: Value, sizes: Value | None = None, *, axis: int, num_outputs: int | None) -> list[Value]:
    return _split(c, x, c.ints(sizes, "split"), axis)


@imports("Split")
def split_2(c: ImportContext, x: Value, *, axis: int, split: Any) -> list[Value]:
    return _split(c, x, split, axis)


def _split(c: ImportContext, x: Value, sizes: Any, axis: int) -> list[Value]:
    axis = c.norm_axis(axis, x.type.rank)
    if sizes is None:
        extent, parts = x.shape[axis], c.outputs
        if not isinstance(extent, int):
            raise c.refuse(f"{extent} into {parts} parts")
        part = math.ceil(extent / parts)
        sizes = [min(part, max(0, extent - i * part)) for i in range(parts)]
    return list(_many(c.b.split(x, axis=axis, sizes=tuple(sizes))))


def _many(x: Any) -> tuple[Value, ...]:
    return x if isinstance(x, tuple) else (x,)


def _planes(c: ImportContext, x: Value, blocksize: int) -> tuple[Size, ...]:
    if x.type.rank != 4 or blocksize < 1:
        raise c.refuse(f"of {x.type} in blocks of {blocksize}", code="type")
    return x.shape


@imports("DepthToSpace")
def depth_to_space(c: ImportContext, x: Value, *, blocksize: int, mode: str | None) -> Value:
    n, channels, h, w = _planes(c, x, blocksize)
    if not isinstance(channels, int):
        raise c.refuse(f"of {x.type}")
    b, rest = blocksize, channels // blocksize**2
    if mode == "CRD":
        wide, perm = (n, rest, b, b, h, w), (0, 1, 4, 2, 5, 3)
    else:
        wide, perm = (n, b, b, rest, h, w), (0, 3, 4, 1, 5, 2)
    return c.reshape(c.transpose(c.reshape(x, wide), perm), (n, rest, h * b, w * b))


@imports("SpaceToDepth")
def space_to_depth(c: ImportContext, x: Value, *, blocksize: int) -> Value:
    n, channels, h, w = _planes(c, x, blocksize)
    if not isinstance(h, int) or not isinstance(w, int) or h % blocksize or w % blocksize:
        raise c.refuse(f"of {x.type}")
    b = blocksize
    split = c.reshape(x, (n, channels, h // b, b, w // b, b))
    return c.reshape(c.transpose(split, (0, 3, 5, 1, 2, 4)), (n, channels * b * b, h // b, w // b))


@imports("ConstantOfShape", since=9)
def constant_of_shape(c: ImportContext, shape: Value, *, value: Any) -> Value:
    wanted = c.elements(shape)
    if wanted is None:
        raise c.refuse("the shape is known only at run time")
    array = np.zeros(1, np.float32) if value is None else np.asarray(value)
    dtype = dtype_of(array)
    v = c.full(wanted, array.reshape(-1)[0].item(), dtype)
    if all(isinstance(s, int) for s in wanted) and product(wanted) <= 64:  # type: ignore[operator]  # ints
        c.arrays[v] = np.full(tuple(int(s) for s in wanted if isinstance(s, int)), array.reshape(-1)[0])
    return v


@imports("Range", since=11)
def range_(c: ImportContext, start: Value, limit: Value, delta: Value) -> Value:
    if not start.dtype.is_integer:
        raise c.refuse("of floats")
    ends = c.elements(start), c.elements(limit)
    step = c.scalar(delta, "delta")
    if ends[0] is None or ends[1] is None:
        raise c.refuse("the limits are known only at run time")
    if step < 1:
        raise c.refuse(f"step {step}")
    first, last = ends[0][0], ends[1][0]
    if not ascends(first, last):
        raise c.refuse(f"from {first} to {last}")
    return c.b.arange(start=first, end=last, step=step, dtype=start.dtype)


@imports("Trilu", since=14)
def trilu(c: ImportContext, x: Value, k: Value | None = None, *, upper: int) -> Value:
    diagonal = c.scalar(k, "k") or 0
    rows, columns = x.shape[-2:]
    row = c.reshape(c.b.arange(end=rows), (rows, 1))
    column = c.reshape(c.b.arange(end=columns), (1, columns))
    distance = c.b.sub(column, row)
    keep = c.b.op("math.ge" if upper else "math.le", (distance, c.b.const(diagonal, DType.I64)))
    zero = c.value(False if x.dtype is DType.BOOL else 0, x.dtype)
    return c.b.where(keep, x, zero)
