"""Models by name, for the command line."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moec.checkpoints import CheckpointModel, open_model
from moec.frontend.checkpoints import is_checkpoint
from moec.graph_file import load_graph
from moec.ir import ArgumentValueError, Graph
from moec.ir.cases import with_data
from moec.ir.equivalence import Oracle
from moec.passes.registry import load_file
from moec.sources import acquire, is_onnx


@dataclass(frozen=True)
class Target:
    """A model with example arguments and how they may vary; of a Graph, the tensors of its inputs (maybe none)."""

    model: Any
    args: tuple[Any, ...]
    dynamic_shapes: Any

    def with_data(self) -> Target:
        """A Graph, or that of an ONNX model, with seeded random numbers for the weights and inputs that it lacks."""
        model = self.model
        if is_onnx(model):
            model = acquire(model, (), None, None)[0]
        if not isinstance(model, Graph):
            return self
        graph = with_data(model)
        return Target(graph, self.args or Oracle(graph).cases[0].inputs, None)


def resolve(spec: str, batch: int = 2, seq: int = 24) -> Target:
    """`trained`, a named config of moec.models (random weights, seed 0), `module:callable` or `path.py:callable`
    returning a model or (model, args), or the path of a checkpoint folder or an .ir, .onnx or .gguf file. Raises
    ArgumentValueError, and CompileError for a checkpoint that is wrong."""
    if spec.endswith(".ir"):
        return Target(*load_graph(spec), None)
    if is_onnx(spec):
        return Target(spec, (), None)
    opened = open_model(spec)
    if isinstance(opened, CheckpointModel):
        return Target(opened, (_ids(batch, seq, opened.config.vocab_size),), ({0: "B", 1: "S"},))
    if ":" in spec:
        return _call(spec)
    from moec import models

    if spec == "trained":
        model = models.trained()
    elif spec in models.CONFIGS:
        model = models.build(spec)
    else:
        raise ArgumentValueError(
            f"no model {spec!r}",
            code="arguments",
            hint=f"trained, {', '.join(models.CONFIGS)}, module:callable, graph.ir, model.onnx, model.gguf, a "
            "checkpoint folder, or a saved folder where one fits",
        )
    return Target(model, (_ids(batch, seq, model.config.vocab_size),), ({0: "B", 1: "S"},))


def is_saved(source: str) -> bool:
    """Whether this is a folder that holds a saved model, not a checkpoint."""
    path = Path(source)
    return path.is_dir() and not is_checkpoint(path)


def _ids(batch: int, seq: int, vocabulary: int) -> torch.Tensor:
    return torch.arange(batch * seq).reshape(batch, seq) % min(256, vocabulary)


def _call(spec: str) -> Target:
    module, _, name = spec.rpartition(":")
    sys.path.insert(0, "")
    try:
        function = getattr(load_file(Path(module)) if module.endswith(".py") else importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise ArgumentValueError(f"cannot import {spec!r}: {e}", code="arguments") from None
    finally:
        sys.path.remove("")
    result = function()
    if isinstance(result, torch.nn.Module):
        return Target(result, (), None)
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], torch.nn.Module):
        args = result[1] if isinstance(result[1], tuple) else (result[1],)
        return Target(result[0], args, "auto")
    raise ArgumentValueError(
        f"{spec} must return a torch.nn.Module or (module, args), got {type(result).__name__}", code="arguments"
    )
