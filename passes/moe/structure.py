"""What the raising rules share: walking up a value, constants, and the gated unit of an expert."""

from __future__ import annotations

from typing import Any

from moec.ir import DType, Value

_UNIT_ATTRS = ("activation", "limit", "alpha", "up_offset")


def gated_unit(p: Any, h: Any) -> Any:
    """`math.swiglu` or `math.glu` of the two halves, or of the even and odd columns, of h."""
    first, second = p.split(h, axis=-1, sizes=p.attr("halves"), results=2)
    cut = p.slice(h, axis=-1, start=p.attr("gate_start"), end=p.attr("gate_end"), step=p.attr("step"))
    other = p.slice(h, axis=-1, start=p.attr("up_start"), end=p.attr("up_end"), step=p.attr("step"))
    return p.either(glu(p, first, second), glu(p, cut, other))


def glu(p: Any, gate: Any, up: Any) -> Any:
    """`math.swiglu` or `math.glu` of gate and up."""
    return p.either(p.swiglu(gate, up), p.glu(gate, up, **{name: p.attr(name) for name in _UNIT_ATTRS}))


def with_number(p: Any, op: str, x: Any, name: str) -> Any:
    """op(x, number captured as `name`) in the dtype of x, or as torch computes it for narrow floats: in f32, then
    rounded."""
    wide = p.op(op, [p.cast(x, dtype="f32"), p.const(name)])
    return p.either(p.op(op, [x, p.const(name)]), p.cast(wide, dtype=p.attr()))


def unit_attrs(m: Any) -> dict[str, Any]:
    """The attributes of `moe.experts` for what `gated_unit` matched."""
    attrs = {name: m.get(name) for name in _UNIT_ATTRS if m.get(name) is not None}
    return {**attrs, "interleaved": True} if m.get("step", 1) == 2 else attrs


def why_not_halves(m: Any, width: Any) -> str | None:
    """Why gate and up, of `width` columns together, do not stand as `moe.experts` has them; None where they do."""
    if m.get("halves") is not None:
        return None if m.halves == (width // 2, width // 2) else f"halves {list(m.halves)} of {width}"
    gate, up, step = (m.gate_start, m.gate_end), (m.up_start, m.up_end), m.step
    if step == 1 and (gate, up) == ((0, width // 2), (width // 2, width)):
        return None
    # the end of the gate's columns may also be that of the last even one
    if step == 2 and gate[0] == 0 and gate[1] in (width - 1, width) and up == (1, width):
        return None
    return f"gate columns {gate[0]}:{gate[1]}:{step}, up columns {up[0]}:{up[1]}:{step} of {width}"


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
