"""What the raising rules share: walking up a value, and the gated activation."""

from __future__ import annotations

from typing import Any

from moec.ir import Value

ACTIVATIONS = {
    "silu": ("math.silu", {}),
    "gelu": ("math.gelu", {}),
    "gelu_tanh": ("math.gelu", {"approximate": "tanh"}),
}


def gated(p: Any, h: Any, activation: str) -> Any:
    """act(gate) · up of the two halves of h."""
    op, attrs = ACTIVATIONS[activation]
    gate, up = p.split(h, axis=-1, sizes=p.attr("halves"), results=2)
    return p.mul(p.op(op, [gate], attrs), up)


def through(v: Value | None, *ops: str) -> Value | None:
    """The value below a chain of single-operand ops."""
    while v is not None and v.producer is not None and v.producer.op in ops:
        v = v.producer.operands[0]
    return v


def producer(v: Value | None, op: str) -> Any:
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
