"""Normalisation layers."""

from __future__ import annotations

import torch

from moec.frontend.aten.registry import lowers
from moec.frontend.context import Context
from moec.ir import Value


@lowers("layer_norm")
def layer_norm(
    c: Context, input: Value, normalized_shape: list[int], weight: Value | None, bias: Value | None, eps: float
) -> Value:
    if eps < 0:
        raise c.refuse(f"eps is {eps}; it must not be negative")
    if not all(w is None or w.dtype is input.dtype for w in (weight, bias)):
        raise c.refuse(f"weights of another dtype than the input ({input.dtype})")
    if len(normalized_shape) == 1:
        return c.b.layer(input, weight, bias, eps=eps)
    flat, w, b = _flatten_last(c, input, len(normalized_shape), weight, bias)
    return c.reshape(c.b.layer(flat, w, b, eps=eps), input.shape)


@lowers("native_layer_norm")
def native_layer_norm(
    c: Context, input: Value, normalized_shape: list[int], weight: Value | None, bias: Value | None, eps: float
) -> list[Value]:
    x = c.cast(input, c.out[1].dtype)
    axes = tuple(range(x.type.rank - len(normalized_shape), x.type.rank))
    mean = c.b.mean(x, axes=axes, keepdim=True)
    centred = c.b.sub(x, mean)
    variance = c.b.mean(c.b.mul(centred, centred), axes=axes, keepdim=True)
    return [layer_norm(c, input, normalized_shape, weight, bias, eps), mean, c.b.rsqrt(c.b.add(variance, eps))]


@lowers("rms_norm")
def rms_norm(c: Context, input: Value, normalized_shape: list[int], weight: Value | None, eps: float | None) -> Value:
    eps = torch.finfo(input.dtype.torch).eps if eps is None else eps
    flat, w, _ = _flatten_last(c, input, len(normalized_shape), weight, None)
    wide = c.widen(flat)
    if wide is flat and (w is None or w.dtype is flat.dtype):
        y = c.b.rms(flat, w, eps=eps)
    else:  # torch rounds half-width floats once, after the weight; norm.rms before and after it
        y = c.b.rms(wide, None if w is None else c.cast(w, wide.dtype), eps=eps)
    return c.reshape(c.cast(y, c.out_type.dtype), input.shape)


def _flatten_last(
    c: Context, x: Value, count: int, weight: Value | None, bias: Value | None
) -> tuple[Value, Value | None, Value | None]:
    """Merge the last `count` axes into one."""
    if count == 1:
        return x, weight, bias
    size = x.type.with_shape(x.shape[-count:]).numel
    w, b = (None if v is None else c.reshape(v, (size,)) for v in (weight, bias))
    return c.reshape(x, (*x.shape[:-count], size)), w, b


@lowers("native_group_norm")
def native_group_norm(
    c: Context, input: Value, weight: Value | None, bias: Value | None, group: int, eps: float
) -> list[Value]:
    """Normalise over the channels of a group and all later axes: input [N, C, …]."""
    n, channels = input.shape[:2]
    wide = c.widen(input)
    rest = input.type.numel if n == 0 else input.type.with_shape(input.shape[1:]).numel
    rows = c.reshape(wide, (n, group, rest // group))
    mean = c.b.mean(rows, axes=(2,), keepdim=True)
    centred = c.b.sub(rows, mean)
    rstd = c.b.rsqrt(c.b.add(c.b.mean(c.b.mul(centred, centred), axes=(2,), keepdim=True), eps))
    y = c.reshape(c.b.mul(centred, rstd), input.shape)
    per_channel = (channels, *[1] * (input.type.rank - 2))
    if weight is not None:
        y = c.b.mul(y, c.reshape(c.cast(weight, y.dtype), per_channel))
    if bias is not None:
        y = c.b.add(y, c.reshape(c.cast(bias, y.dtype), per_channel))
    stats = [c.cast(c.reshape(s, (n, group)), t.dtype) for s, t in zip((mean, rstd), c.out[1:], strict=True)]
    return [c.cast(y, input.dtype), *stats]


@lowers("_native_batch_norm_legit_no_training", "batch_norm")
def batch_norm(c: Context, input: Value, weight: Value | None, bias: Value | None, running_mean: Value | None,
               running_var: Value | None, eps: float, training: bool = False) -> list[Value] | Value:  # fmt: skip
    """Normalise over all axes but the second, by running statistics or, in training without any, the batch's own."""
    if input.type.rank < 2:  # which torch takes when it is empty
        return input
    per_channel = (input.shape[1], *[1] * (input.type.rank - 2))
    x = c.widen(input)

    def channel(v: Value) -> Value:
        return c.reshape(c.cast(v, x.dtype), per_channel)

    if training and running_mean is not None:
        raise c.refuse("training changes the running statistics", hint="call model.eval() before tracing")
    if running_mean is None or running_var is None:
        axes = (0, *range(2, x.type.rank))
        mean = c.b.mean(x, axes=axes, keepdim=True)
        centred = c.b.sub(x, mean)
        variance = c.b.mean(c.b.mul(centred, centred), axes=axes, keepdim=True)
    else:
        centred, variance = c.b.sub(x, channel(running_mean)), channel(running_var)
    y = c.b.mul(centred, c.b.rsqrt(c.b.add(variance, eps)))
    y = y if weight is None else c.b.mul(y, channel(weight))
    y = c.cast(y if bias is None else c.b.add(y, channel(bias)), input.dtype)
    if c.op == "aten::batch_norm":
        return y
    return [y, *(c.full(t.shape, 0, t.dtype) for t in c.out[1:])]
