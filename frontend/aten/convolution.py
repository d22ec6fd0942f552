"""Convolutions; transposed ones stay torch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moec.frontend.aten.extern import lower_extern
from moec.frontend.aten.registry import lowers
from moec.frontend.context import Context
from moec.ir import Value


@lowers("convolution")
def convolution(
    c: Context, input: Value, weight: Value, bias: Value | None, stride: Sequence[Any], padding: Sequence[Any],
    dilation: Sequence[Any], transposed: bool, output_padding: Sequence[Any], groups: int,
) -> Value:  # fmt: skip
    if transposed:
        arguments = {"input": input, "weight": weight, "bias": bias, "stride": stride, "padding": padding,
                     "dilation": dilation, "transposed": transposed, "output_padding": output_padding,
                     "groups": groups}  # fmt: skip
        return lower_extern(c, "aten::convolution", arguments, lambda _: None)[0]
    return convolve(c, input, weight, bias, stride, padding, dilation, groups)


@lowers("conv1d", "conv2d", "conv3d")
def convolution_of_rank(c: Context, input: Value, weight: Value, bias: Value | None, stride: Sequence[Any],
                        padding: Sequence[Any], dilation: Sequence[Any], groups: int) -> Value:  # fmt: skip
    return convolve(c, input, weight, bias, stride, padding, dilation, groups)


def convolve(c: Context, x: Value, weight: Value, bias: Value | None, stride: Sequence[Any], padding: Sequence[Any],
             dilation: Sequence[Any], groups: int) -> Value:  # fmt: skip
    """x [B, C, *S] or [C, *S]; a single stride, padding or dilation holds for every axis."""
    spatial = weight.type.rank - 2
    if not weight.type.is_static:
        raise c.refuse(f"a kernel {weight.type} of dynamic size")
    alone = x.type.rank == spatial + 1
    x = c.reshape(x, (1, *x.shape)) if alone else x
    pads = _each(padding, spatial)
    y = c.b.conv(x, weight, bias, stride=_each(stride, spatial), before=pads, after=pads,
                 dilation=_each(dilation, spatial), groups=groups)  # fmt: skip
    return c.reshape(y, y.shape[1:]) if alone else y


def _each(values: Sequence[Any], count: int) -> tuple[Any, ...]:
    return tuple(values) * count if len(values) == 1 else tuple(values)
