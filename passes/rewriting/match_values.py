"""Attributes, sizes and scalar constants against what a pattern wants."""

from __future__ import annotations

import struct
from typing import Any

from moec.ir import DType, Value
from moec.ir.compare import same_attrs
from moec.passes.rewriting.bindings import Bindings
from moec.passes.rewriting.pattern_types import AttrCapture, Sizes


def attribute(want: Any, got: Any, b: Bindings) -> Bindings | None:
    """Bindings under which an attribute (or a shape) is what the pattern wants, or None."""
    if isinstance(want, AttrCapture):
        return b if want.name is None else b.capture(want.name, got)
    if not isinstance(want, Sizes):
        return b if same_attrs({"": want}, {"": got}) else None
    if not isinstance(got, tuple):
        return None
    entries = want.entries
    if ... in entries:
        at = entries.index(...)
        tail = len(entries) - at - 1
        if len(got) < at + tail:
            return None
        got = got[:at] + got[len(got) - tail :]
        entries = entries[:at] + entries[at + 1 :]
    if len(entries) != len(got):
        return None
    for entry, size in zip(entries, got, strict=True):
        extended = attribute(entry, size, b)
        if extended is None:
            return None
        b = extended
    return b


def wanted(want: Any, b: Bindings) -> str:
    """An attribute of the pattern in words, with what its captures already hold."""
    match want:
        case AttrCapture():
            known = want.name is not None and want.name in b.captures
            return shown(b.captures[want.name or ""]) if known else want.name or "_"
        case Sizes():
            return "[" + ", ".join("..." if e is ... else wanted(e, b) for e in want.entries) + "]"
    return shown(want)


def shown(value: Any) -> str:
    return "[" + ", ".join(map(shown, value)) + "]" if isinstance(value, tuple) else str(value)


def describe(value: Value | None) -> str:
    if value is None:
        return "an absent operand"
    if value.weight is not None:
        return f"weight @{value.weight.name}"
    number = scalar_constant(value)
    if number is not None:
        return f"the constant {number}"
    return value.producer.op if value.producer else f"input %{value.name}"


def scalar_constant(value: Value | None) -> float | int | bool | None:
    """The number in a one-element `tensor.constant` of rank ≤ 1, else None."""
    if value is None or value.producer is None or value.producer.op != "tensor.constant":
        return None
    return value.producer.attrs["value"][0] if value.type.numel == 1 and value.type.rank <= 1 else None


def same_constant(a: float, b: float, dtype: DType, rtol: float = 0.0) -> bool:
    """Equality after rounding to `dtype` (1e-6 written in Python equals the f32 nearest to it)."""
    if dtype.is_float:
        fa, fb = _rounded(float(a), dtype), _rounded(float(b), dtype)
        return fa == fb or (fa != fa and fb != fb) or (rtol > 0 and abs(fa - fb) <= rtol * abs(fb))
    return a == b


def _rounded(x: float, dtype: DType) -> float:
    if dtype is DType.F64:
        return x
    try:
        narrow = struct.unpack("f", struct.pack("f", x))[0]
    except OverflowError:
        return x
    if dtype is DType.F32:
        return narrow
    import torch

    return float(torch.tensor(x, dtype=dtype.torch))
