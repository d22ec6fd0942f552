"""Checkpoint folders as models: our transformer without data, and where its data lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from moec.frontend import Traced
from moec.frontend.checkpoints import Checkpoint, is_checkpoint, open_folder
from moec.ir import ArgumentValueError, Quantization, Weight
from moec.models import ModelConfig, MoETransformer
from moec.models.rope import inverse_frequencies


@dataclass(frozen=True, eq=False)
class CheckpointModel:
    """A checkpoint that can be traced: `module` is our transformer on the meta device, `weights` are its parameters and
    buffers by name, none of them read yet."""

    checkpoint: Checkpoint
    module: nn.Module
    weights: Mapping[str, Weight]

    @property
    def config(self) -> ModelConfig:
        """Of our transformer."""
        config = self.module.config
        assert isinstance(config, ModelConfig)
        return config

    @property
    def name(self) -> str:
        return self.checkpoint.path.name

    def around(self, module: nn.Module) -> CheckpointModel:
        """The same weights for a module that holds this one's submodules under their names."""
        return replace(self, module=module)

    def quantization(self, asked: str | Quantization | None) -> Quantization | None:
        """What was asked for, keeping the modules that the checkpoint says are not to be converted."""
        plan = Quantization.of(asked)
        stored = self.checkpoint.quantization
        return plan if plan is None or stored is None else replace(plan, keep=(*plan.keep, *stored.keep))

    def bind(self, traced: Traced) -> Traced:
        """A trace with its weights bound to the files."""
        traced.graph.bind_weights({name: self.weights[name] for name in traced.graph.weights})
        return traced


def module_of(model: Any) -> Any:
    """The module of a checkpoint; whatever else a model is, itself."""
    return model.module if isinstance(model, CheckpointModel) else model


def open_model(model: Any) -> Any:
    """A checkpoint folder or .gguf file as a `CheckpointModel`; all else as it is. Raises CompileError."""
    if not isinstance(model, str | Path):
        return model
    path = Path(model)
    if path.suffix == ".gguf":
        from moec.frontend.checkpoints.gguf import open_gguf

        return build(open_gguf(path))
    try:
        if path.suffix == ".onnx" or not path.is_dir():
            return model
    except (OSError, ValueError):
        return model
    if (path / "manifest.json").exists() and not is_checkpoint(path):
        raise ArgumentValueError(
            f"{path} is a saved model, which is compiled already", code="unsupported-model", hint="moec.load reads it"
        )
    return build(open_folder(path))


def build(checkpoint: Checkpoint) -> CheckpointModel:
    """Our transformer for a checkpoint, its weights checked. Raises CompileError listing all that does not fit."""
    try:
        config = ModelConfig.from_fields(checkpoint.fields)
    except ValueError as e:
        checkpoint.problems.add(f"the sizes in the config do not fit together: {e}")
        checkpoint.problems.stop()
    try:
        with torch.device("meta"):
            module = MoETransformer(config).to(checkpoint.dtype.torch).eval()
    except RuntimeError as e:  # torch's, of a number of bytes that none has
        checkpoint.problems.add(f"the sizes in the config are larger than any memory: {e}")
        checkpoint.problems.stop()
    expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    weights = dict(checkpoint.bind(expected))
    for name, weight in weights.items():
        _set_dtype(module, name, weight.type.dtype.torch)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    frequencies = inverse_frequencies(config)
    if checkpoint.rope_divisors is not None:
        frequencies = frequencies / checkpoint.rope_divisors.load()
    weights["model.rotary_emb.inv_freq"] = Weight.of("model.rotary_emb.inv_freq", frequencies)
    vars(module)["generation_config"] = SimpleNamespace(**checkpoint.tokens)  # as transformers' models have it
    return CheckpointModel(checkpoint, module, weights)


def _set_dtype(module: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Routers keep the dtype that they are stored in."""
    *path, last = name.split(".")
    holder = module.get_submodule(".".join(path))
    tensor = getattr(holder, last)
    if tensor.dtype != dtype:
        cast = tensor.detach().to(dtype)
        setattr(holder, last, nn.Parameter(cast) if isinstance(tensor, nn.Parameter) else cast)
