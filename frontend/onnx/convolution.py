"""Convolution."""

from __future__ import annotations

from collections.abc import Sequence

from moec.frontend.onnx.context import ImportContext
from moec.frontend.onnx.registry import imports
from moec.ir import Value


@imports("Conv")
def conv(c: ImportContext, x: Value, weight: Value, bias: Value | None = None, *, auto_pad: str,
         dilations: Sequence[int] | None, group: int, kernel_shape: Sequence[int] | None, pads: Sequence[int] | None,
         strides: Sequence[int] | None) -> Value:  # fmt: skip
    c.floats(x, weight, bias)
    n = x.type.rank - 2
    if not 1 <= n <= 3 or not weight.type.is_static:
        raise c.refuse(f"of {x.type} with a kernel {weight.type}")
    if kernel_shape and tuple(kernel_shape) != weight.shape[2:]:
        raise c.refuse(f"kernel_shape {tuple(kernel_shape)} of a kernel {weight.type}", code="type")
    stride, dilation = tuple(strides or [1] * n), tuple(dilations or [1] * n)
    around = tuple(pads or [0] * 2 * n)
    before, after = around[:n], around[n:]
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        totals = [_same(c, *given) for given in zip(x.shape[2:], weight.shape[2:], stride, dilation, strict=True)]
        less, more = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
        before, after = (less, more) if auto_pad == "SAME_UPPER" else (more, less)
    elif auto_pad == "VALID":
        before = after = (0,) * n
    if min(*before, *after) < 0:
        raise c.refuse(f"pads {around}")
    return c.b.conv(x, weight, bias, stride=stride, before=before, after=after, dilation=dilation, groups=group)


def _same(c: ImportContext, size: object, kernel: object, stride: int, dilation: int) -> int:
    """How many zeros an axis needs for ⌈size / stride⌉ results."""
    assert isinstance(kernel, int)
    reach = dilation * (kernel - 1) + 1
    if stride == 1:
        return reach - 1
    if not isinstance(size, int):
        raise c.refuse(f"auto_pad of an axis of size {size} in steps of {stride}")
    return max(0, (-(-size // stride) - 1) * stride + reach - size)
