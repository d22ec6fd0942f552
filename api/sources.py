"""What `moec.compile` and `moec.trace` take, turned into a graph and its call structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moec.checkpoints import CheckpointModel, module_of, open_model
from moec.frontend import Signature, Traced, trace
from moec.frontend.signature import positional
from moec.ir import ArgumentTypeError, CompileError, Graph
from moec.ir.interpreter import bind_inputs
from moec.transformers_types import traceable_caches


def describe(model: Any) -> str:
    """A short name of a model for reports."""
    if isinstance(model, Graph | CheckpointModel):
        return model.name
    return Path(model).name if isinstance(model, str | Path) else type(model).__name__


def refuse(model: Any) -> CompileError:
    """The error for anything that is no model, or a kind of model that this version does not read."""
    if isinstance(model, str | Path):
        path = Path(model)
        return CompileError(
            f"{path} is no folder and no .onnx file",
            code="unsupported-model",
            hint="pass a torch.nn.Module, a torch.export.ExportedProgram, the path of a checkpoint folder or of an "
            ".onnx file, or a moec.Graph; moec.load reads folders written by CompiledModel.save",
        )
    return ArgumentTypeError(
        f"cannot compile {type(model).__name__}",
        code="unsupported-model",
        hint="pass a torch.nn.Module, a torch.export.ExportedProgram, the path of a checkpoint folder, an ONNX model "
        "or a moec.Graph",
    )


def acquire(
    model: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None, dynamic_shapes: Any
) -> tuple[Graph, Signature]:
    """A graph and the call structure of a model, which may be a path. Raises CompileError."""
    model = open_model(model)
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
    module = module_of(model)
    if isinstance(module, nn.Module | torch.export.ExportedProgram):
        with traceable_caches():
            traced: Traced = trace(module, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
        if isinstance(model, CheckpointModel):
            model.bind(traced)
        return traced.graph, traced.signature
    if is_onnx(model):
        return _imported(model, tuple(args), kwargs, dynamic_shapes)
    raise refuse(model)


def is_onnx(model: Any) -> bool:
    """Whether this is the path of an .onnx file, or an ONNX model in memory."""
    if isinstance(model, str | Path):
        return Path(model).suffix == ".onnx"
    return type(model).__module__.split(".")[0] in ("onnx", "onnx_ir") and type(model).__name__ in (
        "ModelProto",
        "Model",
    )


def _imported(
    model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, dynamic_shapes: Any
) -> tuple[Graph, Signature]:
    from moec.frontend.onnx import import_onnx

    if dynamic_shapes is not None:
        raise ArgumentTypeError(
            "an ONNX model says itself which sizes vary: dynamic_shapes does not apply", code="arguments"
        )
    imported = import_onnx(model, args, kwargs)
    names = imported.signature.input_names
    if len(args) + len(kwargs or {}) == len(names):  # wrong ones are better refused here than at the first call
        imported.signature.check_bounds(bind_inputs(imported.graph, imported.signature.flatten(args, kwargs)))
    return imported.graph, imported.signature
