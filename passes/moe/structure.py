"""What the raising rules share: walking up a value, and constants."""

from __future__ import annotations

from typing import Any

from moec.ir import DType, Value


def with_number(p: Any, op: str, x: Any, name: str) -> Any:
    """op(x, number captured as `name`) in the dtype of x, or as torch computes it for narrow floats: in f32, then
    rounded."""
    wide = p.op(op, [p.cast(x, dtype="f32"), p.const(name)])
    return p.either(p.op(op, [x, p.const(name)]), p.cast(wide, dtype=p.attr()))


def through(v: Value | None, *ops: str) -> Value | None:
    """The value below a chain of single-operand ops."""
    while v is not None and v.producer is not None and v.producer.op in ops:
        v = v.producer.operands[0]
    return v


def reshaped(b: Any, v: Value, shape: tuple) -> Value:
    """v in another shape, without a chain of reshapes."""
    source = through(v, "tensor.reshape")
    assert source is not None
    return v if v.shape == shape else source if source.shape == shape else b.reshape(source, shape=shape)


def narrowed(b: Any, v: Value, dtype: DType | None) -> Value:
    """v rounded to `dtype` where that is narrower; a cast to wider floats changes nothing."""
    return v if dtype is None or dtype.bits >= v.dtype.bits else b.cast(v, dtype=dtype)


def producer(v: Value | None, op: str) -> Any:
    """The node that makes v, if it is of this op."""
    return v.producer if v is not None and v.producer is not None and v.producer.op == op else None


def is_filled(v: Value | None, want: float) -> bool:
    """Whether every element is the constant `want`."""
    v = through(v, "tensor.expand", "tensor.reshape", "math.cast")
    full, constant = producer(v, "tensor.full"), producer(v, "tensor.constant")
    if full is not None:
        return full.attrs["value"] == want
    return constant is not None and all(x == want for x in constant.attrs["value"])


def counts_up(v: Value | None) -> bool:
    """Whether v is 0, 1, 2, …"""
    arange, constant = producer(v, "tensor.arange"), producer(v, "tensor.constant")
    if arange is not None:
        return arange.attrs["start"] == 0 and arange.attrs["step"] == 1
    return constant is not None and constant.attrs["value"] == tuple(range(len(constant.attrs["value"])))
