"""What `moec.compile` and `moec.trace` take, turned into a graph and its call structure."""

from __future__ import annotations

import inspect
import warnings
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
            f"{path} is no folder and no .onnx or .gguf file",
            code="unsupported-model",
            hint="pass a torch.nn.Module, a torch.export.ExportedProgram, the path of a checkpoint folder, of a "
            ".gguf or an .onnx file, or a moec.Graph; moec.load reads folders written by CompiledModel.save",
        )
    return ArgumentTypeError(
        f"cannot compile {type(model).__name__}",
        code="unsupported-model",
        hint="pass a torch.nn.Module, a torch.export.ExportedProgram, the path of a checkpoint folder or a .gguf "
        "file, an ONNX model or a moec.Graph",
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
        try:
            with traceable_caches():
                traced: Traced = trace(module, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
        except CompileError:
            if isinstance(module, nn.Module):
                _check_arguments(module, args, kwargs or {})
            raise
        if isinstance(model, CheckpointModel):
            model.bind(traced)
        return traced.graph, traced.signature
    if is_onnx(model):
        return _imported(model, tuple(args), kwargs, dynamic_shapes)
    raise refuse(model)


def _check_arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """That `forward` can be called so. Raises ArgumentTypeError, as a call of the compiled model does. It is asked of
    what failed: a decorator may call with more than its text says."""
    try:
        forward = inspect.signature(module.forward)
    except (TypeError, ValueError):  # a forward that is not written in Python
        return
    text = None
    try:
        given = forward.bind_partial(*args, **kwargs).arguments
    except TypeError as e:
        text = str(e)
    else:
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        required = [n for n, p in forward.parameters.items() if p.default is p.empty and p.kind not in variadic]
        missing = [n for n in required if n not in given]
        text = f"missing arguments: {', '.join(missing)}" if missing else None
    if text is not None:
        name = type(module).__name__
        hint = f"the model is traced at example arguments, which {name}.forward{forward} has to take"
        raise ArgumentTypeError(f"{name}: {text}", code="arguments", hint=hint)


# what numbers between 0 and 1 that a module drops values by are called
_RATES = ("dropout", "attention_dropout", "attn_dropout")


def warn_of_training(model: Any) -> None:
    """Warn where a module that is in training mode would compute something else in it: what is compiled is its
    evaluation."""
    module = module_of(model)
    if not isinstance(module, nn.Module):
        return
    for name, m in module.named_modules():
        rate = m.p if isinstance(m, nn.modules.dropout._DropoutNd) else 0.0
        rate = rate or max((r for r in (getattr(m, n, 0.0) for n in _RATES) if isinstance(r, float)), default=0.0)
        if m.training and (rate > 0 or isinstance(m, nn.modules.batchnorm._BatchNorm)):
            what = type(m).__name__ + (f" with p={rate}" if rate else "")
            warnings.warn(
                f"{type(module).__name__} is in training mode, and compiled as in evaluation: {name or 'it'} ({what}) "
                "does something else in training; model.eval() says that this is meant",
                stacklevel=3,
            )
            return


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
