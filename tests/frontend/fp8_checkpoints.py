"""Checkpoints in DeepSeek's native block FP8, and transformers' model of what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moec.ir.ops.block_codes import E4M3_MAX, block_amax, dequantize_blocks, spread

from .hf_checkpoints import _deepseek_v3, save

BLOCK = (128, 128)
# as DeepSeek's: embeddings, head, norms and routers are not converted
_LEFT = ("embed_tokens.weight", "lm_head.weight", "norm.weight", "mlp.gate.weight", "layernorm.weight")


def quantize(weight: torch.Tensor, powers_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 codes and f32 scales per 128 × 128 block; scales are rounded up to powers of two where they are ue8m0."""
    scale = block_amax(weight.float(), BLOCK) / E4M3_MAX
    scale = torch.exp2(scale.log2().ceil()) if powers_of_two else scale
    return (weight.float() / spread(scale, tuple(weight.shape), BLOCK)).to(torch.float8_e4m3fn), scale


def write_fp8(
    hf: Any, folder: Path, *, shards: int = 3, scale_dtype: torch.dtype = torch.float32, keep: tuple[str, ...] = ()
) -> Any:
    """Write a model to `folder` with its linear layers in FP8, but for modules under `keep`. Returns transformers'
    model with the weights that the files stand for, in the dtype of `hf`."""
    from transformers import AutoModelForCausalLM

    plain = save(hf, folder.with_name(f"{folder.name}-plain"))
    dtype = next(hf.parameters()).dtype
    tensors, dequantised = {}, {}
    for path in plain.glob("*.safetensors"):
        for name, t in load_file(path).items():
            tensors[name] = dequantised[name] = t
            if t.ndim == 2 and not name.endswith(_LEFT) and not name.startswith(keep or " "):
                codes, scale = quantize(t, scale_dtype == torch.float8_e8m0fnu)
                tensors[name], tensors[f"{name}_scale_inv"] = codes, scale.to(scale_dtype)
                dequantised[name] = dequantize_blocks(codes, scale, BLOCK).to(dtype)
    for path in plain.glob("model*"):
        path.unlink()
    save_file(dequantised, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(BLOCK),
        "modules_to_not_convert": list(keep),
    }
    if scale_dtype == torch.float8_e8m0fnu:
        config["quantization_config"]["scale_fmt"] = "ue8m0"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_shards(tensors, folder, shards)
    return AutoModelForCausalLM.from_pretrained(plain).eval()


def write_random(folder: Path, **sizes: int) -> int:
    """A DeepSeek-V3 of random codes, everything else in bf16, in three shards. Returns the bytes of the files."""
    from moec.frontend.checkpoints.errors import Problems
    from moec.frontend.checkpoints.hf_config import read_config
    from moec.models import ModelConfig, MoETransformer

    config = _deepseek_v3(**sizes).to_dict() | {
        "dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": list(BLOCK), "fmt": "e4m3"},
    }
    fields = read_config(config, Problems("it"))[1] | {"num_mtp_layers": 0}
    with torch.device("meta"):
        model = MoETransformer(ModelConfig.from_fields(fields))
    r = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}

    def add(name: str, rows: int, columns: int) -> None:
        tensors[name] = torch.randn(rows, columns, generator=r).mul_(100).to(torch.float8_e4m3fn)
        scale = torch.rand(-(-rows // 128), -(-columns // 128), generator=r) + 0.5
        tensors[f"{name}_scale_inv"] = scale / (100 * columns**0.5)

    for name, p in model.state_dict().items():
        if ".experts." in name:
            for e in range(p.shape[0]):
                for part in ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",):
                    rows = p.shape[1] // (1 if part == "down_proj" else 2)
                    add(f"{name.rsplit('.', 1)[0]}.{e}.{part}.weight", rows, p.shape[2])
        elif p.ndim == 1:
            tensors[name] = torch.ones(p.shape, dtype=torch.bfloat16)
        elif name.endswith(_LEFT):
            tensors[name] = (torch.randn(p.shape, generator=r) * p.shape[1] ** -0.5).bfloat16()
        else:
            add(name, *p.shape)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_shards(tensors, folder, 3)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_shards(tensors: dict[str, torch.Tensor], folder: Path, shards: int) -> None:
    """Tensors in files of about the same size, with the index."""
    total, at, size = sum(t.nbytes for t in tensors.values()), 0, 0
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for name, t in tensors.items():
        parts[at][name] = t
        size += t.nbytes
        at = min(size * shards // total, shards - 1)
    places = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
