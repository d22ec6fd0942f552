"""Pad, and the zeros around convolutions and pools."""

from __future__ import annotations

from collections.abc import Sequence

from moec.frontend.onnx.context import ImportContext, Size
from moec.frontend.onnx.registry import imports
from moec.ir import DType, Value

Sides = tuple[tuple[int, ...], tuple[int, ...]]


@imports("Pad", since=11)
def pad(c: ImportContext, x: Value, pads: Value, value: Value | None = None, axes: Value | None = None, *,
        mode: str) -> Value:  # fmt: skip
    amounts = c.ints(pads, "pads")
    assert amounts is not None
    chosen = c.ints(axes, "axes")
    fill = c.scalar(value, "the value")
    return _padded(c, x, amounts, range(x.type.rank) if chosen is None else chosen, fill, mode)


@imports("Pad", since=2)
def pad_2(c: ImportContext, x: Value, *, mode: str, pads: Sequence[int], value: float) -> Value:
    return _padded(c, x, pads, range(x.type.rank), value, mode)


def _padded(c: ImportContext, x: Value, amounts: Sequence[int], axes: Sequence[int], fill: float | None,
            mode: str) -> Value:  # fmt: skip
    axes = [c.norm_axis(a, x.type.rank) for a in axes]
    if len(amounts) != 2 * len(axes):
        raise c.refuse(f"{len(amounts)} pads for {len(axes)} axes", code="type")
    before, after = [0] * x.type.rank, [0] * x.type.rank
    for i, axis in enumerate(axes):
        before[axis], after[axis] = amounts[i], amounts[i + len(axes)]
    if mode == "constant":
        x = cropped(c, x, before, after)
        fill = (False if x.dtype is DType.BOOL else 0.0 if x.dtype.is_float else 0) if fill is None else fill
        more = [tuple(max(n, 0) for n in side) for side in (before, after)]
        return c.b.pad(x, before=more[0], after=more[1], value=fill)
    if min(amounts, default=0) < 0:
        raise c.refuse(f"negative pads {tuple(amounts)}, mode {mode!r}")
    for axis, (b, a) in enumerate(zip(before, after, strict=True)):
        if b or a:
            x = c.b.gather(x, _sources(c, x.shape[axis], b, a, mode), axis=axis)
    return x


def _sources(c: ImportContext, size: Size, before: int, after: int, mode: str) -> Value:
    """i64[before + size + after]: where the elements of a padded axis come from."""
    if mode not in ("reflect", "edge", "wrap"):
        raise c.refuse(f"mode {mode!r}")
    last = c.value(size - 1, DType.I64)
    place = c.b.sub(c.b.arange(end=size + (before + after)), c.value(before, DType.I64))
    if mode == "reflect":
        if isinstance(size, int) and max(before, after) < size:
            return c.b.sub(last, c.b.abs(c.b.sub(last, c.b.abs(place))))
        # there and back takes 2 · last steps; of a single element, which has no other side, one
        span = c.b.mul(last, c.value(2, DType.I64))
        place = c.b.mod(place, c.b.max(span, c.value(1, DType.I64)))
        return c.b.min(place, c.b.sub(span, place))
    if mode == "edge":
        return c.b.min(c.b.max(place, c.value(0, DType.I64)), last)
    return c.b.mod(place, c.value(size, DType.I64))


def cropped(c: ImportContext, x: Value, before: Sequence[int], after: Sequence[int]) -> Value:
    """x without what negative amounts take away at either end of each axis."""
    for axis, (b, a) in enumerate(zip(before, after, strict=True)):
        if b < 0 or a < 0:
            x = c.slice(x, axis, max(-b, 0), x.shape[axis] - max(-a, 0))
    return x


def around(c: ImportContext, auto_pad: str, pads: Sequence[int] | None, sizes: Sequence[Size],
           kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Sides:  # fmt: skip
    """Elements before and after each spatial axis of a convolution or pool, as its attributes say."""
    n = len(kernel)
    if len(stride) != n or len(dilation) != n or min((*stride, *dilation), default=1) < 1:
        raise c.refuse(f"strides {tuple(stride)}, dilations {tuple(dilation)} of a kernel {tuple(kernel)}", code="type")
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        totals = [_same(c, *given) for given in zip(sizes, kernel, stride, dilation, strict=True)]
        less, more = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
        return (less, more) if auto_pad == "SAME_UPPER" else (more, less)
    if auto_pad == "VALID" or not pads:
        return (0,) * n, (0,) * n
    if len(pads) != 2 * n or min(pads) < 0:
        raise c.refuse(f"pads {tuple(pads)} for {n} axes")
    return tuple(pads[:n]), tuple(pads[n:])


def _same(c: ImportContext, size: Size, kernel: int, stride: int, dilation: int) -> int:
    """How many elements an axis needs for ⌈size / stride⌉ results."""
    reach = dilation * (kernel - 1) + 1
    if stride == 1:
        return reach - 1
    if not isinstance(size, int):
        raise c.refuse(f"auto_pad of an axis of size {size} in steps of {stride}")
    return max(0, (-(-size // stride) - 1) * stride + reach - size)
