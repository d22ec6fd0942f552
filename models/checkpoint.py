"""The shipped trained checkpoint: reading and writing it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moec.models.model_config import ModelConfig
from moec.models.transformer import MoETransformer

WEIGHTS = Path(__file__).parent / "weights"


def trained(folder: Path | str | None = None) -> MoETransformer:
    """The shipped byte-level DeepSeek-V3-shaped model, float32, eval mode, MTP layer included.

    folder: another folder written by `save`. Raises FileNotFoundError naming a missing file, ValueError for files
    that are damaged or do not fit each other.
    """
    root = Path(folder) if folder is not None else WEIGHTS
    config_path, weights_path = root / "config.json", root / "model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise FileNotFoundError(f"trained checkpoint: {path} is missing")
    try:
        config = ModelConfig.from_json(config_path.read_text("utf-8"))
        tensors = load_file(weights_path)
        return MoETransformer.from_tensors(config, {name: t.to(torch.float32) for name, t in tensors.items()})
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"trained checkpoint in {root} is damaged: {error}") from error


def save(model: MoETransformer, folder: Path | str) -> None:
    """Writes config.json and model.safetensors, weights rounded to bfloat16 (the selection bias, which decides
    routing and is tiny, stays float32). Each file is complete or absent."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in model.state_dict().items():
        keep = name.endswith("e_score_correction_bias")
        tensors[name] = tensor.detach().to(torch.float32 if keep else torch.bfloat16).contiguous()
    partial = root / "model.safetensors.partial"
    save_file(tensors, partial)
    partial.chmod(0o644)  # the library writes for its owner only
    partial.replace(root / "model.safetensors")
    partial = root / "config.json.partial"
    partial.write_text(model.config.to_json(), "utf-8")
    partial.replace(root / "config.json")
