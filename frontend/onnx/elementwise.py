"""Elementwise operators."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from moec.frontend.onnx.context import ImportContext
from moec.frontend.onnx.extern import element_name, element_type
from moec.frontend.onnx.ranges import never_negative
from moec.frontend.onnx.registry import imports
from moec.ir import DType, Value
from moec.ir.arrays import OPAQUE

NUMBERS = {"Neg": "neg", "Abs": "abs"}
FLOATS = {
    "Exp": "exp", "Log": "log", "Sqrt": "sqrt", "Reciprocal": "reciprocal", "Sin": "sin", "Cos": "cos",
    "Tanh": "tanh", "Erf": "erf", "Sigmoid": "sigmoid", "Softplus": "softplus", "Floor": "floor", "Ceil": "ceil",
    "Round": "round", "IsNaN": "isnan",
}  # fmt: skip
COMPARISONS = {"Equal": "eq", "Less": "lt", "LessOrEqual": "le", "Greater": "gt", "GreaterOrEqual": "ge"}
LOGIC = {"And": "and", "Or": "or", "Xor": "xor"}


def _unary(onnx_op: str, op: str, floats: bool) -> None:
    @imports(onnx_op)
    def unary(c: ImportContext, x: Value) -> Value:
        if floats:
            c.floats(x)
        return c.b.op(f"math.{op}", (x,))


for _name, _op in NUMBERS.items():
    _unary(_name, _op, False)
for _name, _op in FLOATS.items():
    _unary(_name, _op, True)


def _binary(onnx_op: str, op: str, since: int = 7) -> None:
    # before opset 7 operands were aligned by an attribute
    @imports(onnx_op, since=since)
    def binary(c: ImportContext, a: Value, b: Value) -> Value:
        return c.b.op(f"math.{op}", (a, b))


for _name, _op in {"Add": "add", "Sub": "sub", "Mul": "mul", **COMPARISONS, **LOGIC}.items():
    _binary(_name, _op)


def _aligned(onnx_op: str, op: str) -> None:
    """Until opset 6: the second operand was aligned by attributes, and must be as long otherwise."""

    @imports(onnx_op)
    def binary(c: ImportContext, a: Value, b: Value, *, broadcast: int | None, axis: int | None,
               consumed_inputs: Any) -> Value:  # fmt: skip
        if broadcast and axis is not None and b.type.rank:
            trailing = a.type.rank - c.norm_axis(axis, a.type.rank) - b.type.rank
            b = c.reshape(b, (*b.shape, *[1] * trailing))
        elif not broadcast and a.shape != b.shape:
            raise c.refuse(f"{a.type} and {b.type} without broadcasting", code="type")
        if op in ("div", "pow"):
            c.floats(a, b)
        return c.b.op(f"math.{op}", (a, b))


for _name, _op in {"Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Pow": "pow", "Equal": "eq", "Less": "lt",
                   "Greater": "gt", **LOGIC}.items():  # fmt: skip
    _aligned(_name, _op)


@imports("Not")
def not_(c: ImportContext, x: Value) -> Value:
    return c.b.op("math.not", (x,))


@imports("Sign")
def sign(c: ImportContext, x: Value) -> Value:
    return c.b.sign(x)


@imports("Div", since=7)
def div(c: ImportContext, a: Value, b: Value) -> Value:
    if a.dtype in (DType.I64, DType.I32):  # it rounds to zero, ours down
        if never_negative(c, a) and never_negative(c, b):
            return c.b.floordiv(a, b)
        signs = c.b.mul(c.b.sign(a), c.b.sign(b))
        return c.b.mul(c.b.floordiv(c.b.abs(a), c.b.abs(b)), signs)
    c.floats(a, b)
    return c.b.div(a, b)


@imports("Mod", since=10)
def mod(c: ImportContext, a: Value, b: Value, *, fmod: int) -> Value:
    if fmod:
        raise c.refuse("C's remainder")
    if a.dtype.is_float:
        raise c.refuse("fmod=0 of floats")
    return c.b.mod(a, b)


@imports("Pow", since=7)
def pow_(c: ImportContext, base: Value, exponent: Value) -> Value:
    c.floats(base)
    if base.dtype is DType.F64 and exponent.dtype is not DType.F64:
        raise c.refuse(f"f64 to the power of {exponent.dtype}")
    if exponent.dtype.is_float and exponent.dtype.bits > base.dtype.bits:
        raise c.refuse(f"{base.dtype} to the power of {exponent.dtype}")
    return c.b.pow(base, c.cast(exponent, base.dtype))


def _variadic(onnx_op: str, op: str) -> None:
    @imports(onnx_op, since=8)
    def variadic(c: ImportContext, first: Value, *rest: Value) -> Value:
        for x in rest:
            first = c.b.op(f"math.{op}", (first, x))
        return first


for _name, _op in {"Max": "max", "Min": "min", "Sum": "add"}.items():
    _variadic(_name, _op)


@imports("Mean", since=8)
def mean(c: ImportContext, first: Value, *rest: Value) -> Value:
    total = first
    for x in rest:
        total = c.b.add(total, x)
    return c.b.div(total, float(1 + len(rest)))


@imports("Where", since=9)
def where(c: ImportContext, condition: Value, a: Value, b: Value) -> Value:
    return c.b.where(condition, a, b)


@imports("Relu")
def relu(c: ImportContext, x: Value) -> Value:
    return c.b.relu(x)


@imports("LeakyRelu", since=6)
def leaky_relu(c: ImportContext, x: Value, *, alpha: float) -> Value:
    return _below_zero(c, x, c.b.mul(x, alpha))


@imports("ThresholdedRelu", since=10)
def thresholded_relu(c: ImportContext, x: Value, *, alpha: float) -> Value:
    c.floats(x)
    return c.b.where(c.b.gt(x, alpha), x, c.b.const(0.0, x.dtype))


@imports("PRelu")
def prelu_1(c: ImportContext, x: Value, slope: Value, *, consumed_inputs: Any) -> Value:
    """Until opset 6: one slope, or one for each channel."""
    c.floats(x, slope)
    if slope.type.rank == 1 and slope.shape != (1,):
        slope = c.reshape(slope, (*slope.shape, *[1] * (x.type.rank - 2)))
    return _below_zero(c, x, c.b.mul(x, slope))


@imports("PRelu", since=7)
def prelu(c: ImportContext, x: Value, slope: Value) -> Value:
    c.floats(x, slope)
    return _below_zero(c, x, c.b.mul(x, slope))


def _below_zero(c: ImportContext, x: Value, below: Value) -> Value:
    c.floats(x)
    return c.b.where(c.b.lt(x, 0.0), below, x)


@imports("Elu", since=6)
def elu(c: ImportContext, x: Value, *, alpha: float) -> Value:
    return _exponential_below(c, x, alpha, 1.0)


@imports("Celu", since=12)
def celu(c: ImportContext, x: Value, *, alpha: float) -> Value:
    return _exponential_below(c, x, alpha, alpha)


@imports("Selu", since=6)
def selu(c: ImportContext, x: Value, *, alpha: float, gamma: float) -> Value:
    return c.b.mul(_exponential_below(c, x, alpha, 1.0), gamma)


def _exponential_below(c: ImportContext, x: Value, alpha: float, scale: float) -> Value:
    """alpha · (exp(x / scale) − 1) below 0; where x is larger, the exponential is of 0, not of x."""
    c.floats(x)
    low = c.b.min(x, c.b.const(0.0, x.dtype))
    low = low if scale == 1.0 else c.b.div(low, scale)
    return _below_zero(c, x, c.b.mul(c.b.sub(c.b.exp(low), 1.0), alpha))


@imports("Shrink", since=9)
def shrink(c: ImportContext, x: Value, *, bias: float, lambd: float) -> Value:
    c.floats(x)
    zero = c.b.const(0.0, x.dtype)
    inner = c.b.where(c.b.gt(x, lambd), c.b.sub(x, bias), zero)
    return c.b.where(c.b.lt(x, -lambd), c.b.add(x, bias), inner)


@imports("IsInf", since=10)
def isinf(c: ImportContext, x: Value, *, detect_negative: int, detect_positive: int) -> Value:
    c.floats(x)
    if not (detect_negative or detect_positive):
        return c.full(x.shape, False, DType.BOOL)
    if not (detect_negative and detect_positive):
        return c.b.eq(x, float("-inf") if detect_negative else float("inf"))
    return c.b.eq(c.b.abs(x), float("inf"))


@imports("HardSigmoid", since=6)
def hard_sigmoid(c: ImportContext, x: Value, *, alpha: float, beta: float) -> Value:
    c.floats(x)
    return c.b.clamp(c.b.add(c.b.mul(x, alpha), beta), low=0.0, high=1.0)


@imports("HardSwish", since=14)
def hard_swish(c: ImportContext, x: Value) -> Value:
    c.floats(x)
    return c.b.mul(x, c.b.clamp(c.b.add(c.b.mul(x, 1 / 6), 0.5), low=0.0, high=1.0))


@imports("Softsign")
def softsign(c: ImportContext, x: Value) -> Value:
    c.floats(x)
    return c.b.div(x, c.b.add(c.b.abs(x), 1.0))


@imports("Mish", since=18)
def mish(c: ImportContext, x: Value) -> Value:
    c.floats(x)
    return c.b.mul(x, c.b.tanh(c.b.softplus(x)))


@imports("Swish", since=24)
def swish(c: ImportContext, x: Value, *, alpha: float) -> Value:
    c.floats(x)
    return c.b.silu(x) if alpha == 1.0 else c.b.mul(x, c.b.sigmoid(c.b.mul(x, alpha)))


@imports("Gelu", since=20)
def gelu(c: ImportContext, x: Value, *, approximate: str) -> Value:
    c.floats(x)
    return c.b.gelu(x, approximate=approximate)


@imports("Clip", since=11)
def clip(c: ImportContext, x: Value, low: Value | None = None, high: Value | None = None) -> Value:
    if x.dtype is DType.F8E4M3:
        raise c.refuse("of FP8")
    for op, bound in (("max", low), ("min", high)):
        if bound is not None:
            known = c.array(bound)
            if known is not None and known.size == 1 and math.isfinite(float(known.reshape(-1)[0])):
                value = known.reshape(-1)[0].item()
                x = c.b.clamp(x, low=value) if op == "max" else c.b.clamp(x, high=value)
            else:
                x = c.b.op(f"math.{op}", (x, bound))
    return x


@imports("Clip", since=6)
def clip_6(c: ImportContext, x: Value, *, min: float, max: float) -> Value:
    c.floats(x)
    largest = float(np.finfo(np.float32).max)
    low, high = (None if abs(v) >= largest else v for v in (min, max))
    return x if low is None and high is None else c.b.clamp(x, low=low, high=high)


@imports("Cast", since=6)
def cast(c: ImportContext, x: Value, *, to: int, saturate: int | None, round_mode: str | None) -> Value:
    return _cast(c, x, to, saturate)


@imports("CastLike", since=15)
def cast_like(c: ImportContext, x: Value, like: Value, *, saturate: int | None, round_mode: str | None) -> Value:
    from moec.ir.ops.extern import onnx_dtypes

    return _cast(c, x, onnx_dtypes()[like.dtype], saturate)


def _cast(c: ImportContext, x: Value, to: int, saturate: int | None) -> Value:
    dtype = element_type(to)
    if dtype is None:
        raise c.refuse(f"to {element_name(to)}, which is not supported")
    if dtype is x.dtype:
        return x
    if dtype in OPAQUE:
        raise c.refuse(f"to {dtype}: our ops do not compute with it")
    if dtype is DType.F8E5M2 or (dtype is DType.F8E4M3 and saturate == 0):
        raise c.refuse(f"to {dtype} with {saturate=}: ours follows torch")
    if x.dtype.is_float and dtype.is_integer and dtype.bits < 32:
        raise c.refuse(f"{x.dtype} to {dtype}: what is out of range is not defined")
    v = c.b.cast(x, dtype=dtype)
    known = c.array(x)
    if known is not None and dtype in (DType.I64, DType.I32):
        c.arrays[v] = known.astype(np.int64 if dtype is DType.I64 else np.int32)
    return v


@imports("Identity")
def identity(c: ImportContext, x: Value) -> Value:
    return x


@imports("Dropout", since=12)
def dropout(c: ImportContext, x: Value, ratio: Value | None = None, training: Value | None = None, *,
            seed: int | None) -> list[Value]:  # fmt: skip
    if training is not None:
        on = c.array(training)
        if on is None or bool(on.reshape(-1)[0]):
            raise c.refuse("in training")
    return [x, c.full(x.shape, True, DType.BOOL)] if c.outputs > 1 else [x]


@imports("Dropout", since=7)
def dropout_7(c: ImportContext, x: Value, *, ratio: float) -> list[Value]:
    return [x, c.full(x.shape, True, DType.BOOL)] if c.outputs > 1 else [x]


@imports("Constant")
def constant(c: ImportContext, *, value: Any, value_float: float | None, value_floats: Any, value_int: int | None,
             value_ints: Any) -> Value:  # fmt: skip
    if value is not None:
        return c.constant(value)
    for given, kind in ((value_int, np.int64), (value_ints, np.int64), (value_float, np.float32),
                        (value_floats, np.float32)):  # fmt: skip
        if given is not None:
            return c.constant(np.array(given, kind))
    raise c.refuse("of strings or sparse tensors")
