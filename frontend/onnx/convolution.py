"""Convolution and its transpose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moec.frontend.onnx.context import ImportContext
from moec.frontend.onnx.padding import around, cropped
from moec.frontend.onnx.registry import imports
from moec.ir import Value

Ints = Sequence[int] | None


def _kernel(c: ImportContext, x: Value, weight: Value, kernel_shape: Ints) -> tuple[int, ...]:
    """The spatial sizes of a kernel. Raises CompileError where it is none for x."""
    if not 1 <= x.type.rank - 2 <= 3 or not weight.type.is_static or weight.type.rank != x.type.rank:
        raise c.refuse(f"of {x.type} with a kernel {weight.type}")
    if kernel_shape and tuple(kernel_shape) != weight.shape[2:]:
        raise c.refuse(f"kernel_shape {tuple(kernel_shape)} of a kernel {weight.type}", code="type")
    return tuple(int(k) for k in weight.shape[2:] if isinstance(k, int))


@imports("Conv")
def conv(c: ImportContext, x: Value, weight: Value, bias: Value | None = None, *, auto_pad: str, dilations: Ints,
         group: int, kernel_shape: Ints, pads: Ints, strides: Ints) -> Value:  # fmt: skip
    c.floats(x, weight, bias)
    kernel = _kernel(c, x, weight, kernel_shape)
    c.need(x.shape[1], weight.shape[1] * group)
    stride, dilation = (tuple(a or [1] * len(kernel)) for a in (strides, dilations))
    before, after = around(c, auto_pad, pads, x.shape[2:], kernel, stride, dilation)
    return c.b.conv(x, weight, bias, stride=stride, before=before, after=after, dilation=dilation, groups=group)


@imports("ConvTranspose")
def conv_transpose(c: ImportContext, x: Value, weight: Value, bias: Value | None = None, *, auto_pad: str,
                   dilations: Ints, group: int, kernel_shape: Ints, output_padding: Ints, output_shape: Ints,
                   pads: Ints, strides: Ints) -> Value:  # fmt: skip
    """x [N, C, *S], weight [C, M/group, *K]: a convolution of x with stride − 1 zeros after each of its elements, by
    the kernel turned around."""
    c.floats(x, weight, bias)
    kernel = _kernel(c, x, weight, kernel_shape)
    c.need(x.shape[1], weight.shape[0])
    if output_shape:
        raise c.refuse("with the shape of its result")
    n = len(kernel)
    stride, dilation = (tuple(a or [1] * n) for a in (strides, dilations))
    extra = tuple(output_padding or [0] * n)
    if len(extra) != n:
        raise c.refuse(f"output_padding {extra} of a kernel {kernel}", code="type")
    same = auto_pad in ("SAME_UPPER", "SAME_LOWER")
    less = around(c, "NOTSET" if same else auto_pad, pads, x.shape[2:], kernel, stride, dilation)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if same:  # each axis becomes stride times as long, or as long as it is where that is less
        totals = [max(r + 1 + e - s, 0) for r, e, s in zip(reach, extra, stride, strict=True)]
        halves = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
        less = halves if auto_pad == "SAME_UPPER" else halves[::-1]
    before = [r - p for r, p in zip(reach, less[0], strict=True)]
    # the last element has zeros after it as well
    after = [r - p + e - (s - 1) for r, p, e, s in zip(reach, less[1], extra, stride, strict=True)]
    x = cropped(c, _spread(c, x, stride), (0, 0, *before), (0, 0, *after))
    more = [tuple(max(a, 0) for a in side) for side in (before, after)]
    return c.b.conv(x, _turned(c, weight, group), bias, stride=(1,) * n, before=more[0], after=more[1],
                    dilation=dilation, groups=group)  # fmt: skip


def _spread(c: ImportContext, x: Value, stride: Sequence[int]) -> Value:
    """x with s − 1 zeros after each element of every spatial axis."""
    for i, s in enumerate(stride):
        if s > 1:
            axis, shape = i + 2, x.shape
            split = c.reshape(x, (*shape[: axis + 1], 1, *shape[axis + 1 :]))
            none = [0] * (len(shape) + 1)
            after = tuple(s - 1 if j == axis + 1 else 0 for j in range(len(none)))
            wide = c.b.pad(split, before=tuple(none), after=after, value=0.0)
            x = c.reshape(wide, (*shape[:axis], shape[axis] * s, *shape[axis + 1 :]))
    return x


def _turned(c: ImportContext, weight: Value, groups: int) -> Value:
    """[C, M/groups, *K] → [M, C/groups, *K], each spatial axis from its end."""
    channels, outputs, *kernel = weight.shape
    if not isinstance(channels, int) or not isinstance(outputs, int) or groups < 1 or channels % groups:
        raise c.refuse(f"a kernel {weight.type} in {groups} groups", code="type")
    grouped = c.reshape(weight, (groups, channels // groups, outputs, *kernel))
    swapped = c.transpose(grouped, (0, 2, 1, *range(3, 3 + len(kernel))))
    turned = c.reshape(swapped, (groups * outputs, channels // groups, *kernel))
    for i, k in enumerate(kernel):
        if k != 1:
            turned = c.b.gather(turned, c.constant(np.arange(k)[::-1].copy()), axis=i + 2)
    return turned
