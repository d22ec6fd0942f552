"""Elementwise arithmetic, comparisons, activations and casts."""

from __future__ import annotations

import math
from typing import Any

from moec.frontend.aten.registry import lowers
from moec.frontend.context import Context, Number
from moec.ir import DType, Value
from moec.ir.types import TorchDType

# torch op → IR op of the same meaning; integer operands are first converted to the result dtype
_UNARY = {
    "neg": "neg", "abs": "abs", "sign": "sign", "sgn": "sign", "exp": "exp", "log": "log", "log1p": "log1p",
    "sqrt": "sqrt", "rsqrt": "rsqrt", "reciprocal": "reciprocal", "sin": "sin", "cos": "cos", "tanh": "tanh",
    "erf": "erf", "sigmoid": "sigmoid", "silu": "silu", "relu": "relu", "special_expit": "sigmoid",
}  # fmt: skip
_ROUNDING = {"floor": "floor", "ceil": "ceil", "round": "round"}
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_BOOLEAN = {"and": "and", "or": "or", "xor": "xor"}


def _register_tables() -> None:
    for torch_op, ir_op in _UNARY.items():

        def unary(c: Context, self: Value, _op: str = ir_op) -> Value:
            return c.b.op(f"math.{_op}", (c.cast(self, c.out_type.dtype),))

        lowers(torch_op)(_only_self(unary))
    for torch_op, ir_op in _ROUNDING.items():

        def rounding(c: Context, self: Value, _op: str = ir_op) -> Value:
            return c.b.op(f"math.{_op}", (self,)) if self.dtype.is_float else self

        lowers(torch_op)(_only_self(rounding))
    for op in _COMPARISONS:

        def comparison(c: Context, self: Value, other: Value | Number, _op: str = op) -> Value:
            return c.compare(_op, self, other)

        lowers(f"{op}.Tensor", f"{op}.Scalar")(_self_other(comparison))
    for name, op in _BOOLEAN.items():

        def logical(c: Context, self: Value, other: Value, _op: str = op) -> Value:
            return c.b.op(f"math.{_op}", (c.truth(self), c.truth(other)))

        lowers(f"logical_{name}")(_self_other(logical))

        def bitwise(c: Context, self: Any, other: Any, _op: str = op) -> Value:
            if c.out_type.dtype is not DType.BOOL:
                raise c.refuse("bitwise operations on integers are not supported, only on booleans")
            return c.b.op(f"math.{_op}", (c.value(self, DType.BOOL), c.value(other, DType.BOOL)))

        lowers(f"bitwise_{name}.Tensor", f"bitwise_{name}.Scalar", f"__{name}__.Tensor", f"__{name}__.Scalar")(
            _self_other(bitwise)
        )


def _only_self(fn: Any) -> Any:
    return lambda c, self: fn(c, self)


def _self_other(fn: Any) -> Any:
    return lambda c, self, other: fn(c, self, other)


_register_tables()


def _scaled(c: Context, op: str, a: Any, b: Any, alpha: Number) -> Value:
    """a ± alpha · b, in f32 for half-width floats (one rounding, as in torch)."""
    if alpha == 1:
        return c.binary(op, a, b)
    dtype = c.promote(a, b)
    wide = DType.F32 if dtype in (DType.BF16, DType.F16) else dtype
    scaled = c.b.mul(c.value(b, wide), c.value(alpha, wide))
    return c.cast(c.b.op(f"math.{op}", (c.value(a, wide), scaled)), dtype)


@lowers("add.Tensor", "add.Scalar")
def add(c: Context, self: Any, other: Any, alpha: Number) -> Value:
    if c.promote(self, other) is DType.BOOL:
        return c.b.or_(c.value(self, DType.BOOL), c.value(other, DType.BOOL))
    return _scaled(c, "add", self, other, alpha)


@lowers("sub.Tensor", "sub.Scalar")
def sub(c: Context, self: Any, other: Any, alpha: Number) -> Value:
    return _scaled(c, "sub", self, other, alpha)


@lowers("rsub.Tensor", "rsub.Scalar")
def rsub(c: Context, self: Any, other: Any, alpha: Number) -> Value:
    return _scaled(c, "sub", other, self, alpha)


@lowers("mul.Tensor", "mul.Scalar")
def mul(c: Context, self: Any, other: Any) -> Value:
    if c.promote(self, other) is DType.BOOL:
        return c.b.and_(c.value(self, DType.BOOL), c.value(other, DType.BOOL))
    return c.binary("mul", self, other)


