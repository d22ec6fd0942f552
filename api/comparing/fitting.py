"""Whether a model that is compiled already can stand beside another: its inputs and outputs, in whose order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moec.compiled import CompiledModel
from moec.ir import ArgumentTypeError, ArgumentValueError, Graph, Value
from moec.ir.dims import evaluate
from moec.ir.interpreter import bind_inputs
from moec.ir.runtime_sizes import symbols_of


@dataclass(frozen=True)
class Fit:
    """`inputs`: which of the model's each input of the compiled program is; `outputs`: which of the program's each
    output of the model is."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def fit(compiled: CompiledModel, model: Graph, name: str, inputs: Sequence[torch.Tensor]) -> Fit:
    """How a compiled model takes the inputs of `model`, which is called `name`, and gives its outputs: by name where
    both have the same names, else by position. Symbols of sizes may have other names, and a size may vary on one side
    only, as long as these inputs have it. Raises ArgumentValueError that names what differs."""
    program = compiled.program.graph
    taken = _order([str(v.name) for v in model.inputs], [str(v.name) for v in program.inputs])
    given = _order(program.output_names, model.output_names)
    problem = None
    if taken is None:
        problem = f"it takes {_count(program.inputs, 'input')}, the model {len(model.inputs)}"
    elif given is None:
        problem = f"it gives {_count(program.outputs, 'output')}, the model {len(model.outputs)}"
    else:
        try:
            binding = bind_inputs(program, [inputs[i] for i in taken])
            if compiled.signature is not None:
                compiled.signature.check_bounds(binding)
            problem = _other_output(model, program, given, bind_inputs(model, inputs), binding)
        except (ArgumentTypeError, ArgumentValueError) as e:
            problem = f"it refuses the inputs: {e.message}"
    if problem is not None:
        raise ArgumentValueError(
            f"{compiled!r} is no version of {name}: {problem}\n  compiled  {_interface(program)}\n"
            f"  {name}  {_interface(model)}",
            code="arguments",
            hint="compile the model at the same arguments and dynamic_shapes",
        )
    assert taken is not None
    assert given is not None
    return Fit(taken, given)


def _order(theirs: Sequence[str], mine: Sequence[str]) -> tuple[int, ...] | None:
    """Which of `theirs` each of `mine` is, None where the counts differ."""
    if len(theirs) != len(mine):
        return None
    by_name = set(theirs) == set(mine)
    return tuple(theirs.index(n) if by_name else i for i, n in enumerate(mine))


def _other_output(
    model: Graph, program: Graph, given: Sequence[int], mine: Mapping[str, int], theirs: Mapping[str, int]
) -> str | None:
    """The first output that cannot be the model's."""
    for name, want, i in zip(model.output_names, model.outputs, given, strict=True):
        got = program.outputs[i]
        kinds = [(v.dtype, len(v.shape)) for v in (want, got)]
        sizes = zip(_sizes(want, mine), _sizes(got, theirs), strict=False)
        if kinds[0] != kinds[1] or any(None not in s and s[0] != s[1] for s in sizes):
            return f"its output {program.output_names[i]!r} is {got.type}, that of the model, {name!r}, {want.type}"
    return None


def _sizes(v: Value, binding: Mapping[str, int]) -> list[int | None]:
    """Sizes of a value on these inputs, None for those that only a run gives."""
    return [evaluate(s, binding) if symbols_of(s) <= binding.keys() else None for s in v.shape]


def _count(values: Sequence[Value], what: str) -> str:
    return f"{len(values)} {what}" + ("" if len(values) == 1 else "s")


def _interface(graph: Graph) -> str:
    ins = ", ".join(f"{v.name}: {v.type}" for v in graph.inputs)
    outs = ", ".join(f"{n}: {v.type}" for n, v in zip(graph.output_names, graph.outputs, strict=True))
    return f"({ins}) -> ({outs})"
