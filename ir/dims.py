"""Symbolic sizes: sympy expressions over named non-negative integers."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import sympy

from moec.ir.errors import ArgumentValueError, CompileError


@cache
def _symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, nonnegative=True)


class Dim:
    """A size that is not known until run time, e.g. `Dim("B") * Dim("S")`.

    Arithmetic (`+ - * // %`) returns a `Dim`, or an `int` where the symbols cancel. Two dims are equal
    where their expanded expressions are.
    """

    __slots__ = ("expr",)

    def __init__(self, expr: str | sympy.Expr):
        if isinstance(expr, str):
            parsed = parse_size(expr)
            self.expr: sympy.Expr = parsed.expr if isinstance(parsed, Dim) else sympy.Integer(parsed)
        else:
            self.expr = expr

    @property
    def symbols(self) -> frozenset[str]:
        return frozenset(s.name for s in self.expr.free_symbols)

    @property
    def is_symbol(self) -> bool:
        return bool(self.expr.is_Symbol)

    def evaluate(self, binding: Mapping[str, int]) -> int:
        """The integer under `binding` (symbol name → value). Raises CompileError on an unbound symbol, and where the
        value is no integer."""
        names, fn = _compiled(self.expr)
        try:
            found = fn(*[binding[n] for n in names])
        except KeyError as e:
            raise CompileError(f"dimension {e.args[0]!r} of {self} is not bound", code="dims") from None
        except ZeroDivisionError:
            found = sympy.zoo
        if not (isinstance(found, int) or found.is_Integer):
            known = ", ".join(f"{n} = {binding[n]}" for n in names)
            raise CompileError(f"{self} is {found} for {known}, which is no size", code="dims")
        return int(found)

    def substitute(self, binding: Mapping[str, int | Dim]) -> int | Dim:
        """Replace symbols by sizes at once."""
        return size(self.expr.subs({_symbol(k): _expr(v) for k, v in binding.items()}, simultaneous=True))

    def __add__(self, other: int | Dim) -> int | Dim:
        return _combine(operator.add, self, other)

    def __radd__(self, other: int | Dim) -> int | Dim:
        return _combine(operator.add, other, self)

    def __sub__(self, other: int | Dim) -> int | Dim:
        return _combine(operator.sub, self, other)

    def __rsub__(self, other: int | Dim) -> int | Dim:
        return _combine(operator.sub, other, self)

    def __mul__(self, other: int | Dim) -> int | Dim:
        return _combine(operator.mul, self, other)

    def __rmul__(self, other: int | Dim) -> int | Dim:
        return _combine(operator.mul, other, self)

    def __floordiv__(self, other: int | Dim) -> int | Dim:
        return _combine(_floordiv, self, other)

    def __rfloordiv__(self, other: int | Dim) -> int | Dim:
        return _combine(_floordiv, other, self)

    def __mod__(self, other: int | Dim) -> int | Dim:
        return _combine(sympy.Mod, self, other)

    def __neg__(self) -> int | Dim:
        return _combine(operator.mul, self, -1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dim) and self.expr == other.expr

    def __hash__(self) -> int:
        return hash(self.expr)

    def __str__(self) -> str:
        return _text(self.expr)

    def __repr__(self) -> str:
        return f"Dim({str(self)!r})"


def _floordiv(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    if b.is_Integer and b > 0:  # ⌊(⌊y⌋ + k) / b⌋ = ⌊(y + k) / b⌋: sizes behind many convolutions stay short
        k, rest = a.as_coeff_Add()
        if isinstance(rest, sympy.floor) and k.is_Integer:
            a = rest.args[0] + k
    return sympy.floor(a / b)


@cache
def _text(expr: sympy.Expr) -> str:
    return sympy.sstr(expr)


@cache
def _compiled(expr: sympy.Expr) -> tuple[list[str], Callable[..., Any]]:
    symbols = sorted(expr.free_symbols, key=lambda s: s.name)
    if expr.is_polynomial() and all(c.is_Integer for c in expr.as_coefficients_dict().values()):
        return [s.name for s in symbols], sympy.lambdify(symbols, expr, modules="math")
    # floor and ceiling stay in sympy: math's go through floats and lose sizes above 2**53
    return [s.name for s in symbols], lambda *v: expr.subs(dict(zip(symbols, v, strict=True)))


def _expr(x: int | Dim) -> sympy.Expr:
    # operator.index: sympy would cut 1.5 to 1
    return x.expr if isinstance(x, Dim) else sympy.Integer(operator.index(x))


@lru_cache(maxsize=65536)
def _combine(op: Callable[[Any, Any], Any], a: int | Dim, b: int | Dim) -> int | Dim:
    return size(op(_expr(a), _expr(b)))


def size(expr: int | sympy.Expr | Dim) -> int | Dim:
    """Normalise: an `int` where the expression is constant, else a `Dim` in expanded form.

    Raises CompileError where it is no size (infinite, or of another type) or is more complicated than sizes of models
    are.
    """
    if isinstance(expr, int | Dim):
        return expr
    if not isinstance(expr, sympy.Expr):  # sympy would evaluate text as Python
        raise CompileError(f"{expr!r} is no size", code="dims")
    if not expr.is_Integer:
        expr = _bounded(sympy.expand(_bounded(expr)))
    return int(expr) if expr.is_Integer else Dim(expr)


# Sympy needs time and memory without bound for expressions that fit in a line: far more than any model's sizes need.
_MOST_TERMS = 128
_MOST_SYMBOLS = 32
_MOST_FUNCTIONS = 12  # floor, ceiling, Max, Min, Mod
_DEEPEST = 24
_LARGEST = 2**63


def _bounded(expr: sympy.Expr) -> sympy.Expr:
    """`expr` itself, checked before it is expanded. Raises CompileError."""
    terms, functions, depth = _extent(expr)
    for what, found, most in (
        ("terms", terms, _MOST_TERMS),
        ("symbols", len(expr.free_symbols), _MOST_SYMBOLS),
        ("functions", functions, _MOST_FUNCTIONS),
        ("levels", depth, _DEEPEST),
    ):
        if found > most:
            raise CompileError(f"a dimension has {found} {what}, more than {most}", code="dims")
    return expr


@lru_cache(maxsize=65536)
def _extent(expr: sympy.Expr) -> tuple[int, int, int]:
    """Terms after expansion (at most), functions, nesting. Sympy builds from parts that were measured before, so the
    recursion is short."""
    if expr.is_Rational:
        if not (-_LARGEST <= expr.p < _LARGEST and expr.q < _LARGEST):
            raise CompileError("a dimension has a factor beyond 64 bits", code="dims")
        return 1, 0, 0
    if not expr.args:
        if expr.is_Symbol:
            return 1, 0, 0
        raise CompileError(f"a dimension holds {expr}, which is no size", code="dims")
    parts = [_extent(a) for a in expr.args]
    functions, depth = sum(f for _, f, _ in parts), 1 + max(d for _, _, d in parts)
    terms = [t for t, _, _ in parts]
    if expr.is_Add:
        return sum(terms), functions, depth
    if expr.is_Mul:
        return math.prod(terms), functions, depth
    if expr.is_Pow:
        exponent = expr.args[1]
        return terms[0] ** (min(abs(int(exponent)), 64) if exponent.is_Integer else 64), functions, depth
    return 1, functions + max(1, len(expr.args) - 1), depth


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.FloorDiv: _floordiv,
    ast.Mod: sympy.Mod,
}
_LONGEST = 1000  # characters
_FUNCTIONS = {"floor": sympy.floor, "ceiling": sympy.ceiling, "Max": sympy.Max, "Min": sympy.Min, "Mod": sympy.Mod}


@lru_cache(maxsize=4096)
def parse_size(text: str) -> int | Dim:
    """Read what `str(Dim)` printed: names, integers, `+ - * / // % **`, floor, ceiling, Max, Min, Mod."""

    def walk(node: ast.AST) -> sympy.Expr:
        match node:
            case ast.Expression():
                return walk(node.body)
            case ast.Constant(value=int(v)) if not isinstance(v, bool):
                return sympy.Integer(v)
            case ast.Name():
                return _symbol(node.id)
            case ast.UnaryOp(op=ast.USub()):
                return -walk(node.operand)
            case ast.BinOp() if type(node.op) in _BINARY:
                left, right = walk(node.left), walk(node.right)
                if isinstance(node.op, ast.Pow) and not (right.is_Integer and 0 <= right <= 16):
                    raise CompileError("bad exponent", code="syntax")
                return _bounded(_BINARY[type(node.op)](left, right))
            case ast.Call(func=ast.Name(id=fn)) if fn in _FUNCTIONS and not node.keywords:
                if not 1 <= len(node.args) <= _MOST_FUNCTIONS:
                    raise CompileError(f"{fn} of {len(node.args)} sizes", code="syntax")
                return _bounded(_FUNCTIONS[fn](*[walk(a) for a in node.args]))
        raise CompileError("not a size", code="syntax", hint="use names, integers, + - * // and %")

    if len(text) > _LONGEST:
        raise CompileError(f"dimension of {len(text)} characters, more than {_LONGEST}", code="syntax")
    try:
        return size(walk(ast.parse(text, mode="eval")))
    except CompileError as e:
        raise CompileError(f"bad dimension {_clipped(text)}: {e.message}", code=e.code, hint=e.hint) from None
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError, ValueError, TypeError) as e:
        raise CompileError(f"bad dimension {_clipped(text)}: {e}", code="syntax") from None


def _clipped(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def evaluate(x: int | Dim, binding: Mapping[str, int]) -> int:
    """`x` as an integer under `binding`."""
    return x.evaluate(binding) if isinstance(x, Dim) else x


def product(sizes: Sequence[int | Dim]) -> int | Dim:
    """Number of elements of a shape."""
    result: int | Dim = 1
    for s in sizes:
        if isinstance(s, bool) or not isinstance(s, int | Dim):
            raise CompileError(f"{s!r} is no size", code="dims")
        result = result * s
    return result


def ceil_div(a: int | Dim, b: int) -> int | Dim:
    """⌈a / b⌉."""
    if isinstance(a, int):
        return -(-a // b)
    return size(sympy.ceiling(a.expr / b))


_MOST_DEGREE = 8  # of a size that is solved for its symbol


def _solve(expr: sympy.Expr, name: str) -> list[int]:
    """The sizes at which a polynomial is zero; none for anything else (sympy's own solver may take hours)."""
    if not expr.is_polynomial(_symbol(name)) or expr.has(sympy.floor, sympy.ceiling, sympy.Mod):
        return []
    terms = [(int(c.q), int(c.p)) for c in sympy.Poly(expr, _symbol(name)).all_coeffs() if c.is_Rational]
    degree = sympy.degree(expr, _symbol(name))
    if degree > _MOST_DEGREE or len(terms) != degree + 1:
        return []
    common = math.lcm(*(q for q, _ in terms))
    coefficients = [p * (common // q) for q, p in terms]

    def value(x: int) -> int:
        total = 0
        for c in coefficients:
            total = total * x + c
        return total

    if degree == 1:  # exact beyond the integers that floats hold
        near = {-coefficients[1] // coefficients[0]}
    else:
        roots = np.roots([float(c) for c in coefficients])
        near = {round(float(r.real)) + d for r in roots for d in (-1, 0, 1)}
    return sorted(x for x in near if x >= 0 and value(x) == 0)


def bind(declared: Sequence[tuple[str, Sequence[int | Dim], Sequence[int]]]) -> dict[str, int]:
    """Solve symbols from actual shapes. `declared`: (argument name, declared shape, actual shape).

    Bare symbols bind first, then polynomials in one unknown; everything is checked. Raises
    ArgumentValueError naming argument, axis, expected and got.
    """
    binding: dict[str, int] = {}
    first: dict[str, str] = {}
    pending: list[tuple[str, int, int | Dim, int]] = []
    for name, shape, actual in declared:
        if len(shape) != len(actual):
            raise ArgumentValueError(
                f"argument {name!r} has rank {len(actual)} (shape {list(actual)}), expected rank {len(shape)} "
                f"[{', '.join(map(str, shape))}]",
                code="rank",
            )
        for axis, (want, got) in enumerate(zip(shape, actual, strict=True)):
            if isinstance(want, Dim) and want.is_symbol and str(want) not in binding:
                binding[str(want)] = got
                first[str(want)] = f"{name!r} axis {axis}"
            else:
                pending.append((name, axis, want, got))
    progress = True
    while progress:
        progress = False
        for _, _, want, got in pending:
            unknown = [s for s in want.symbols if s not in binding] if isinstance(want, Dim) else []
            if len(unknown) == 1 and isinstance(want, Dim):
                solved = _solve(want.expr.subs({_symbol(k): v for k, v in binding.items()}) - got, unknown[0])
                if len(solved) == 1:
                    binding[unknown[0]] = solved[0]
                    progress = True
    for name, axis, want, got in pending:
        if isinstance(want, Dim) and not want.symbols <= binding.keys():
            unknown = sorted(want.symbols - binding.keys())
            raise ArgumentValueError(
                f"argument {name!r} axis {axis} is {got}, which no value of {want} gives, or several do",
                code="shape",
                hint=f"an input with an axis that is {' or '.join(unknown)} by itself says how large it is",
            )
        expected = evaluate(want, binding)
        if expected != got:
            why = ""
            if isinstance(want, Dim):
                parts = [f"{s} = {binding[s]} from {first[s]}" for s in sorted(want.symbols) if s in first]
                why = f" ({want}; {', '.join(parts)})" if parts else f" ({want})"
            raise ArgumentValueError(
                f"argument {name!r} axis {axis} has size {got}, expected {expected}{why}", code="shape"
            )
    return binding
