"""What torch assumed about sizes while tracing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import sympy
import torch

from moec.frontend.asked import Asker
from moec.frontend.conditions import Condition, simplest
from moec.frontend.locate import import_path, is_users
from moec.frontend.ranges import ANY, Range, Ranges, assumed, interval, narrowed
from moec.frontend.symbols import Symbols
from moec.ir import CompileError, Dim, Location

_SOURCE = re.compile(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]")


@dataclass(frozen=True, eq=False)
class Guard:
    """A condition on torch's size symbols, the same over IR symbols where it has such a form, and the line that made
    it (empty where that is torch's own). `branched`: the model's own code went by it, not an op that it calls."""

    condition: sympy.Basic
    location: Location
    names: Mapping[str, Dim]
    stated: Condition | None = None
    branched: bool = False

    @property
    def symbols(self) -> frozenset[str]:
        """The IR symbols in it; none where it has one that is not among the IR's."""
        if self.stated is not None:
            return self.stated.symbols
        dims = [self.names.get(str(s)) for s in self.condition.free_symbols]
        return frozenset() if None in dims else frozenset().union(*(d.symbols for d in dims if d is not None))

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether it is true under sizes by IR symbol name (unknown counts as true)."""
        if self.stated is not None:
            return self.stated.holds(sizes)
        values = {}
        for s in self.condition.free_symbols:
            dim = self.names.get(str(s))
            if dim is None or not dim.symbols <= sizes.keys():
                return True
            values[s] = dim.evaluate(sizes)
        try:
            return bool(self.condition.subs(values))
        except TypeError:
            return True

    def __str__(self) -> str:
        if self.stated is not None:
            return self.stated.text
        text = str(self.condition)
        for torch_name, dim in self.names.items():
            text = re.sub(rf"\b{torch_name}\b", str(dim), text)
        return text


def shape_env(program: torch.export.ExportedProgram) -> Any:
    """torch's record of symbols and guards; None for a program without dynamic shapes."""
    for node in program.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            return mode.shape_env
    return None


def hints(program: torch.export.ExportedProgram) -> dict[sympy.Symbol, int]:
    """The example's sizes by torch's symbol."""
    env = shape_env(program)
    values = env.backed_var_to_val.items() if env is not None else ()
    return {s: int(n) for s, n in values if getattr(n, "is_Integer", False)}


def guards(program: torch.export.ExportedProgram, names: Mapping[str, Dim]) -> list[Guard]:
    env = shape_env(program)
    return [Guard(g.expr, _location(g.sloc), names) for g in env.guards] if env is not None else []


def assumptions(
    program: torch.export.ExportedProgram,
    asked: Mapping[sympy.Basic, Asker],
    symbols: Symbols,
    first: torch.export.ExportedProgram | None = None,
) -> list[Guard]:
    """What the trace took as true of the sizes of inputs: torch's guards, what it knew from them when it was asked, and
    ranges that neither explains. Each is false for some sizes, as far as that is easily seen. `symbols` are those of
    the `first` program, which was traced at other sizes, where one is given."""
    env = shape_env(program)
    if env is None:
        return []
    plain = Symbols()  # without ranges, in which some of the conditions are true
    plain.names = symbols.names if first is None else _same_axes(first, program, symbols.names)
    found: dict[str, Guard] = {}
    guards = ((g.expr, Asker(_location(g.sloc), False)) for g in env.guards)
    for expr, (location, itself) in (*guards, *asked.items()):
        # what another trace found equal to a number or to each other is no part of the first program
        condition = env.replace(expr) if first is None else expr
        if condition in (sympy.true, sympy.false) or not all(str(s) in plain.names for s in condition.free_symbols):
            continue
        try:
            stated = _in_ir(condition, plain)
        except CompileError:
            guard = Guard(condition, location, plain.names, branched=itself)
        else:
            if always(stated):
                continue
            guard = Guard(condition, location, plain.names, Condition.of(stated), itself)
        before = found.setdefault(str(guard), guard)
        found[str(guard)] = replace(before, branched=before.branched or itself)
    known: Ranges = {}
    for g in found.values():
        if g.stated is not None and (r := interval(g.stated.expr)) is not None:
            (s,) = g.stated.expr.free_symbols
            known[s] = narrowed(known.get(s, ANY), r)
    for symbol, (least, greatest) in ranges(program, {}).items():
        dim = plain.names.get(str(symbol))
        if dim is None or not dim.is_symbol:
            continue
        low, high = known.get(dim.expr, ANY)
        rest = [f"{dim} >= {least}"] if least > low else []
        rest += [f"{dim} <= {greatest}"] if greatest is not None and (high is None or greatest < high) else []
        for text in rest:
            condition = Condition(text)
            found[text] = Guard(condition.expr, Location(), plain.names, condition)
    return list(found.values())


def _same_axes(
    first: torch.export.ExportedProgram, second: torch.export.ExportedProgram, names: Mapping[str, Dim]
) -> dict[str, Dim]:
    """The names of a program's symbols in another program, by the axes that they are the sizes of."""
    one, other = shape_env(first), shape_env(second)
    axes = one.source_to_var if one is not None else {}
    pairs = ((axes.get(source), symbol) for source, symbol in other.source_to_var.items())
    return {str(b): names[str(a)] for a, b in pairs if a is not None and str(a) in names}


def limits(guards: Iterable[Guard]) -> tuple[dict[str, Range], tuple[str, ...]]:
    """Guards as ranges by IR symbol, and as text where they are none."""
    bounds: dict[str, Range] = {}
    conditions = []
    for g in guards:
        if g.stated is None:
            continue
        r = interval(g.stated.expr)
        if r is None:
            conditions.append(g.stated.text)
        else:
            (s,) = g.symbols
            bounds[s] = narrowed(bounds.get(s, ANY), r)
    return bounds, tuple(conditions)


def always(condition: sympy.Basic) -> bool:
    """Whether a condition is plainly true for all sizes."""
    if condition == True:  # noqa: E712  # sympy's own truth
        return True
    if not isinstance(condition, sympy.core.relational.Relational):
        return False
    terms = sympy.expand(condition.lhs - condition.rhs)
    if not terms.is_polynomial(*terms.free_symbols):
        return False
    rest, factors = sympy.Integer(0), []
    for term, factor in terms.as_coefficients_dict().items():
        if term == 1:
            rest = factor
        else:
            factors.append(factor)
    if isinstance(condition, sympy.Ne):  # 3*B*S is never 1
        divisor = reduce(sympy.igcd, factors) if all(f.is_Integer for f in factors) else 1
        return bool(divisor > 1 and rest % divisor != 0)
    sign = -1 if isinstance(condition, sympy.Le | sympy.Lt) else 1
    strict = isinstance(condition, sympy.Lt | sympy.Gt)
    if isinstance(condition, sympy.Eq) or any(f * sign < 0 for f in factors):
        return False
    return bool(rest * sign > 0 if strict else rest * sign >= 0)


def _in_ir(condition: sympy.Basic, symbols: Symbols) -> sympy.Basic:
    if isinstance(condition, sympy.Not | sympy.And | sympy.Or):
        return condition.func(*(_in_ir(a, symbols) for a in condition.args))
    if not isinstance(condition, sympy.core.relational.Relational):
        raise CompileError(f"{condition} has no form in the IR", code="shape")
    converted = condition.func(*(symbols.convert(a) for a in condition.args))
    return simplest(converted) if isinstance(converted, sympy.core.relational.Relational) else converted


def ranges(program: torch.export.ExportedProgram, axes: Mapping[tuple[int, int], Range]) -> Ranges:
    """The sizes that a program of ours holds for, by torch's symbol: what torch found, what the guards say, and what
    the user said of (input, axis)."""
    env = shape_env(program)
    if env is None:
        return {}
    known = hints(program)
    result = assumed([g.expr for g in env.guards], known)
    for symbol, r in program.range_constraints.items():
        if symbol in known:
            found = int(r.lower) if r.lower.is_Integer else 0, int(r.upper) if r.upper.is_Integer else None
            result[symbol] = narrowed(result.get(symbol, ANY), found)
    for source, symbol in env.source_to_var.items():
        m = _SOURCE.fullmatch(source)
        if m and (int(m[1]), int(m[2])) in axes:
            result[symbol] = narrowed(result.get(symbol, ANY), axes[int(m[1]), int(m[2])])
    return {s: r for s, r in result.items() if r != ANY}


def ones(program: torch.export.ExportedProgram) -> Ranges:
    """Sizes that the trace found to be 1: torch keeps them open, and uses that they are 1 in some shapes and not in
    others."""
    env = shape_env(program)
    found = [] if env is None else [g.expr.lhs for g in env.guards if isinstance(g.expr, sympy.Eq) and g.expr.rhs == 1]
    return {s: (1, 1) for s in found if s.is_Symbol}


def fixed_axes(program: torch.export.ExportedProgram) -> dict[tuple[int, int], Location]:
    """(input, axis) → where the size of that axis was compared with a constant."""
    env = shape_env(program)
    if env is None:
        return {}
    result = {}
    for source, symbol in env.source_to_var.items():
        m = _SOURCE.fullmatch(source)
        lines = [
            _location(g.sloc) for g in env.guards if isinstance(g.expr, sympy.Eq) and symbol in g.expr.free_symbols
        ]
        if m and lines:
            result[int(m[1]), int(m[2])] = next((x for x in lines if x), Location())
    return result


def _location(sloc: Any) -> Location:
    for loc in (sloc.maybe_user_loc, sloc.framework_loc):
        file, line = getattr(loc, "filename", None), getattr(loc, "lineno", None)
        if file and line and is_users(file):
            return Location.at("", import_path(file), line)
    return Location()
