"""Lowerings of elementwise `math`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as onnx

from moec.backends.onnxruntime.backend import backend
from moec.backends.onnxruntime.emit import MICROSOFT, Emitter, given
from moec.backends.onnxruntime.types import FLOAT8, NARROW_INTEGERS, ONNX, carrier
from moec.ir import DType, Node

Compute = Callable[..., onnx.Value]


def computed(e: Emitter, node: Node, compute: Compute, result: DType | None = None) -> onnx.Value:
    """`compute(values, dtype)` with 8- and 16-bit integers widened to i32, which has every kernel; the
    result is cast back (and wraps, as in torch) unless it is of another type `result`."""
    dtype = next(v.dtype for v in reversed(node.operands) if v is not None)
    values = e.operands(node)
    if dtype not in NARROW_INTEGERS:
        return compute(values, carrier(dtype))
    wide = [
        e.cast(x, dtype, DType.I32) if v is not None and v.dtype == dtype else x
        for x, v in zip(values, node.operands, strict=True)
    ]
    out = compute(wide, DType.I32)
    return out if result is not None else e.cast(out, DType.I32, dtype)


def _simple(op: str, kind: str) -> None:
    @backend.lowers(f"math.{op}")
    def lower(e: Emitter, node: Node) -> onnx.Value:
        predicate = node.result.dtype if node.result.dtype is DType.BOOL else None
        return computed(e, node, lambda values, _: e.op(kind, *values), predicate)


for _op, _kind in {
    "neg": "Neg", "abs": "Abs", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "reciprocal": "Reciprocal",
    "sin": "Sin", "cos": "Cos", "tanh": "Tanh", "erf": "Erf", "floor": "Floor", "ceil": "Ceil",
    "round": "Round", "isnan": "IsNaN", "not": "Not", "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div",
    "max": "Max", "min": "Min", "eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater",
    "ge": "GreaterOrEqual", "and": "And", "or": "Or", "xor": "Xor", "pow": "Pow",
}.items():  # fmt: skip
    _simple(_op, _kind)


@backend.lowers("math.sign")
def sign(e: Emitter, node: Node) -> onnx.Value:
    """torch gives 0 for NaN, ONNX Runtime NaN."""

    def compute(values: list[Any], dtype: DType) -> onnx.Value:
        y = e.op("Sign", *values)
        return e.op("Where", e.op("IsNaN", *values), e.scalar(0, dtype), y) if dtype.is_float else y

    return computed(e, node, compute)


@backend.lowers("math.ne")
def not_equal(e: Emitter, node: Node) -> onnx.Value:
    return computed(e, node, lambda values, _: e.op("Not", e.op("Equal", *values)), DType.BOOL)


@backend.lowers("math.relu")
def relu(e: Emitter, node: Node) -> onnx.Value:
    def compute(values: list[Any], dtype: DType) -> onnx.Value:
        return e.op("Relu", *values) if dtype.is_float else e.op("Max", *values, e.scalar(0, dtype))

    return computed(e, node, compute)


@backend.lowers("math.rsqrt")
def rsqrt(e: Emitter, node: Node) -> onnx.Value:
    return e.op("Reciprocal", e.op("Sqrt", *e.operands(node)))


def log1p_of(e: Emitter, x: onnx.Value, dtype: DType) -> onnx.Value:
    """ln(1 + x) without losing small x (Goldberg 1991, theorem 4): ln(u)·x/(u − 1) with u = 1 + x."""
    one = e.scalar(1, dtype)
    u = e.op("Add", x, one)
    log = e.op("Log", u)
    corrected = e.op("Mul", log, e.op("Div", x, e.op("Sub", u, one)))
    large = e.op("Where", e.op("Equal", u, x), log, corrected)
    return e.op("Where", e.op("Equal", u, one), x, large)


@backend.lowers("math.log1p")
def log1p(e: Emitter, node: Node) -> onnx.Value:
    return log1p_of(e, e.operands(node)[0], given(node)[0].dtype)


@backend.lowers("math.softplus")
def softplus(e: Emitter, node: Node) -> onnx.Value:
    (x,) = e.operands(node)
    return softplus_of(e, x, node.result.dtype)


def softplus_of(e: Emitter, x: onnx.Value, dtype: DType) -> onnx.Value:
    """ln(1 + e^x)."""
    if dtype is not DType.F64:
        return e.op("Softplus", x)
    tail = log1p_of(e, e.op("Exp", e.op("Neg", e.op("Abs", x))), dtype)
    return e.op("Add", e.op("Max", x, e.scalar(0, dtype)), tail)


def sigmoid_of(e: Emitter, x: onnx.Value, dtype: DType) -> onnx.Value:
    """1 / (1 + e⁻ˣ). ONNX Runtime's Sigmoid is right to a unit of 1, not of the result: from −18 on in f32 and from −37
    on in f64 nothing of it is left, which shows where results are normalised."""
    return e.op("Reciprocal", e.op("Add", e.scalar(1, dtype), e.op("Exp", e.op("Neg", x))))


@backend.lowers("math.sigmoid")
def sigmoid(e: Emitter, node: Node) -> onnx.Value:
    return computed(e, node, lambda values, dtype: sigmoid_of(e, values[0], dtype))


def silu_of(e: Emitter, x: onnx.Value, dtype: DType, alpha: float = 1.0) -> onnx.Value:
    """x · sigmoid(alpha · x)."""
    if not e.options.portable and carrier(dtype) is DType.F32:
        return e.op("QuickGelu", x, domain=MICROSOFT, alpha=alpha)
    scaled = x if alpha == 1.0 else e.op("Mul", x, e.scalar(alpha, dtype))
    return e.op("Mul", x, sigmoid_of(e, scaled, dtype) if dtype is DType.F64 else e.op("Sigmoid", scaled))


@backend.lowers("math.swiglu")
def swiglu(e: Emitter, node: Node) -> onnx.Value:
    gate, up = e.operands(node)
    return e.op("Mul", silu_of(e, gate, node.result.dtype), up)


@backend.lowers("math.silu")
def silu(e: Emitter, node: Node) -> onnx.Value:
    return silu_of(e, e.operands(node)[0], node.result.dtype)


def gelu_of(e: Emitter, x: onnx.Value, dtype: DType, approximate: str) -> onnx.Value:
    if dtype is not DType.F64:
        return e.op("Gelu", x, approximate=approximate)
    # tanh form only; erf has no f64 kernel
    cube = e.op("Mul", x, e.op("Mul", x, e.op("Mul", x, e.scalar(0.044715, dtype))))
    inner = e.op("Mul", e.op("Add", x, cube), e.scalar(math.sqrt(2 / math.pi), dtype))
    return e.op("Mul", e.op("Mul", x, e.scalar(0.5, dtype)), e.op("Add", e.op("Tanh", inner), e.scalar(1, dtype)))


@backend.lowers("math.gelu")
def gelu(e: Emitter, node: Node) -> onnx.Value:
    return gelu_of(e, e.operands(node)[0], node.result.dtype, node.attrs["approximate"])


@backend.lowers("math.mod")
def mod(e: Emitter, node: Node) -> onnx.Value:
    def compute(values: list[Any], dtype: DType) -> onnx.Value:
        a, b = values
        if not dtype.is_float:
            return e.op("Mod", a, b)
        rest, differ = _fmod(e, a, b, dtype)
        return e.op("Where", differ, e.op("Add", rest, b), rest)

    return computed(e, node, compute)


@backend.lowers("math.floordiv")
def floordiv(e: Emitter, node: Node) -> onnx.Value:
    def compute(values: list[Any], dtype: DType) -> onnx.Value:
        a, b = values
        if not dtype.is_float:
            return e.op("Div", e.op("Sub", a, e.op("Mod", a, b)), b)
        # torch's algorithm: exact where a / b would round up to the next integer
        rest, differ = _fmod(e, a, b, dtype)
        one = e.scalar(1, dtype)
        quotient = e.op("Div", e.op("Sub", a, rest), b)
        quotient = e.op("Where", differ, e.op("Sub", quotient, one), quotient)
        floor = e.op("Floor", quotient)
        short = e.op("Greater", e.op("Sub", quotient, floor), e.scalar(0.5, dtype))
        floor = e.op("Where", short, e.op("Add", floor, one), floor)
        return e.op("Where", e.op("Equal", b, e.scalar(0, dtype)), e.op("Div", a, b), floor)

    return computed(e, node, compute)


def _fmod(e: Emitter, a: onnx.Value, b: onnx.Value, dtype: DType) -> tuple[onnx.Value, onnx.Value]:
    """C's remainder, and where it is not 0 and has not the sign of b."""
    zero = e.scalar(0, dtype)
    rest = e.op("Mod", a, b, fmod=1)
    signs = e.op("Xor", e.op("Less", rest, zero), e.op("Less", b, zero))
    return rest, e.op("And", e.op("Not", e.op("Equal", rest, zero)), signs)