@lowers("div.Tensor", "div.Scalar")
def div(c: Context, self: Any, other: Any) -> Value:
    return c.binary("div", self, other, c.out_type.dtype)


@lowers("div.Tensor_mode", "div.Scalar_mode")
def div_mode(c: Context, self: Any, other: Any, rounding_mode: str | None) -> Value:
    if rounding_mode is None:
        return div(c, self, other)
    if rounding_mode == "floor":
        return c.binary("floordiv", self, other)
    return _truncate_div(c, self, other)


def _truncate_div(c: Context, self: Any, other: Any) -> Value:
    dtype = c.promote(self, other)
    if dtype.is_float:
        return trunc(c, c.binary("div", self, other, dtype))
    a, b = c.value(self, dtype), c.value(other, dtype)
    sign = c.b.mul(c.b.sign(a), c.b.sign(b))
    return c.b.mul(c.b.floordiv(c.b.abs(a), c.b.abs(b)), sign)


@lowers("floor_divide", "floor_divide.Scalar")
def floor_divide(c: Context, self: Any, other: Any) -> Value:
    return c.binary("floordiv", self, other)


@lowers("remainder.Tensor", "remainder.Scalar", "remainder.Scalar_Tensor")
def remainder(c: Context, self: Any, other: Any) -> Value:
    return c.binary("mod", self, other)


@lowers("fmod.Tensor", "fmod.Scalar")
def fmod(c: Context, self: Any, other: Any) -> Value:
    """a − b·trunc(a / b): |a| mod |b| with the sign of a."""
    dtype = c.promote(self, other)
    a, b = c.value(self, dtype), c.value(other, dtype)
    return c.b.mul(c.b.mod(c.b.abs(a), c.b.abs(b)), c.b.sign(a))


@lowers("trunc")
def trunc(c: Context, self: Value) -> Value:
    if not self.dtype.is_float:
        return self
    return c.b.where(c.b.lt(self, 0.0), c.b.ceil(self), c.b.floor(self))


@lowers("pow.Tensor_Scalar")
def pow_scalar(c: Context, self: Value, exponent: Number) -> Value:
    dtype = c.out_type.dtype
    x = c.cast(self, dtype)
    if exponent == 0:
        return c.full(x.shape, 1, dtype)
    if exponent == 1:
        return x
    if isinstance(exponent, int | float) and float(exponent).is_integer() and 2 <= exponent <= 4:
        wide = c.widen(x)
        square = c.b.mul(wide, wide)
        result = {2: lambda: square, 3: lambda: c.b.mul(square, wide), 4: lambda: c.b.mul(square, square)}
        return c.cast(result[int(exponent)](), dtype)
    if not dtype.is_float:
        raise c.refuse(f"integers to the power of {exponent}", hint="convert to float first")
    special = {0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}.get(exponent)
    if special:
        return c.b.op(f"math.{special}", (x,))
    return c.binary("pow", x, exponent, dtype)


@lowers("pow.Scalar", "pow.Tensor_Tensor")
def power(c: Context, self: Any, exponent: Any) -> Value:
    dtype = c.promote(self, exponent)
    if not dtype.is_float:
        raise c.refuse("powers of integers by a tensor are not supported", hint="convert to float first")
    return c.binary("pow", self, exponent, dtype)


@lowers("maximum")
def maximum(c: Context, self: Value, other: Value) -> Value:
    if c.out_type.dtype is DType.BOOL:
        return c.b.or_(self, other)
    return c.binary("max", self, other)


@lowers("minimum")
def minimum(c: Context, self: Value, other: Value) -> Value:
    if c.out_type.dtype is DType.BOOL:
        return c.b.and_(self, other)
    return c.binary("min", self, other)


@lowers("fmax")
def fmax(c: Context, self: Value, other: Value) -> Value:
    return _numbers_first(c, "max", self, other)


@lowers("fmin")
def fmin(c: Context, self: Value, other: Value) -> Value:
    return _numbers_first(c, "min", self, other)


