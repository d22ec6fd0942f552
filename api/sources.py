"""What `moec.compile` and `moec.trace` take, turned into a graph and its call structure."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moec.ir import ArgumentTypeError, CompileError, Graph
from moec.signature import Signature


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
        return model, Signature.positional(model)
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
        return _trace(model, tuple(args), dict(kwargs or {}), dynamic_shapes)
    raise refuse(model)


def _trace(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> tuple[Graph, Signature]:
    raise NotImplementedError


def parameter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of forward's positional parameters, in order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if p.kind in kinds)