@backend.lowers("math.clamp")
def clamp(e: Emitter, node: Node) -> onnx.Value:
    def compute(values: list[Any], dtype: DType) -> onnx.Value:
        (x,) = values
        for kind, bound in (("Max", node.attrs["low"]), ("Min", node.attrs["high"])):
            if bound is not None:
                x = e.op(kind, x, e.scalar(bound, dtype))
        return x

    return computed(e, node, compute)


@backend.lowers("math.where")
def where(e: Emitter, node: Node) -> onnx.Value:
    if node.result.dtype is DType.BOOL:  # Where has no bool kernel
        c, a, b = e.operands(node)
        return e.op("Or", e.op("And", c, a), e.op("And", e.op("Not", c), b))
    return computed(e, node, lambda values, _: e.op("Where", *values))


@backend.lowers("math.cast")
def cast(e: Emitter, node: Node) -> onnx.Value:
    (x,), source, target = e.operands(node), given(node)[0].dtype, node.attrs["dtype"]
    if target in FLOAT8 and source != target:
        return e.round_to(e.cast(x, source, DType.F32), target)
    if source.is_float and target in NARROW_INTEGERS:  # wrap like torch, through a wide integer
        x, source = e.op("Cast", x, to=ONNX[DType.I64].value), DType.I64
    return e.cast(x, source, target)


def order_key(e: Emitter, x: onnx.Value, dtype: DType, *, finite: bool = False) -> onnx.Value:
    """A key that comparing kernels order as torch orders floats x: NaN above +∞, which is above all numbers.

    NaN becomes +∞ and +∞ (unless x is `finite` or NaN) a number above all that x can hold, for which f32 takes f64; in
    f64 itself +∞ ties with the largest number.
    """
    missing, wide = e.op("IsNaN", x), carrier(dtype)
    if not finite:
        if dtype is DType.F32:
            x, wide = e.cast(x, dtype, DType.F64), DType.F64
        x = e.op("Min", x, e.scalar(np.finfo(np.float64 if wide is DType.F64 else np.float32).max, wide))
    return e.op("Where", missing, e.scalar(np.inf, wide), x)