def _numbers_first(c: Context, op: str, a: Value, b: Value) -> Value:
    """The larger or smaller of two where both are numbers, else the one that is."""
    dtype = c.out_type.dtype
    if dtype is DType.BOOL:
        return c.b.or_(a, b) if op == "max" else c.b.and_(a, b)
    a, b = c.cast(a, dtype), c.cast(b, dtype)
    if not dtype.is_float:
        return c.binary(op, a, b)
    return c.b.where(c.b.isnan(a), b, c.b.where(c.b.isnan(b), a, c.binary(op, a, b)))


def _signbit(c: Context, x: Value) -> Value:
    """x < 0, −0 too, whose reciprocal is −∞."""
    negative = c.b.lt(x, c.value(0, x.dtype))
    return c.b.or_(negative, c.b.lt(c.b.reciprocal(x), 0.0)) if x.dtype.is_float else negative


@lowers("signbit")
def signbit(c: Context, self: Value) -> Value:
    return c.full(self.shape, False, DType.BOOL) if self.dtype is DType.BOOL else _signbit(c, self)


@lowers("copysign.Tensor", "copysign.Scalar")
def copysign(c: Context, self: Value, other: Any) -> Value:
    dtype = c.out_type.dtype
    size = c.b.abs(c.cast(self, dtype))
    return c.b.where(_signbit(c, c.value(other, dtype)), c.b.neg(size), size)


@lowers("hypot")
def hypot(c: Context, self: Value, other: Value) -> Value:
    """√(a² + b²) without overflow inside; infinite where either is."""
    dtype = c.out_type.dtype
    a, b = (c.b.abs(c.widen(c.cast(x, dtype))) for x in (self, other))
    large, small = c.b.max(a, b), c.b.min(a, b)
    ratio = c.b.div(small, c.b.where(c.b.eq(large, 0.0), c.value(1.0, large.dtype), large))
    length = c.b.mul(large, c.b.sqrt(c.b.add(c.b.mul(ratio, ratio), 1.0)))
    infinite = c.b.or_(c.b.eq(a, math.inf), c.b.eq(b, math.inf))
    return c.cast(c.b.where(infinite, c.value(math.inf, length.dtype), length), dtype)


@lowers("heaviside")
def heaviside(c: Context, self: Value, values: Value) -> Value:
    dtype = c.out_type.dtype
    x, at_zero = c.cast(self, dtype), c.cast(values, dtype)
    zero, one = c.value(0, dtype), c.value(1, dtype)
    if dtype is DType.BOOL:
        return c.b.or_(x, at_zero)
    step = c.b.where(c.b.gt(x, zero), one, zero)
    return c.b.where(c.b.eq(x, zero), at_zero, step)


@lowers("round.decimals")
def round_decimals(c: Context, self: Value, decimals: int) -> Value:
    if not self.dtype.is_float or decimals == 0:
        return c.b.round(self) if self.dtype.is_float else self
    x, ten = c.widen(self), 10.0 ** abs(decimals)
    if decimals > 0:
        return c.cast(c.b.div(c.b.round(c.b.mul(x, ten)), ten), self.dtype)
    return c.cast(c.b.mul(c.b.round(c.b.div(x, ten)), ten), self.dtype)


@lowers("clamp", "clip")
def clamp(c: Context, self: Value, min: Any, max: Any) -> Value:
    dtype = c.out_type.dtype
    x = c.cast(self, dtype)
    if isinstance(min, Value) or isinstance(max, Value):
        return clamp_tensor(c, x, min, max)
    cast = float if dtype.is_float else int
    return c.b.clamp(x, low=None if min is None else cast(min), high=None if max is None else cast(max))


@lowers("clamp.Tensor")
def clamp_tensor(c: Context, self: Value, min: Any, max: Any) -> Value:
    x, dtype = self, c.out_type.dtype
    if min is not None:
        x = c.binary("max", x, min, dtype)
    return x if max is None else c.binary("min", x, max, dtype)


@lowers("clamp_min")
def clamp_min(c: Context, self: Value, min: Any) -> Value:
    return clamp(c, self, min, None)


@lowers("clamp_max")
def clamp_max(c: Context, self: Value, max: Any) -> Value:
    return clamp(c, self, None, max)


@lowers("hardtanh")
def hardtanh(c: Context, self: Value, min_val: Number, max_val: Number) -> Value:
    return clamp(c, self, min_val, max_val)


@lowers("logical_not", "bitwise_not")
def logical_not(c: Context, self: Value) -> Value:
    if c.op == "aten::bitwise_not" and self.dtype is not DType.BOOL:
        return c.b.sub(c.b.neg(self), 1)  # two's complement: ~x = −x − 1
    return c.b.not_(c.truth(self))


