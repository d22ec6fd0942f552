"""torch's symbolic sizes → `Dim`, under readable names."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.utils._sympy import functions as torch_sympy

from moec.frontend.ranges import Ranges, extreme
from moec.ir import CompileError, Dim, DType, TensorType
from moec.ir.dims import size

_LETTERS = ("B", "S")


def _floor_div(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    return sympy.floor(a / b)


_FUNCTIONS: dict[type, Callable[..., sympy.Expr]] = {
    sympy.Add: sympy.Add,
    sympy.Mul: sympy.Mul,
    sympy.Max: sympy.Max,
    sympy.Min: sympy.Min,
    sympy.Mod: sympy.Mod,
    sympy.floor: sympy.floor,
    sympy.ceiling: sympy.ceiling,
    torch_sympy.Max: sympy.Max,
    torch_sympy.Min: sympy.Min,
    torch_sympy.Mod: sympy.Mod,
    torch_sympy.PythonMod: sympy.Mod,
    torch_sympy.FloorDiv: _floor_div,
    torch_sympy.CleanDiv: _floor_div,
    torch_sympy.CeilDiv: lambda a, b: sympy.ceiling(a / b),
    torch_sympy.IntTrueDiv: lambda a, b: a / b,
    torch_sympy.FloatTrueDiv: lambda a, b: a / b,
    torch_sympy.FloorToInt: sympy.floor,
    torch_sympy.CeilToInt: sympy.ceiling,
    torch_sympy.ToFloat: lambda a: a,
    torch_sympy.Identity: lambda a: a,
    torch_sympy.ModularIndexing: lambda a, d, m: sympy.Mod(sympy.floor(a / d), m),
}

_EXTREMES = {sympy.Max: sympy.Max, sympy.Min: sympy.Min, torch_sympy.Max: sympy.Max, torch_sympy.Min: sympy.Min}


class Symbols:
    """torch's symbols → the user's Dims where given, else B for axis 0, S for axis 1, then s0, s1 …

    `ranges` of torch's symbols, where the program holds for no other sizes, decide minima and maxima.
    """

    def __init__(self, ranges: Ranges | None = None) -> None:
        self.names: dict[str, Dim] = {}
        self._made: set[str] = set()
        self.ranges = ranges or {}

    def declare(self, shape: Sequence[Any], user_dims: Mapping[int, Dim]) -> None:
        """Name the symbols that are an axis of an input by themselves and that the user named."""
        for axis, s in enumerate(shape):
            if isinstance(s, torch.SymInt) and axis in user_dims and s.node.expr.is_Symbol:
                self.names.setdefault(s.node.expr.name, user_dims[axis])

    def declare_rest(self, shape: Sequence[Any]) -> None:
        """Name all other symbols of an input's shape, in order of appearance."""
        for axis, s in enumerate(shape):
            if not isinstance(s, torch.SymInt):
                continue
            for symbol in sorted(s.node.expr.free_symbols, key=lambda x: x.name):
                if symbol.name not in self.names:
                    self.names[symbol.name] = self._fresh(axis if s.node.expr.is_Symbol else None)

    def introduce(self, shape: Sequence[Any]) -> None:
        """Name the sizes of a result that are known only at run time: n0, n1 …"""
        for s in shape:
            if isinstance(s, torch.SymInt) and s.node.expr.is_Symbol and s.node.expr.name not in self.names:
                self.names[s.node.expr.name] = self.fresh()

    def fresh(self) -> Dim:
        """A name for one more size that is known only at run time."""
        taken = self._made.union(*(d.symbols for d in self.names.values()))
        name = next(n for i in itertools.count() if (n := f"n{i}") not in taken)
        self._made.add(name)
        return Dim(name)

    def _fresh(self, axis: int | None) -> Dim:
        taken = frozenset().union(*(d.symbols for d in self.names.values()))
        if axis is not None and axis < len(_LETTERS) and _LETTERS[axis] not in taken:
            return Dim(_LETTERS[axis])
        return Dim(next(n for i in itertools.count() if (n := f"s{i}") not in taken))

    def size(self, s: int | torch.SymInt) -> int | Dim:
        """A size. Raises CompileError for one that depends on tensor values."""
        if isinstance(s, torch.SymInt):
            return size(self.convert(s.node.expr))
        return int(s)

    def shape(self, shape: Sequence[Any]) -> tuple[int | Dim, ...]:
        return tuple(map(self.size, shape))

    def type(self, tensor: torch.Tensor) -> TensorType:
        return TensorType(DType.of(tensor.dtype), self.shape(tensor.shape))

    def convert(self, e: sympy.Expr) -> sympy.Expr:
        """An expression over torch's symbols as one over the IR's. Raises CompileError where it has no such form."""
        if e.is_Symbol:
            dim = self.names.get(e.name)
            if dim is None:
                raise CompileError(
                    f"a size ({e.name}) depends on the values of a tensor",
                    code="data-dependent",
                    hint="ops such as nonzero, masked_select or boolean indexing give no fixed shape; "
                    "use torch.where or a weighted sum over all elements",
                )
            return dim.expr
        if e.is_Integer or e.is_Rational:
            return e
        kind = _EXTREMES.get(type(e))
        if kind is not None and not isinstance(decided := extreme(kind, e.args, self.ranges), kind):
            return self.convert(decided)
        args = [self.convert(a) for a in e.args]
        if isinstance(e, sympy.Pow) and e.exp.is_Integer:
            return sympy.Pow(*args)
        for kind, build in _FUNCTIONS.items():
            if isinstance(e, kind):
                return build(*args)
        raise CompileError(f"size {e} has no form in the IR ({type(e).__name__})", code="shape")
