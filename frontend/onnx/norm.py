"""Normalisation layers."""

from __future__ import annotations

from moec.frontend.onnx.context import ImportContext
from moec.frontend.onnx.registry import imports
from moec.ir import DType, Value

FLOAT = 1  # ONNX's number of f32


def _last_axes(c: ImportContext, x: Value, axis: int, *weights: Value | None) -> tuple[Value, list[Value | None]]:
    """x [..., n] with the axes from `axis` on merged, and weights as [n]."""
    axis = c.norm_axis(axis, x.type.rank)
    size = x.type.with_shape(x.shape[axis:]).numel
    flat = c.reshape(x, (*x.shape[:axis], size))
    shaped = []
    for w in weights:
        if w is not None and w.shape != x.shape[axis:] and w.shape != (size,):
            w = c.expand(w, x.shape[axis:])
        shaped.append(None if w is None else c.reshape(w, (size,)))
    return flat, shaped


@imports("LayerNormalization", since=17)
def layer_norm(c: ImportContext, x: Value, weight: Value, bias: Value | None = None, *, axis: int, epsilon: float,
               stash_type: int) -> list[Value]:  # fmt: skip
    c.floats(x, weight, bias)
    if stash_type != FLOAT:
        raise c.refuse(f"stash_type {stash_type}")
    flat, (w, b) = _last_axes(c, x, axis, weight, bias)
    y = c.reshape(c.b.layer(flat, w, b, eps=epsilon), x.shape)
    if c.outputs == 1:
        return [y]
    at = c.norm_axis(axis, x.type.rank)
    wide = c.widen(x)
    axes = tuple(range(at, x.type.rank))
    mean = c.b.mean(wide, axes=axes, keepdim=True)
    centred = c.b.sub(wide, mean)
    variance = c.b.mean(c.b.mul(centred, centred), axes=axes, keepdim=True)
    return [y, mean, c.b.rsqrt(c.b.add(variance, epsilon))]


@imports("RMSNormalization", since=23)
def rms_norm(c: ImportContext, x: Value, weight: Value, *, axis: int, epsilon: float, stash_type: int) -> Value:
    c.floats(x, weight)
    if stash_type != FLOAT:
        raise c.refuse(f"stash_type {stash_type}")
    flat, (w,) = _last_axes(c, x, axis, weight)
    return c.reshape(c.b.rms(flat, w, eps=epsilon), x.shape)


def _channels(c: ImportContext, v: Value, x: Value, dtype: DType) -> Value:
    """A value per channel beside x [N, C, …]."""
    return c.reshape(c.cast(v, dtype), (x.shape[1], *[1] * (x.type.rank - 2)))


@imports("BatchNormalization", since=6)
def batch_norm_6(c: ImportContext, x: Value, scale: Value, bias: Value, mean: Value, variance: Value, *,
                 epsilon: float, momentum: float, spatial: int, is_test: int | None) -> Value:  # fmt: skip
    if not spatial or (c.opset < 7 and not is_test):
        raise c.refuse("in training, or for each element")
    return batch_norm(c, x, scale, bias, mean, variance, epsilon=epsilon, momentum=momentum, training_mode=0)


@imports("BatchNormalization", since=9)
def batch_norm(c: ImportContext, x: Value, scale: Value, bias: Value, mean: Value, variance: Value, *, epsilon: float,
               momentum: float, training_mode: int | None) -> Value:  # fmt: skip
    if training_mode or x.type.rank < 2:
        raise c.refuse("in training" if training_mode else f"of {x.type}")
    wide = c.widen(x)
    centred = c.b.sub(wide, _channels(c, mean, x, wide.dtype))
    factor = c.b.rsqrt(c.b.add(_channels(c, variance, x, wide.dtype), epsilon))
    y = c.b.mul(c.b.mul(centred, factor), _channels(c, scale, x, wide.dtype))
    return c.cast(c.b.add(y, _channels(c, bias, x, wide.dtype)), x.dtype)


@imports("InstanceNormalization", since=6)
def instance_norm(c: ImportContext, x: Value, scale: Value, bias: Value, *, epsilon: float) -> Value:
    c.floats(x, scale, bias)
    y = _normalised(c, c.widen(x), tuple(range(2, x.type.rank)), epsilon)
    y = c.b.mul(y, _channels(c, scale, x, y.dtype))
    return c.cast(c.b.add(y, _channels(c, bias, x, y.dtype)), x.dtype)


@imports("GroupNormalization", since=21)
def group_norm(c: ImportContext, x: Value, scale: Value, bias: Value, *, epsilon: float, num_groups: int,
               stash_type: int) -> Value:  # fmt: skip
    c.floats(x, scale, bias)
    channels = x.shape[1]
    if not isinstance(channels, int) or stash_type != FLOAT:
        raise c.refuse(f"of {x.type}, stash_type {stash_type}")
    if num_groups < 1 or channels % num_groups:
        raise c.refuse(f"{channels} channels in {num_groups} groups", code="type")
    wide = c.widen(x)
    rows = c.reshape(wide, (x.shape[0], num_groups, channels // num_groups, *x.shape[2:]))
    y = c.reshape(_normalised(c, rows, tuple(range(2, rows.type.rank)), epsilon), x.shape)
    y = c.b.mul(y, _channels(c, scale, x, y.dtype))
    return c.cast(c.b.add(y, _channels(c, bias, x, y.dtype)), x.dtype)


@imports("LpNormalization")
def lp_norm(c: ImportContext, x: Value, *, axis: int, p: int) -> Value:
    """x / ‖x‖ₚ, and 0 where the norm is 0."""
    c.floats(x)
    if p not in (1, 2):
        raise c.refuse(f"p = {p}")
    axes = (c.norm_axis(axis, x.type.rank),)
    terms = c.b.abs(x) if p == 1 else c.b.mul(x, x)
    norm = c.b.sum(terms, axes=axes, keepdim=True)
    norm = norm if p == 1 else c.b.sqrt(norm)
    zero = c.b.const(0.0, x.dtype)
    return c.b.where(c.b.eq(norm, zero), zero, c.b.div(x, norm))


def _normalised(c: ImportContext, x: Value, axes: tuple[int, ...], epsilon: float) -> Value:
    centred = c.b.sub(x, c.b.mean(x, axes=axes, keepdim=True))
    variance = c.b.mean(c.b.mul(centred, centred), axes=axes, keepdim=True)
    return c.b.mul(centred, c.b.rsqrt(c.b.add(variance, epsilon)))
