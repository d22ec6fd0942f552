"""`math`: elementwise ops, with NumPy broadcasting for more than one operand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from moec.ir.errors import require
from moec.ir.literals import check_literal, literal
from moec.ir.opdef import Attr, Operand, op
from moec.ir.types import DType, TensorType, broadcast


def _softplus(x: torch.Tensor) -> torch.Tensor:
    return F.softplus(x, threshold=40.0)  # from 20 on, as torch has it, f64 loses 1e-9


def _unary(
    name: str,
    doc: str,
    fn: Callable[[torch.Tensor], torch.Tensor],
    kinds: str,
    *,
    positive: bool = False,
    predicate: bool = False,
) -> None:
    class Unary:
        x: Operand

        def infer(self: Any) -> TensorType:
            require(_kind(self.x.dtype) in kinds, f"takes {_names(kinds)}, got {self.x.dtype}")
            return self.x.with_dtype(DType.BOOL) if predicate else self.x

        def reference(self: Any) -> torch.Tensor:
            return fn(self.x)

        @staticmethod
        def samples(r: Any) -> Any:
            if "f" in kinds:
                yield [r.floats(r.n, r.m, positive=positive)], {}
                yield [r.floats(positive=positive)], {}
            if "i" in kinds:
                yield [r.ints(-9, 9, r.n, r.m)], {}
            if "b" in kinds:
                yield [r.bools(r.n)], {}

    Unary.__doc__ = doc
    op(f"math.{name}", elementwise=True)(Unary)


def _kind(dtype: DType) -> str:
    return "f" if dtype.is_wide_float else "i" if dtype.is_integer else "b" if dtype is DType.BOOL else "c"


def _names(kinds: str) -> str:
    return " or ".join({"f": "floats", "i": "integers", "b": "booleans", "c": "complex"}[k] for k in kinds)


_unary("neg", "−x", torch.neg, "fi")
_unary("abs", "|x|", torch.abs, "fi")
_unary("sign", "−1, 0 or 1", torch.sign, "fi")
_unary("exp", "e^x", torch.exp, "f")
_unary("log", "ln x", torch.log, "f", positive=True)
_unary("log1p", "ln(1 + x)", torch.log1p, "f", positive=True)
_unary("sqrt", "√x", torch.sqrt, "f", positive=True)
_unary("rsqrt", "1/√x", torch.rsqrt, "f", positive=True)
_unary("reciprocal", "1/x", torch.reciprocal, "f", positive=True)
_unary("sin", "sin x", torch.sin, "f")
_unary("cos", "cos x", torch.cos, "f")
_unary("tanh", "tanh x", torch.tanh, "f")
_unary("erf", "error function", torch.erf, "f")
_unary("sigmoid", "1/(1 + e^−x)", torch.sigmoid, "f")
_unary("silu", "x · sigmoid(x)", F.silu, "f")
_unary("relu", "max(x, 0); NaN stays", torch.relu, "fi")
_unary("softplus", "ln(1 + e^x)", _softplus, "f")
_unary("floor", "⌊x⌋", torch.floor, "f")
_unary("ceil", "⌈x⌉", torch.ceil, "f")
_unary("round", "to nearest, ties to even", torch.round, "f")
_unary("isnan", "x is NaN (as bool)", torch.isnan, "f", predicate=True)
_unary("not", "logical negation", torch.logical_not, "b")


def _binary(
    name: str,
    doc: str,
    fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    kinds: str,
    *,
    commutative: bool = False,
    predicate: bool = False,
    nonzero: bool = False,
) -> None:
    class Binary:
        a: Operand
        b: Operand

        def infer(self: Any) -> TensorType:
            require(self.a.dtype == self.b.dtype, f"dtypes differ: {self.a.dtype} and {self.b.dtype}")
            require(_kind(self.a.dtype) in kinds, f"takes {_names(kinds)}, got {self.a.dtype}")
            dtype = DType.BOOL if predicate else self.a.dtype
            return TensorType(dtype, broadcast(self.a.shape, self.b.shape))

        def reference(self: Any) -> torch.Tensor:
            # 0-d tensors must not lose out in type promotion: both already have one dtype
            return fn(self.a, self.b).to(torch.bool if predicate else self.a.dtype)

        @staticmethod
        def samples(r: Any) -> Any:
            if "f" in kinds:
                yield [r.floats(r.n, r.m), r.floats(r.n, r.m, positive=nonzero)], {}
                yield [r.floats(r.n, 1), r.floats(r.m, positive=nonzero)], {}
                yield [r.floats(), r.floats(r.k, positive=nonzero)], {}
            if "i" in kinds:
                yield [r.ints(-9, 9, r.n, r.m), r.ints(1 if nonzero else -9, 9, r.m)], {}
            if "b" in kinds:
                yield [r.bools(r.n, r.m), r.bools(r.m)], {}

    Binary.__doc__ = doc
    op(f"math.{name}", elementwise=True, commutative=commutative)(Binary)


def _trunc_to_floor(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.div(a, b, rounding_mode="floor")


_binary("add", "a + b", torch.add, "fi", commutative=True)
_binary("sub", "a − b", torch.sub, "fi")
_binary("mul", "a · b", torch.mul, "fi", commutative=True)
_binary("div", "a / b", torch.div, "f", nonzero=True)
_binary("floordiv", "⌊a / b⌋", _trunc_to_floor, "fi", nonzero=True)
_binary("mod", "a − b·⌊a / b⌋ (sign of b)", torch.remainder, "fi", nonzero=True)
_binary("pow", "a^b", torch.pow, "f")
_binary("max", "larger of the two; NaN wins", torch.maximum, "fi", commutative=True)
_binary("min", "smaller of the two; NaN wins", torch.minimum, "fi", commutative=True)
_binary("eq", "a = b", torch.eq, "fib", commutative=True, predicate=True)
_binary("ne", "a ≠ b", torch.ne, "fib", commutative=True, predicate=True)
_binary("lt", "a < b", torch.lt, "fi", predicate=True)
_binary("le", "a ≤ b", torch.le, "fi", predicate=True)
_binary("gt", "a > b", torch.gt, "fi", predicate=True)
_binary("ge", "a ≥ b", torch.ge, "fi", predicate=True)
_binary("and", "logical and", torch.logical_and, "b", commutative=True)
_binary("or", "logical or", torch.logical_or, "b", commutative=True)
_binary("xor", "logical exclusive or", torch.logical_xor, "b", commutative=True)


def gelu(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """torch's, but that +∞ stays: torch's vectorised kernels make NaN of it, on some processors and sizes."""
    return torch.where(x == torch.inf, x, F.gelu(x, approximate=approximate))


@op("math.gelu", elementwise=True)
class Gelu:
    """Gaussian error linear unit; `approximate` is "none" (erf) or "tanh"."""

    x: Operand
    approximate: Attr[str] = "none"

    def infer(self) -> TensorType:
        require(self.x.dtype.is_wide_float, f"takes floats, got {self.x.dtype}")
        require(self.approximate in ("none", "tanh"), f"approximate is {self.approximate!r}, not 'none' or 'tanh'")
        return self.x

    def reference(self) -> torch.Tensor:
        return gelu(self.x, self.approximate)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.floats(r.n, r.m)], {}
        yield [r.floats(r.n, r.m)], {"approximate": "tanh"}


@op("math.clamp", elementwise=True)
class Clamp:
    """min(max(x, low), high); a None bound is absent; NaN stays."""

    x: Operand
    low: Attr[int | float | None] = None
    high: Attr[int | float | None] = None

    def infer(self) -> TensorType:
        require(_kind(self.x.dtype) in "fi", f"takes numbers, got {self.x.dtype}")
        require(self.low is not None or self.high is not None, "needs low or high")
        for name, bound in (("low", self.low), ("high", self.high)):
            if bound is not None:
                check_literal(bound, self.x.dtype, name)
        return self.x

    def reference(self) -> torch.Tensor:
        low, high = (None if b is None else literal(b, DType.of(self.x.dtype)) for b in (self.low, self.high))
        return torch.clamp(self.x, low, high)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.floats(r.n, r.m)], {"low": -0.5, "high": 0.25}
        yield [r.floats(r.n)], {"high": 0.0}
        yield [r.ints(-9, 9, r.n)], {"low": -2}


@op("math.where", elementwise=True)
class Where:
    """a where the condition holds, else b."""

    condition: Operand
    a: Operand
    b: Operand

    def infer(self) -> TensorType:
        require(self.condition.dtype is DType.BOOL, f"the condition is {self.condition.dtype}, not bool")
        require(self.a.dtype == self.b.dtype, f"dtypes differ: {self.a.dtype} and {self.b.dtype}")
        return TensorType(self.a.dtype, broadcast(self.condition.shape, self.a.shape, self.b.shape))

    def reference(self) -> torch.Tensor:
        return torch.where(self.condition, self.a, self.b)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.bools(r.n, r.m), r.floats(r.n, r.m), r.floats()], {}
        yield [r.bools(r.n, 1), r.ints(0, 5, r.m), r.ints(0, 5, r.n, r.m)], {}


@op("math.swiglu", elementwise=True)
class SwiGLU:
    """silu(gate) · up (Shazeer 2020)."""

    gate: Operand
    up: Operand

    def infer(self) -> TensorType:
        require(self.gate == self.up and self.gate.dtype.is_wide_float, f"gate is {self.gate}, up is {self.up}")
        return self.gate

    def reference(self) -> torch.Tensor:
        return F.silu(self.gate) * self.up

    def decompose(self, b: Any) -> Any:
        return b.mul(b.silu(self.gate), self.up)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.floats(r.n, r.m), r.floats(r.n, r.m)], {}


def check_limit(limit: float | None) -> None:
    """Of a clamped SwiGLU: below 0 a clamp to ±limit would have no range."""
    require(limit is None or limit >= 0.0, f"limit {limit!r} is no number of at least 0")


@op("math.glu")
class GLU:
    """activation(gate) · up: the gated units of Shazeer 2020 beside `math.swiglu`.

    `activation`: "gelu" and "gelu_tanh" (GeGLU), "relu" (ReGLU). With a `limit`, which goes with "silu" only, the
    clamped SwiGLU g · sigmoid(alpha · g) · (u + up_offset) of g = min(gate, limit) and u = clip(up, ±limit): GPT-OSS
    (alpha 1.702, up_offset 1), DeepSeek-V4 (1, 0). Written "silu" without a limit it would be `math.swiglu`, and is
    refused, so that each unit has one form.
    """

    gate: Operand
    up: Operand
    activation: Attr[str] = "silu"
    limit: Attr[float | None] = None
    alpha: Attr[float] = 1.702
    up_offset: Attr[float] = 1.0

    def infer(self) -> TensorType:
        require(self.gate == self.up and self.gate.dtype.is_wide_float, f"gate is {self.gate}, up is {self.up}")
        known = ("silu", "gelu", "gelu_tanh", "relu")
        require(self.activation in known, f"activation {self.activation!r} is none of {known}")
        check_limit(self.limit)
        require(self.limit is None or self.activation == "silu", f"limit with {self.activation!r}: silu only")
        require(self.limit is not None or self.activation != "silu", "silu without a limit is math.swiglu")
        return self.gate

    def reference(self) -> torch.Tensor:
        if self.limit is not None:
            limit = literal(self.limit, DType.of(self.gate.dtype))
            gate, up = self.gate.clamp(max=limit), self.up.clamp(-limit, limit)
            return gate * torch.sigmoid(self.alpha * gate) * (up + self.up_offset)
        if self.activation.startswith("gelu"):
            return gelu(self.gate, "tanh" if self.activation == "gelu_tanh" else "none") * self.up
        return torch.relu(self.gate) * self.up

    def decompose(self, b: Any) -> Any:
        gate, up = self.gate, self.up
        if self.limit is not None:
            gate, up = b.clamp(gate, high=self.limit), b.clamp(up, low=-self.limit, high=self.limit)
            scaled = gate if self.alpha == 1.0 else b.mul(gate, self.alpha)
            return b.mul(b.mul(gate, b.sigmoid(scaled)), b.add(up, self.up_offset) if self.up_offset else up)
        if self.activation.startswith("gelu"):
            return b.mul(b.gelu(gate, approximate="tanh" if self.activation == "gelu_tanh" else "none"), up)
        return b.mul(b.relu(gate), up)

    @staticmethod
    def samples(r: Any) -> Any:
        for activation in ("gelu", "gelu_tanh", "relu"):
            yield [r.floats(r.n, r.m), r.floats(r.n, r.m)], {"activation": activation}
        yield [r.floats(r.n, r.m), r.floats(r.n, r.m)], {"limit": 0.75}
        yield [r.floats(r.n, r.m), r.floats(r.n, r.m)], {"limit": 0.5, "alpha": 1.0, "up_offset": 0.0}


@op("math.cast", elementwise=True)
class Cast:
    """Convert to `dtype`. To E4M3 it saturates at ±448 and keeps NaN (torch's rule); floats become integers towards
    zero, and what is out of their range or NaN becomes any integer. What overflows f16 may stay in the wider floats
    of a backend."""

    x: Operand
    dtype: Attr[DType]

    def infer(self) -> TensorType:
        return self.x.with_dtype(self.dtype)

    def reference(self) -> torch.Tensor:
        return self.x.to(self.dtype.torch)

    def undefined(self) -> torch.Tensor | bool:
        if not self.x.is_floating_point():
            return False
        if self.dtype is DType.F16:  # a backend may carry f16 in f32, where it does not overflow
            return self.x.isfinite() & ~self.x.to(torch.float16).isfinite() if self.x.dtype.itemsize > 1 else False
        if not self.dtype.is_integer:
            return False
        x, limits = self.x.to(torch.float64).trunc(), torch.iinfo(self.dtype.torch)
        # −2⁶³ is a float, 2⁶³ − 1 is not
        return ~((x >= limits.min) & (x < float(limits.max + 1)))

    @staticmethod
    def samples(r: Any) -> Any:
        for dtype in ("f32", "f16", "bf16", "f64", "i64", "i32", "f8e4m3fn"):
            yield [r.floats(r.n, r.m)], {"dtype": dtype}
        yield [r.ints(-9, 9, r.n)], {"dtype": "f32"}
        yield [r.ints(0, 2, r.n)], {"dtype": "bool"}
        yield [r.bools(r.n)], {"dtype": "i64"}
        yield [r.bools(r.n)], {"dtype": "f32"}
