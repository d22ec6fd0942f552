"""What `moec.compile` and `moec.trace` take, turned into a graph and its call structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from moec.frontend import Signature, Traced, trace
from moec.ir import ArgumentTypeError, CompileError, Graph
from moec.transformers_types import traceable_caches


def describe(model: Any) -> str:
    """A short name of a model for reports."""
    return model.name if isinstance(model, Graph) else type(model).__name__


def refuse(model: Any) -> CompileError:
    """The error for anything that is no model, or a kind of model that this version does not read."""
    if isinstance(model, str | Path):
        path = Path(model)
        kind = "an .onnx file" if path.suffix == ".onnx" else "a checkpoint folder"
        return CompileError(
            f"compiling {kind} ({path}) is not supported in this version",
            code="unsupported-model",
            hint="pass a torch.nn.Module, a torch.export.ExportedProgram or a moec.Graph; "
            "moec.load reads folders written by CompiledModel.save",
        )
    return ArgumentTypeError(
        f"cannot compile {type(model).__name__}",
        code="unsupported-model",
        hint="pass a torch.nn.Module, a torch.export.ExportedProgram or a moec.Graph",
    )


def acquire(
    model: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None, dynamic_shapes: Any
) -> tuple[Graph, Signature]:
    """A graph and the call structure of a model. Raises CompileError."""
    if isinstance(model, Graph):
        if args or kwargs or dynamic_shapes is not None:
            raise ArgumentTypeError(
                "a Graph is compiled as it is: args, kwargs and dynamic_shapes do not apply", code="arguments"
            )
        return model, positional(model)
    if isinstance(args, torch.Tensor) or not isinstance(args, Sequence):
        raise ArgumentTypeError(
            f"args must be a tuple of the model's positional arguments, got {type(args).__name__}",
            code="arguments",
            hint="write args=(tensor,)" if isinstance(args, torch.Tensor) else None,
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ArgumentTypeError(
            f"kwargs must be a dict of the model's keyword arguments, got {type(kwargs).__name__}", code="arguments"
        )
    if isinstance(model, nn.Module | torch.export.ExportedProgram):
        with traceable_caches():
            traced: Traced = trace(model, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
        return traced.graph, traced.signature
    raise refuse(model)


def positional(graph: Graph) -> Signature:
    """The call structure of a graph: tensors in the order of its inputs (or by their names); a tuple of outputs."""
    names = tuple(str(v.name) for v in graph.inputs)
    return Signature(
        pytree.tree_structure((names, {})),
        pytree.tree_structure(tuple(graph.output_names)),
        names,
        names,
        outputs=tuple(("tensor", i) for i in range(len(graph.outputs))),
    )
