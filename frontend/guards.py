"""What torch assumed about sizes while tracing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import sympy
import torch

from moec.frontend.conditions import Condition
from moec.frontend.locate import import_path, is_users
from moec.frontend.ranges import ANY, Range, Ranges, assumed, interval, narrowed
from moec.frontend.symbols import Symbols
from moec.ir import CompileError, Dim, Location

_SOURCE = re.compile(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]")


@dataclass(frozen=True, eq=False)
class Guard:
    """A condition on torch's size symbols, the same over IR symbols where it has such a form, and the line that made
    it (empty where that is torch's own)."""

    condition: sympy.Basic
    location: Location
    names: Mapping[str, Dim]
    stated: Condition | None = None

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
    program: torch.export.ExportedProgram, asked: Mapping[sympy.Basic, Location], symbols: Symbols
) -> list[Guard]:
    """What the trace took as true of the sizes of inputs: torch's guards, what it knew from them when it was asked, and
    ranges that neither explains. Each is false for some sizes, as far as that is easily seen."""
    env = shape_env(program)
    if env is None:
        return []
    plain = Symbols()  # without ranges, in which some of the conditions are true
    plain.names = symbols.names
    found: dict[str, Guard] = {}
    for expr, location in [*((g.expr, _location(g.sloc)) for g in env.guards), *asked.items()]:
        condition = env.replace(expr)
        if condition in (sympy.true, sympy.false) or not all(str(s) in plain.names for s in condition.free_symbols):
            continue
        try:
            stated = _in_ir(condition, plain)
        except CompileError:
            guard = Guard(condition, location, plain.names)
        else:
            if always(stated):
                continue
            guard = Guard(condition, location, plain.names, Condition.of(stated))
        found.setdefault(str(guard), guard)
    known: Ranges = {}
    for g in found.values():
        r = interval(g.stated.expr) if g.stated is not None else None
        if r is not None:
            (s,) = g.stated.expr.free_symbols  # type: ignore[union-attr]  # it is there if r is
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
    return condition.func(*(symbols.convert(a) for a in condition.args))


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