@lowers("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def where(c: Context, condition: Value, self: Any, other: Any) -> Value:
    dtype = c.out_type.dtype
    return c.b.where(c.truth(condition), c.value(self, dtype), c.value(other, dtype))


@lowers("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(c: Context, self: Value, mask: Value, value: Any) -> Value:
    return c.b.where(mask, c.value(value, self.dtype), self)


@lowers("isnan")
def isnan(c: Context, self: Value) -> Value:
    return c.b.isnan(self) if self.dtype.is_float else c.full(self.shape, False, DType.BOOL)


@lowers("isinf")
def isinf(c: Context, self: Value) -> Value:
    if not self.dtype.is_float:
        return c.full(self.shape, False, DType.BOOL)
    return c.b.eq(c.b.abs(self), math.inf)


@lowers("gelu")
def gelu(c: Context, self: Value, approximate: str) -> Value:
    return c.b.gelu(self, approximate=approximate)


@lowers("softplus")
def softplus(c: Context, self: Value, beta: Number, threshold: Number) -> Value:
    """ln(1 + e^(βx)) / β, and x itself where βx is above the threshold."""
    if beta == 1 and threshold == 20:
        return c.b.softplus(self)
    x = c.widen(self)
    scaled = c.b.mul(x, float(beta))
    soft = c.b.div(c.b.log1p(c.b.exp(c.b.min(scaled, float(threshold)))), float(beta))
    return c.cast(c.b.where(c.b.gt(scaled, float(threshold)), x, soft), self.dtype)


@lowers("elu")
def elu(c: Context, self: Value, alpha: Number, scale: Number, input_scale: Number) -> Value:
    x = c.widen(self)
    low = c.b.mul(c.b.sub(c.b.exp(c.b.mul(c.b.min(x, 0.0), float(input_scale))), 1.0), float(alpha))
    return c.cast(c.b.mul(c.b.where(c.b.gt(x, 0.0), x, low), float(scale)), self.dtype)


@lowers("leaky_relu")
def leaky_relu(c: Context, self: Value, negative_slope: Number) -> Value:
    return c.b.where(c.b.gt(self, 0.0), self, c.binary("mul", self, float(negative_slope), self.dtype))


@lowers("expm1")
def expm1(c: Context, self: Value) -> Value:
    x = c.widen(c.cast(self, c.out_type.dtype))
    return c.cast(c.b.sub(c.b.exp(x), 1.0), c.out_type.dtype)


@lowers("exp2")
def exp2(c: Context, self: Value) -> Value:
    return c.binary("pow", 2.0, c.cast(self, c.out_type.dtype), c.out_type.dtype)


def _log_base(base: float) -> Any:
    def lower(c: Context, self: Value) -> Value:
        x = c.widen(c.cast(self, c.out_type.dtype))
        return c.cast(c.b.div(c.b.log(x), math.log(base)), c.out_type.dtype)

    return lower


lowers("log2")(_log_base(2.0))
lowers("log10")(_log_base(10.0))


@lowers("tan")
def tan(c: Context, self: Value) -> Value:
    x = c.widen(c.cast(self, c.out_type.dtype))
    return c.cast(c.b.div(c.b.sin(x), c.b.cos(x)), c.out_type.dtype)


@lowers("_to_copy", "to.dtype", "to.dtype_layout", "to.device", "to.other")
def to(c: Context, self: Value) -> Value:
    return c.cast(self, c.out_type.dtype)


@lowers("prims::convert_element_type")
def convert_element_type(c: Context, a: Value, dtype: TorchDType) -> Value:
    return c.cast(a, DType.of(dtype))


@lowers("clone", "alias", "detach", "detach_", "contiguous", "lift_fresh_copy", "lift_fresh", "positive", "conj")
def identity(c: Context, self: Value) -> Value:
    return self


@lowers("copy")
def copy(c: Context, self: Value, src: Value) -> Value:
    return c.expand(c.cast(src, self.dtype), self.shape)


@lowers("dropout", "native_dropout")
def dropout(c: Context, input: Value, p: float, train: bool | None) -> Any:
    if train and p > 0:
        raise c.refuse("dropout is active", hint="call model.eval() before tracing")
    if c.op == "aten::native_dropout":
        return [input, c.full(input.shape, True, DType.BOOL)]
    return input
