"""Which axes of a traced program are open: bounds that the user declared, axes that became constants."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from moec.frontend.dynamic import declared_range, declared_size, must_be_dynamic
from moec.frontend.guards import assumptions, fixed_axes, guards, hints, limits
from moec.frontend.lower import Lowerer
from moec.frontend.ranges import ANY, Ranges, narrowed
from moec.frontend.sizes import Bounds, breaks_beyond_one
from moec.ir import CompileError, Graph, Location


def explained(error: CompileError, program: torch.export.ExportedProgram, lowerer: Lowerer) -> CompileError:
    """A type error of the IR in a dynamic graph comes from sizes that torch took as equal after comparing them at
    the example's: say which."""
    assumed = [g for g in guards(program, lowerer.symbols.names) if isinstance(g.condition, sympy.Eq)]
    if error.code != "type" or not assumed:
        return error
    return CompileError(
        f"{error.message}; the model assumes {' and '.join(dict.fromkeys(map(str, assumed)))}",
        code="dynamic-shape",
        location=error.location or Location.merge(*(g.location for g in assumed)),
        hint="make the axes it depends on static in dynamic_shapes",
    )


def specialised(graph: Graph, specs: list[dict[int, Any]], program: torch.export.ExportedProgram) -> tuple[str, ...]:
    """Axes left open that became constants, and named ones that the model ties to others.

    Raises CompileError for a constant axis that the user declared dynamic.
    """
    notes = []
    lines = fixed_axes(program)
    for i, (value, spec) in enumerate(zip(graph.inputs, specs, strict=True)):
        for axis, dim in spec.items():
            size, named = value.shape[axis], declared_size(dim)
            if isinstance(dim, int) or not isinstance(size, int):
                if named is not None and named != size:
                    notes.append(f"{value.name} axis {axis} ({named}) = {size}")
                continue
            if must_be_dynamic(dim):
                raise CompileError(
                    f"argument {value.name!r} axis {axis} was declared dynamic, but the model only works for the "
                    f"size {size} that it was traced with",
                    code="dynamic-shape",
                    location=lines.get((i, axis)),
                    hint="make the axis static in dynamic_shapes, or remove what fixes its size in the model",
                )
            notes.append(f"{value.name} axis {axis} = {size}")
    return tuple(notes)


def untried(spans: Ranges, program: torch.export.ExportedProgram, lowerer: Lowerer) -> tuple[Bounds, tuple[str, ...]]:
    """What a program that is not compared with its model holds for: ranges, and the guards that are false for some
    sizes of 2 or more. torch asks whether a size is 1, and is right either way for nearly every model."""
    names = lowerer.symbols.names
    example = {str(d): n for s, n in hints(program).items() if (d := names.get(str(s))) is not None and d.is_symbol}
    guards = [g for g in assumptions(program, {}, lowerer.symbols) if breaks_beyond_one(g, example)]
    return _bounds(spans, lowerer), limits(guards)[1]


def _bounds(spans: Ranges, lowerer: Lowerer) -> Bounds:
    """Sizes that the trace holds for, by symbol name, where that is not every size ≥ 0."""
    named = ((lowerer.symbols.names.get(str(symbol)), r) for symbol, r in spans.items())
    return {str(dim): r for dim, r in named if dim is not None and dim.is_symbol and r != ANY}


def declared_bounds(specs: list[dict[int, Any]]) -> Bounds:
    """The ranges of the user's own named Dims."""
    result: Bounds = {}
    for dim in (d for s in specs for d in s.values()):
        size = declared_size(dim)
        if size is not None and size.is_symbol and declared_range(dim) != (0, None):
            result[str(size)] = declared_range(dim)
    return result


def inside_both(a: Bounds, b: Bounds) -> Bounds:
    """Sizes inside both."""
    return {s: narrowed(a.get(s, ANY), b.get(s, ANY)) for s in sorted(a.keys() | b.keys())}
