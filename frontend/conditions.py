"""Conditions on sizes as text, `B*S <= 1000`: what a trace took as true, and a call has to keep to."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, reduce
from typing import Any

import sympy

from moec.ir import CompileError, Dim
from moec.ir.dims import parse_size, size

Sizes = Mapping[str, int]
Evaluator = Callable[[Sizes], Any]

_RELATIONS: dict[str, tuple[type[sympy.Basic], type[ast.cmpop], Callable[[Any, Any], bool]]] = {
    "==": (sympy.Eq, ast.Eq, operator.eq),
    "!=": (sympy.Ne, ast.NotEq, operator.ne),
    "<=": (sympy.Le, ast.LtE, operator.le),
    "<": (sympy.Lt, ast.Lt, operator.lt),
    ">=": (sympy.Ge, ast.GtE, operator.ge),
    ">": (sympy.Gt, ast.Gt, operator.gt),
}
_LONGEST = 2000  # characters
_DEEPEST = 8  # of and, or, not in each other


@dataclass(frozen=True)
class Condition:
    """A condition on the sizes of a program's inputs, over its symbols: comparisons of sizes as the text format writes
    them, joined by `and`, `or` and `not`."""

    text: str

    @staticmethod
    def of(expr: sympy.Basic) -> Condition:
        """Raises CompileError for what has no such form."""
        return Condition(_written(expr))

    @property
    def expr(self) -> sympy.Basic:
        """Raises CompileError for text that is none."""
        return _read(self.text)

    @property
    def symbols(self) -> frozenset[str]:
        return _compiled(self.text)[0]

    def holds(self, sizes: Sizes) -> bool:
        """Whether it is true; what it does not say anything about (a missing size, a division by 0) is."""
        symbols, evaluator = _compiled(self.text)
        try:
            return not symbols <= sizes.keys() or bool(evaluator(sizes))
        except ZeroDivisionError:
            return True

    def __str__(self) -> str:
        return self.text


def simplest(relation: sympy.core.relational.Relational) -> sympy.Basic:
    """A comparison of sizes without common factors: 4 <= 12*B*S is B*S >= 1, and 6*B <= 2*S is 3*B <= S."""
    terms = sympy.expand(relation.lhs - relation.rhs)
    if not terms.is_polynomial(*terms.free_symbols):
        return relation
    factors = dict(terms.as_coefficients_dict())
    rest = factors.pop(sympy.S.One, sympy.S.Zero)
    if not factors or not all(f.is_Integer for f in (rest, *factors.values())):
        return relation
    if len(factors) > 1:
        divisor = reduce(sympy.igcd, (rest, *factors.values()))
        return relation.func(relation.lhs / divisor, relation.rhs / divisor)
    ((term, factor),) = factors.items()
    kind = type(relation) if factor > 0 else type(relation.reversed)
    bound = -rest / factor  # sizes are integers
    if issubclass(kind, sympy.Ge):
        return sympy.Ge(term, sympy.ceiling(bound))
    if issubclass(kind, sympy.Gt):
        return sympy.Ge(term, sympy.floor(bound) + 1)
    if issubclass(kind, sympy.Le):
        return sympy.Le(term, sympy.floor(bound))
    if issubclass(kind, sympy.Lt):
        return sympy.Le(term, sympy.ceiling(bound) - 1)
    return relation.func(term, bound) if bound.is_Integer else relation


def _written(expr: sympy.Basic) -> str:
    for sign, (kind, _, _) in _RELATIONS.items():
        if isinstance(expr, kind):
            left, right = (size(sympy.sympify(side)) for side in expr.args)
            return f"{left} {sign} {right}"
    if isinstance(expr, sympy.Not):
        return f"not ({_written(expr.args[0])})"
    for word, join in (("and", sympy.And), ("or", sympy.Or)):
        if isinstance(expr, join):
            return f" {word} ".join(f"({_written(a)})" for a in sorted(expr.args, key=str))
    raise CompileError(f"{expr} is no condition on sizes", code="dims")


@lru_cache(maxsize=4096)
def _read(text: str) -> sympy.Basic:
    def side(node: ast.expr) -> sympy.Expr:
        found = parse_size(ast.unparse(node))
        return found.expr if isinstance(found, Dim) else sympy.Integer(found)

    def walk(node: ast.expr, depth: int) -> sympy.Basic:
        if depth <= _DEEPEST:
            match node:
                case ast.Compare(left=left, ops=[sign], comparators=[right]):
                    kind = next((k for k, s, _ in _RELATIONS.values() if isinstance(sign, s)), None)
                    if kind is not None:
                        return kind(side(left), side(right))
                case ast.BoolOp(op=join, values=values):
                    parts = [walk(v, depth + 1) for v in values]
                    return sympy.And(*parts) if isinstance(join, ast.And) else sympy.Or(*parts)
                case ast.UnaryOp(op=ast.Not(), operand=inner):
                    return sympy.Not(walk(inner, depth + 1))
        raise CompileError(f"bad condition {text!r}", code="syntax", hint="compare two sizes, as in B*S <= 1000")

    if len(text) > _LONGEST:
        raise CompileError(f"condition of {len(text)} characters, more than {_LONGEST}", code="syntax")
    try:
        return walk(ast.parse(text, mode="eval").body, 0)
    except (SyntaxError, RecursionError, MemoryError, ValueError) as e:
        raise CompileError(f"bad condition {text!r}: {e}", code="syntax") from None


@lru_cache(maxsize=4096)
def _compiled(text: str) -> tuple[frozenset[str], Evaluator]:
    expr = _read(text)
    return frozenset(s.name for s in expr.free_symbols), evaluator(expr)


def evaluator(e: sympy.Basic) -> Evaluator:
    """A size or condition as a function of the sizes of its symbols: exact, and far faster than sympy's own."""
    if e.is_Symbol:
        name = e.name
        return lambda sizes: sizes[name]
    if isinstance(e, sympy.Rational):
        value = int(e) if e.is_Integer else Fraction(int(e.p), int(e.q))
        return lambda sizes: value
    if e in (sympy.true, sympy.false):
        truth = e is sympy.true
        return lambda sizes: truth
    args = [evaluator(a) for a in e.args]
    for kind, _, compare in _RELATIONS.values():
        if isinstance(e, kind):
            left, right = args
            return lambda sizes: compare(left(sizes), right(sizes))
    for kinds, combine in _FUNCTIONS.items():
        if isinstance(e, kinds):
            return lambda sizes: combine([a(sizes) for a in args])
    raise CompileError(f"{e} is no condition on sizes", code="dims")


def _power(values: list[Any]) -> Any:
    base, exponent = values
    if not isinstance(exponent, int):
        raise CompileError(f"a size to the power of {exponent}", code="dims")
    return Fraction(base) ** exponent if exponent < 0 else base**exponent


_FUNCTIONS: dict[Any, Callable[[list[Any]], Any]] = {
    sympy.Add: sum,
    sympy.Mul: lambda v: reduce(operator.mul, v),
    sympy.Pow: _power,
    sympy.floor: lambda v: math.floor(v[0]),
    sympy.ceiling: lambda v: math.ceil(v[0]),
    sympy.Mod: lambda v: v[0] % v[1],
    sympy.Min: min,
    sympy.Max: max,
    sympy.And: all,
    sympy.Or: any,
    sympy.Not: lambda v: not v[0],
}
