"""What a lowering function works with: a builder at the current location, dtype promotion, shape helpers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from moec.frontend.symbols import Symbols
from moec.ir import Builder, CompileError, Dim, DType, Graph, TensorType, Value

Size = int | Dim
Number = bool | int | float
_HALF = (DType.BF16, DType.F16)


class Context:
    """Handed to every lowering. `out` is torch's type of the op's result (a list for several results);
    `b` builds IR nodes."""

    def __init__(self, graph: Graph, symbols: Symbols):
        self.graph = graph
        self.symbols = symbols
        self.b = Builder(graph)
        self.out: Any = None
        self.op = ""
        self.node: Any = None  # torch's node, for what only its metadata knows
        # pieces that a value was put together from along an axis, see slice_scatter in aten/shape.py
        self.phases: dict[Value, tuple[int, list[Value]]] = {}
        self.segments: dict[Value, tuple[int, list[Value]]] = {}

    # -- refusing -----------------------------------------------------------------------------------

    def refuse(self, message: str, *, hint: str | None = None, code: str = "unsupported-op") -> CompileError:
        """The error for something this op cannot express; the driver adds the location."""
        return CompileError(f"{self.op}: {message}", code=code, hint=hint)

    # -- values and dtypes --------------------------------------------------------------------------

    def value(self, x: Value | Number | Dim, dtype: DType | None = None) -> Value:
        """`x` as a Value of `dtype` (a number or size becomes a scalar)."""
        if isinstance(x, Dim):
            return self.value(self.b.dim(value=x), dtype)
        if isinstance(x, Value):
            return x if dtype is None else self.cast(x, dtype)
        kind = DType.BOOL if isinstance(x, bool) else DType.I64 if isinstance(x, int) else DType.F32
        dtype = dtype or kind
        return self.b.const(as_number(x, dtype), dtype)

    def cast(self, x: Value, dtype: DType) -> Value:
        return x if x.dtype is dtype else self.b.cast(x, dtype=dtype)

    def promote(self, *xs: Value | Number | Dim) -> DType:
        """torch's result dtype of an elementwise op on these operands."""
        keys: list[Any] = []
        for x in xs:
            if isinstance(x, Value):
                keys.append((x.dtype.torch, x.type.rank > 0))
            else:
                keys.append(bool if isinstance(x, bool) else float if isinstance(x, float) else int)
        result = keys[0]
        for k in keys[1:]:
            result = _join(result, k)
        if isinstance(result, tuple):
            return DType.of(result[0])
        return {bool: DType.BOOL, int: DType.I64, float: DType.F32}[result]

    def binary(self, op: str, a: Any, b: Any, dtype: DType | None = None) -> Value:
        """An arithmetic op with torch's promotion. Half-width operands meeting a number (or 0-d tensor) that
        their dtype cannot hold are computed in f32 and rounded once, as torch does on a GPU and, but for
        subtraction, on a CPU."""
        dtype = dtype or self.promote(a, b)
        compute = DType.F32 if dtype in _HALF and not (_fits(a, dtype) and _fits(b, dtype)) else dtype
        return self.cast(self.b.op(f"math.{op}", (self.value(a, compute), self.value(b, compute))), dtype)

    def compare(self, op: str, a: Any, b: Any) -> Value:
        dtype = self.promote(a, b)
        if dtype is DType.BOOL and op not in ("eq", "ne"):
            dtype = DType.I64
        return self.b.op(f"math.{op}", (self.value(a, dtype), self.value(b, dtype)))

    def truth(self, x: Value) -> Value:
        """x ≠ 0 as bool."""
        return x if x.dtype is DType.BOOL else self.b.ne(x, self.value(0, x.dtype))

    def widen(self, x: Value) -> Value:
        """f32 for half-width floats, else x."""
        return self.cast(x, DType.F32) if x.dtype in _HALF else x

    # -- shapes -------------------------------------------------------------------------------------

    def reshape(self, x: Value, shape: Sequence[Size]) -> Value:
        return x if x.shape == tuple(shape) else self.b.reshape(x, shape=tuple(shape))

    def transpose(self, x: Value, perm: Sequence[int]) -> Value:
        return x if list(perm) == list(range(x.type.rank)) else self.b.transpose(x, perm=tuple(perm))

    def expand(self, x: Value, shape: Sequence[Size]) -> Value:
        return x if x.shape == tuple(shape) else self.b.expand(x, shape=tuple(shape))

    def slice(self, x: Value, axis: int, start: Size, end: Size, step: int = 1) -> Value:
        if start == 0 and end == x.shape[axis] and step == 1:
            return x
        return self.b.slice(x, axis=axis, start=start, end=end, step=step)

    def concat(self, xs: Sequence[Value], axis: int) -> Value:
        return xs[0] if len(xs) == 1 else self.b.concat(*xs, axis=axis)

    def move_axis_last(self, x: Value, axis: int) -> Value:
        rank = x.type.rank
        return self.transpose(x, [i for i in range(rank) if i != axis] + [axis])

    def full(self, shape: Sequence[Size], value: Number, dtype: DType) -> Value:
        return self.b.full(shape=tuple(shape), value=as_number(value, dtype), dtype=dtype)

    def axis(self, axis: int, x: Value | int) -> int:
        """A non-negative axis (rank 0 counts as rank 1, as in torch)."""
        rank = max(x.type.rank if isinstance(x, Value) else x, 1)
        return axis + rank if axis < 0 else axis

    def axes(self, dim: Any, x: Value) -> tuple[int, ...]:
        """Reduction axes: None or an empty list means all."""
        if dim is None or (isinstance(dim, list | tuple) and not dim):
            return tuple(range(x.type.rank))
        dims = dim if isinstance(dim, list | tuple) else [dim]
        return tuple(self.axis(d, x) for d in dims) if x.type.rank else ()

    @property
    def out_type(self) -> TensorType:
        assert isinstance(self.out, TensorType)
        return self.out


def as_number(x: Number, dtype: DType) -> Number:
    """The Python number of the kind that `dtype` holds."""
    return float(x) if dtype.is_float else bool(x) if dtype is DType.BOOL else int(x)


def _join(a: Any, b: Any) -> Any:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return _result(a, b), a[1] or b[1]
    if isinstance(a, tuple):
        return _result(a, b), a[1]
    if isinstance(b, tuple):
        return _result(a, b), b[1]
    order = (bool, int, float)
    return max(a, b, key=order.index)


@cache
def _result(a: Any, b: Any) -> torch.dtype:
    def example(k: Any) -> Any:
        if isinstance(k, tuple):
            return torch.empty((1,) if k[1] else (), dtype=k[0], device="meta")
        return k(1)

    return torch.result_type(example(a), example(b))


def _fits(x: Any, dtype: DType) -> bool:
    if isinstance(x, Value):
        return not x.dtype.is_float or x.dtype.bits <= dtype.bits
    if isinstance(x, Dim):
        return False
    return float(torch.tensor(float(x), dtype=dtype.torch)) == float(x) or x != x
