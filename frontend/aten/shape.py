"""Views and rearrangements. Shapes come from torch's own inference, so −1 and broadcasting are resolved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy

from moec.frontend.aten.registry import lowers
from moec.frontend.context import Context, Number, Size, as_number
from moec.ir import Dim, DType, TensorType, Value
from moec.ir.dims import size


@lowers(
    "view", "reshape", "_unsafe_view", "_reshape_alias", "unsqueeze", "squeeze", "squeeze.dim", "squeeze.dims",
    "flatten.using_ints", "unflatten.int", "view_as",
)  # fmt: skip
def reshape(c: Context, self: Value) -> Value:
    return c.reshape(self, c.out_type.shape)


@lowers("view.dtype", "resize_", "resize", "resize_as_", "resize_as")
def memory_layout(c: Context) -> Value:
    raise c.refuse("it depends on how the tensor lies in memory", hint="use reshape, indexing or .to(dtype)")


@lowers("permute")
def permute(c: Context, self: Value, dims: Sequence[int]) -> Value:
    return c.transpose(self, [c.axis(d, self) for d in dims])


@lowers("transpose.int")
def transpose(c: Context, self: Value, dim0: int, dim1: int) -> Value:
    perm = list(range(self.type.rank))
    if perm:
        i, j = c.axis(dim0, self), c.axis(dim1, self)
        perm[i], perm[j] = perm[j], perm[i]
    return c.transpose(self, perm)


@lowers("t", "numpy_T", "mT")
def t(c: Context, self: Value) -> Value:
    return transpose(c, self, -2, -1) if self.type.rank >= 2 else self


@lowers("expand", "expand_as", "broadcast_to")
def expand(c: Context, self: Value) -> Value:
    return c.expand(self, c.out_type.shape)


@lowers("broadcast_tensors")
def broadcast_tensors(c: Context, tensors: list[Value]) -> list[Value]:
    return [c.expand(x, t.shape) for x, t in zip(tensors, c.out, strict=True)]


@lowers("repeat")
def repeat(c: Context, self: Value, repeats: Sequence[Size]) -> Value:
    shape = [1] * (len(repeats) - self.type.rank) + list(self.shape)
    if all(r == 1 or s == 1 for r, s in zip(repeats, shape, strict=True)):
        return c.expand(c.reshape(self, shape), [s * r for s, r in zip(shape, repeats, strict=True)])
    inner = c.reshape(self, [v for s in shape for v in (1, s)])
    wide = c.expand(inner, [v for r, s in zip(repeats, shape, strict=True) for v in (r, s)])
    return c.reshape(wide, c.out_type.shape)


@lowers("repeat_interleave.self_int")
def repeat_interleave(c: Context, self: Value, repeats: Size, dim: int | None) -> Value:
    x = self if dim is not None else c.reshape(self, (self.type.numel,))
    at = c.axis(dim or 0, x)
    inner = c.reshape(x, (*x.shape[: at + 1], 1, *x.shape[at + 1 :]))
    wide = c.expand(inner, (*x.shape[: at + 1], repeats, *x.shape[at + 1 :]))
    return c.reshape(wide, c.out_type.shape)


_OPEN = 2**62  # an end from here on is none


def slice_bounds(c: Context, extent: Size, start: Any, end: Any, length: Size) -> tuple[Size, Size]:
    """0 ≤ start ≤ end ≤ extent from Python's rules. Where torch knows the slice's `length` without a minimum or
    maximum in it, no bound is cut; the sign of a symbolic bound is that which it is written with."""
    clips = _clips(length)

    def clip(v: Any, default: Size) -> Size:
        if v is None or (isinstance(v, int) and v >= _OPEN):
            return default
        negative = v < 0 if isinstance(v, int) else _is_negative(v)
        v = extent + v if negative else v
        if isinstance(v, int) and (isinstance(extent, int) or not clips):
            return min(max(v, 0), extent) if isinstance(extent, int) else max(v, 0)
        if not clips:
            return v
        return size(sympy.Max(0, _expr(v)) if negative else sympy.Min(_expr(v), _expr(extent)))

    first, last = clip(start, 0), clip(end, extent)
    if isinstance(first, int) and isinstance(last, int):
        last = max(first, last)
    return first, last


def _clips(length: Size) -> bool:
    return isinstance(length, Dim) and bool(length.expr.has(sympy.Max, sympy.Min))


def _expr(v: Size) -> sympy.Expr:
    return v.expr if isinstance(v, Dim) else sympy.Integer(v)


def _is_negative(d: Dim) -> bool:
    return bool(d.expr.could_extract_minus_sign())


@lowers("slice.Tensor")
def slice_(c: Context, self: Value, dim: int, start: Any, end: Any, step: int) -> Value:
    axis = c.axis(dim, self)
    length = c.out_type.shape[axis]
    first, last = slice_bounds(c, self.shape[axis], start, end, length)
    if step == 1 or length == 0 or _clips(length):
        last = first + step * length  # so that the slice has torch's length by its very form; backends cut the end
    return c.slice(self, axis, first, last, step)


@lowers("narrow")
def narrow(c: Context, self: Value, dim: int, start: Any, length: Any) -> Value:
    return slice_(c, self, dim, start, None, 1)


@lowers("select.int")
def select(c: Context, self: Value, dim: int, index: Any) -> Value:
    axis = c.axis(dim, self)
    negative = index < 0 if isinstance(index, int) else _is_negative(index)
    at = self.shape[axis] + index if negative else index
    return c.reshape(c.slice(self, axis, at, at + 1), c.out_type.shape)


@lowers("split.Tensor", "split_with_sizes", "chunk", "tensor_split.sections", "unsafe_split.Tensor")
def split(c: Context, self: Value, dim: int) -> list[Value]:
    axis = c.axis(dim, self)
    sizes = tuple(t.shape[axis] for t in c.out)
    if len(sizes) == 1:
        return [self]
    return list(c.b.split(self, axis=axis, sizes=sizes))


@lowers("unbind.int")
def unbind(c: Context, self: Value, dim: int) -> list[Value]:
    axis = c.axis(dim, self)
    parts = [self] if len(c.out) == 1 else c.b.split(self, axis=axis, sizes=(1,) * len(c.out))
    return [c.reshape(p, t.shape) for p, t in zip(parts, c.out, strict=True)]


@lowers("cat")
def cat(c: Context, tensors: list[Value], dim: int) -> Value:
    t = c.out_type
    parts = [c.cast(x, t.dtype) for x in tensors if x.shape != (0,) or t.rank == 1]  # torch skips legacy empties
    return c.concat(parts, c.axis(dim, t.rank)) if parts else c.full(t.shape, 0, t.dtype)


@lowers("stack")
def stack(c: Context, tensors: list[Value], dim: int) -> Value:
    t = c.out_type
    axis = c.axis(dim, t.rank)
    shape = [1 if i == axis else s for i, s in enumerate(t.shape)]
    return c.concat([c.reshape(c.cast(x, t.dtype), shape) for x in tensors], axis)


@lowers("slice_scatter")
def slice_scatter(c: Context, self: Value, src: Value, dim: int, start: Any, end: Any, step: int) -> Value:
    """x with x[start:end:step] replaced. A step that divides the axis splits it into `step` phases. The pieces of
    earlier writes are remembered, so that filling an empty tensor piece by piece leaves only the written pieces."""
    axis = c.axis(dim, self)
    extent = self.shape[axis]
    first, _ = slice_bounds(c, extent, start, end, src.shape[axis])
    src = c.cast(src, self.dtype)
    if step == 1:
        return _write_segment(c, self, src, axis, first)
    known_sizes = isinstance(extent, int) and isinstance(first, int) and extent % step == 0 and first < step
    if not known_sizes or src.shape[axis] != extent // step:
        from moec.frontend.aten.index import index_copy

        rows = c.b.mul(c.b.arange(end=src.shape[axis]), c.value(step, DType.I64))
        return index_copy(c, self, axis, c.b.add(rows, c.value(first, DType.I64)), src)
    split_shape = (*self.shape[:axis], extent // step, step, *self.shape[axis + 1 :])
    known = c.phases.get(self)
    if known is not None and known[0] == axis and len(known[1]) == step:
        phases = list(known[1])
    else:
        phases = list(c.b.split(c.reshape(self, split_shape), axis=axis + 1, sizes=(1,) * step))
    assert isinstance(first, int)
    phases[first] = c.reshape(src, (*split_shape[: axis + 1], 1, *split_shape[axis + 2 :]))
    out = c.reshape(c.concat(phases, axis + 1), self.shape)
    c.phases[out] = (axis, phases)
    return out


def _write_segment(c: Context, x: Value, src: Value, axis: int, first: Size) -> Value:
    """x with src at `first` along `axis`."""
    last = first + src.shape[axis]
    known = c.segments.get(x)
    parts = known[1] if known is not None and known[0] == axis else [x]
    before: list[Value] = []
    after: list[Value] = []
    at: Size = 0
    for p in parts:
        end = at + p.shape[axis]
        left, right = _precedes(at, first), _precedes(last, end)
        inside, beyond = _precedes(first, end), _precedes(at, last)
        if None in (left, right, inside, beyond):  # which piece the bounds fall into depends on the sizes
            return c.concat([c.slice(x, axis, 0, first), src, c.slice(x, axis, last, x.shape[axis])], axis)
        if left:
            before.append(c.slice(p, axis, 0, (first if inside else end) - at))
        if right:
            after.append(c.slice(p, axis, (last if beyond else at) - at, end - at))
        at = end
    pieces = [*before, src, *after]
    if len(pieces) == 1:
        return src
    out = c.concat(pieces, axis)
    c.segments[out] = (axis, pieces)
    return out


def _precedes(a: Size, b: Size) -> bool | None:
    """Whether a < b (≤ where symbolic: the piece between may be empty); None if that depends on the symbols."""
    difference = b - a
    if isinstance(difference, int):
        return difference > 0
    if difference.expr.is_nonnegative:
        return True
    return False if difference.expr.is_nonpositive else None


@lowers("select_scatter")
def select_scatter(c: Context, self: Value, src: Value, dim: int, index: Any) -> Value:
    axis = c.axis(dim, self)
    at = self.shape[axis] + index if isinstance(index, int) and index < 0 else index
    row = c.reshape(src, [1 if i == axis else s for i, s in enumerate(self.shape)])
    return slice_scatter(c, self, row, axis, at, at + 1, 1)


@lowers("flip")
def flip(c: Context, self: Value, dims: Sequence[int]) -> Value:
    x = self
    for axis in sorted({c.axis(d, self) for d in dims}) if self.type.rank else ():
        n = self.shape[axis]
        x = c.b.gather(x, c.b.sub(c.value(n - 1, DType.I64), c.b.arange(end=n)), axis=axis)
    return x


@lowers("roll")
def roll(c: Context, self: Value, shifts: Sequence[Size], dims: Sequence[int]) -> Value:
    if not dims:
        flat = c.reshape(self, (self.type.numel,))
        return c.reshape(_roll_axis(c, flat, 0, shifts[0]), self.shape)
    x = self
    for shift, d in zip(shifts, dims, strict=True):
        x = _roll_axis(c, x, c.axis(d, self), shift)
    return x


def _roll_axis(c: Context, x: Value, axis: int, shift: Size) -> Value:
    n = x.shape[axis]
    if n == 0 or not x.type.rank:
        return x
    positions = c.b.sub(c.b.arange(end=n), c.value(shift, DType.I64))
    return c.b.gather(x, c.b.mod(positions, c.value(n, DType.I64)), axis=axis)


@lowers("constant_pad_nd")
def constant_pad(c: Context, self: Value, pad: Sequence[Size], value: Number) -> Value:
    rank = self.type.rank
    before: list[Size] = [0] * rank
    after: list[Size] = [0] * rank
    x = self
    for i in range(len(pad) // 2):
        axis = rank - 1 - i
        lo, hi = pad[2 * i], pad[2 * i + 1]
        if isinstance(lo, int) and isinstance(hi, int) and (lo < 0 or hi < 0):
            x = c.slice(x, axis, max(-lo, 0), x.shape[axis] - max(-hi, 0))
            lo, hi = max(lo, 0), max(hi, 0)
        before[axis], after[axis] = lo, hi
    return c.b.pad(x, before=tuple(before), after=tuple(after), value=as_number(value, x.dtype))


@lowers("tril")
def tril(c: Context, self: Value, diagonal: int) -> Value:
    return _triangle(c, self, diagonal, "le")


@lowers("triu")
def triu(c: Context, self: Value, diagonal: int) -> Value:
    return _triangle(c, self, diagonal, "ge")


def _triangle(c: Context, x: Value, diagonal: int, compare: str) -> Value:
    """Keeps x[i, j] with j − i ≤ diagonal (or ≥)."""
    rows, columns = x.shape[-2:]
    i = c.b.reshape(c.b.arange(end=rows), shape=(rows, 1))
    limit = i if diagonal == 0 else c.b.add(i, diagonal)
    keep = c.b.op(f"math.{compare}", (c.b.arange(end=columns), limit))
    return c.b.where(keep, x, c.value(0, x.dtype))


@lowers("diagonal")
def diagonal(c: Context, self: Value, offset: int, dim1: int, dim2: int) -> Value:
    i, j = c.axis(dim1, self), c.axis(dim2, self)
    x = c.transpose(self, [a for a in range(self.type.rank) if a not in (i, j)] + [i, j])
    rows, columns, count = *x.shape[-2:], c.out_type.shape[-1]
    flat = c.reshape(x, (*x.shape[:-2], TensorType(x.dtype, (rows, columns)).numel))
    start: Size = offset if offset >= 0 else -offset * columns
    index = c.b.add(c.b.mul(c.b.arange(end=count), c.value(columns + 1, DType.I64)), c.value(start, DType.I64))
    return c.b.gather(flat, index, axis=x.type.rank - 2)
