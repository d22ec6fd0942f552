"""Symbolic sizes as ONNX values: read from the shapes of the inputs, computed once and shared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as onnx
import sympy

from moec.ir import CompileError, Dim, Node
from moec.ir.runtime_sizes import introduces

if TYPE_CHECKING:
    from moec.backends.onnxruntime.emit import Emitter


def at_least(size: int | Dim, least: int | Dim) -> bool:
    """Whether size ≥ least for sure."""
    more = size - least
    if isinstance(more, int):
        return more >= 0
    return all(c.is_nonnegative for c in more.expr.as_coefficients_dict().values()) and more.expr.is_polynomial()


class Sizes:
    """Every size is an i64[1] value, so that shapes are Concats of them."""

    def __init__(self, emitter: Emitter):
        self.emitter = emitter
        self._scopes: list[dict[str, int | Dim]] = []
        self._shown: dict[str, tuple[onnx.Value, int]] = {}  # run-time sizes, and where they are read
        self.cache: dict[Any, onnx.Value] = {}
        self._solving: set[sympy.Symbol] = set()

    @contextmanager
    def bound(self, binding: Mapping[str, int | Dim]) -> Iterator[None]:
        """Within: symbols are those of a called function, bound to sizes of its caller."""
        self._scopes.append({name: self.resolve(s) for name, s in binding.items()})
        try:
            yield
        finally:
            self._scopes.pop()

    def introduce(self, node: Node) -> None:
        """Sizes that the results of a node are the first to have. In a called function each call has its own."""
        for symbol, (value, axis) in introduces(node).items():
            name = symbol
            if self._scopes:
                if symbol in self._scopes[-1]:
                    continue
                name = f"{symbol}_{len(self._shown)}_"
                self._scopes[-1][symbol] = Dim(name)
            self._shown.setdefault(name, (self.emitter.value(value), axis))

    def resolve(self, size: int | Dim) -> int | Dim:
        """The size in symbols of the outermost graph."""
        return size.substitute(self._scopes[-1]) if self._scopes and isinstance(size, Dim) else size

    def one(self, size: int | Dim) -> onnx.Value:
        """A size as i64[1]. Raises CompileError where it cannot be had from the input shapes."""
        size = self.resolve(size)
        return self._expression(size.expr if isinstance(size, Dim) else sympy.Integer(size))

    def scalar(self, size: int | Dim) -> onnx.Value:
        """A size as a 0-d i64."""
        size = self.resolve(size)
        if isinstance(size, int):
            return self.emitter.constant(np.int64(size))
        key = ("scalar", size)
        if key not in self.cache:
            self.cache[key] = self.emitter.op("Squeeze", self.one(size), np.array([0]))
        return self.cache[key]

    def range(self, size: int | Dim) -> onnx.Value:
        """i64[size] of 0, 1, …"""
        key = ("range", self.resolve(size))
        if key not in self.cache:
            self.cache[key] = self.emitter.op("Range", np.int64(0), self.scalar(size), np.int64(1))
        return self.cache[key]

    def vector(self, sizes: Sequence[int | Dim]) -> onnx.Value:
        """A shape as i64[rank]."""
        resolved = tuple(self.resolve(s) for s in sizes)
        if all(isinstance(s, int) for s in resolved):
            return self.emitter.constant(np.array(resolved, np.int64))
        if resolved not in self.cache:
            parts = [self.one(s) for s in resolved]
            self.cache[resolved] = parts[0] if len(parts) == 1 else self.emitter.op("Concat", *parts, axis=0)
        return self.cache[resolved]

    def _expression(self, expr: sympy.Expr) -> onnx.Value:
        if expr.is_Integer:
            return self.emitter.constant(np.array([int(expr)]))
        if expr not in self.cache:
            self.cache[expr] = self._emit(expr)
        return self.cache[expr]

    def _emit(self, expr: sympy.Expr) -> onnx.Value:
        op, get = self.emitter.op, self._expression
        numerator, denominator = sympy.fraction(sympy.together(expr))
        if denominator != 1:  # a size is an integer: the division is exact
            return op("Div", get(numerator), get(denominator))
        if expr.is_Symbol:
            return self._symbol(expr)
        if isinstance(expr, sympy.floor):
            return self._floor(expr.args[0])
        if isinstance(expr, sympy.ceiling):
            return op("Neg", self._floor(-expr.args[0]))
        if expr.is_Pow and expr.exp.is_Integer:
            return self._chain("Mul", [expr.base] * int(expr.exp))
        kinds = {sympy.Add: "Add", sympy.Mul: "Mul", sympy.Mod: "Mod", sympy.Max: "Max", sympy.Min: "Min"}
        for kind, name in kinds.items():
            if isinstance(expr, kind):
                return self._chain(name, expr.args)
        raise CompileError(f"size {expr} has no ONNX form", code="dims")

    def _chain(self, kind: str, args: Sequence[sympy.Expr]) -> onnx.Value:
        result = self._expression(args[0])
        for arg in args[1:]:
            result = self.emitter.op(kind, result, self._expression(arg))
        return result

    def _floor(self, expr: sympy.Expr) -> onnx.Value:
        numerator, denominator = sympy.fraction(sympy.together(expr))
        n, d = self._expression(numerator), self._expression(denominator)
        # ONNX's integer Div rounds to zero, its Mod has the sign of the divisor
        return self.emitter.op("Div", self.emitter.op("Sub", n, self.emitter.op("Mod", n, d)), d)

    def _symbol(self, symbol: sympy.Symbol) -> onnx.Value:
        axes = [(v, i, s) for v in self.emitter.graph.inputs for i, s in enumerate(v.shape) if isinstance(s, Dim)]
        for v, i, s in axes:
            if s.expr == symbol:
                return self._axis(v, i)
        for v, i, s in axes:
            slope = s.expr.diff(symbol)
            others = s.expr.free_symbols - {symbol}
            if symbol not in s.expr.free_symbols or slope.free_symbols or others & self._solving:
                continue
            self._solving.add(symbol)
            try:
                rest = self._expression(s.expr - slope * symbol)
            except CompileError:
                continue
            finally:
                self._solving.remove(symbol)
            return self.emitter.op("Div", self.emitter.op("Sub", self._axis(v, i), rest), self._expression(slope))
        if symbol.name in self._shown:
            shown, axis = self._shown[symbol.name]
            return self.emitter.op("Shape", shown, start=axis, end=axis + 1)
        raise CompileError(
            f"size {symbol} cannot be read from the shape of any input",
            code="dims",
            hint=f"give the graph an input that has {symbol} as an axis",
        )

    def _axis(self, value: Any, axis: int) -> onnx.Value:
        return self.emitter.op("Shape", self.emitter.value(value), start=axis, end=axis + 1)
