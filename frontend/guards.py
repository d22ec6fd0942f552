"""What torch assumed about sizes while tracing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from moec.frontend.locate import import_path, is_users
from moec.frontend.ranges import ANY, Range, Ranges, assumed, narrowed
from moec.ir import Dim, Location

_SOURCE = re.compile(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]")


@dataclass(frozen=True)
class Guard:
    """A condition on torch's size symbols, and the line that made it (empty where that is torch's own)."""

    condition: sympy.Basic
    location: Location
    names: Mapping[str, Dim]

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether it is true under sizes by IR symbol name (unknown counts as true)."""
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


def guards(program: torch.export.ExportedProgram, names: Mapping[str, Dim]) -> list[Guard]:
    env = shape_env(program)
    return [Guard(g.expr, _location(g.sloc), names) for g in env.guards] if env is not None else []


def ranges(program: torch.export.ExportedProgram, axes: Mapping[tuple[int, int], Range]) -> Ranges:
    """The sizes that a program of ours holds for, by torch's symbol: what torch found, what the guards say, and what
    the user said of (input, axis)."""
    env = shape_env(program)
    if env is None:
        return {}
    hints = {s: int(n) for s, n in env.backed_var_to_val.items() if getattr(n, "is_Integer", False)}
    result = assumed([g.expr for g in env.guards], hints)
    for symbol, r in program.range_constraints.items():
        if symbol in hints:
            known = int(r.lower) if r.lower.is_Integer else 0, int(r.upper) if r.upper.is_Integer else None
            result[symbol] = narrowed(result.get(symbol, ANY), known)
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
