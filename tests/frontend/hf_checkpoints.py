"""Tiny checkpoints of every architecture, written by transformers, with weights large enough that every part of the
model moves the logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

VOCAB = 97
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {**_BASE, "num_key_value_heads": 2, "intermediate_size": 96}
_MLA = {
    **_BASE,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 3,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}


def _llama(**more: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**{**_GQA, **more})


def _qwen2(**more: Any) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**{**_GQA, **more})


def _mixtral(**more: Any) -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(**{**_GQA, "num_local_experts": 4, **more})


def _qwen3_moe(**more: Any) -> Any:
    from transformers import Qwen3MoeConfig

    sizes = {"moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 32}
    return Qwen3MoeConfig(**{**_GQA, **sizes, **more})


def _deepseek_v2(**more: Any) -> Any:
    from transformers import DeepseekV2Config

    return DeepseekV2Config(**{**_MLA, "n_routed_experts": 6, "q_lora_rank": None, "n_shared_experts": 2, **more})


def _deepseek_v3(**more: Any) -> Any:
    from transformers import DeepseekV3Config

    sizes = {"n_routed_experts": 8, "n_shared_experts": 1, "q_lora_rank": 32, "n_group": 4, "topk_group": 2}
    return DeepseekV3Config(**{**_MLA, **sizes, **more})


CASES: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "mixtral": _mixtral,
    "qwen3_moe": lambda: _qwen3_moe(norm_topk_prob=True),
    "deepseek_v2": lambda: _deepseek_v2(routed_scaling_factor=1.5),
    "deepseek_v3": lambda: _deepseek_v3(rope_parameters=_YARN),
}
VARIANTS: dict[str, Callable[[], Any]] = {
    "llama, llama3 rope, biases": lambda: _llama(rope_parameters=_LLAMA3, attention_bias=True, head_dim=24),
    "llama, linear rope, tied": lambda: _llama(
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, tie_word_embeddings=True
    ),
    "qwen2, window in the last layers, tied": lambda: _qwen2(
        use_sliding_window=True, sliding_window=5, max_window_layers=1, tie_word_embeddings=True
    ),
    "qwen2, yarn": lambda: _qwen2(
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
    "mixtral, window": lambda: _mixtral(sliding_window=6, num_experts_per_tok=3),
    "qwen3_moe, first layer dense, weights not normalised": lambda: _qwen3_moe(mlp_only_layers=[0]),
    "qwen3_moe, biases, tied": lambda: _qwen3_moe(attention_bias=True, tie_word_embeddings=True),
    "deepseek_v2, groups, latent query": lambda: _deepseek_v2(
        topk_method="group_limited_greedy", n_group=3, topk_group=2, q_lora_rank=20, rope_parameters=_YARN
    ),
    "deepseek_v3, plain rope, other epsilon": lambda: _deepseek_v3(rope_interleave=False, rms_norm_eps=1e-5),
}


def model(config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """transformers' model of a config, in eval mode, with weights of a size that matters."""
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_config(config).eval()
    r = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in hf.named_parameters():
            noise = torch.randn(p.shape, generator=r)
            p.copy_(1 + 0.2 * noise if "norm" in name else noise * (0.3 if p.ndim == 1 else p.shape[-1] ** -0.5))
        for name, buffer in hf.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=r) * 0.2)
    return hf.to(dtype)


def save(hf: Any, folder: Path, shards: int = 3) -> Path:
    """The folder that transformers writes, in at least so many shards."""
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    size = sum(p.nbytes for p in hf.parameters())
    hf.save_pretrained(folder, max_shard_size=f"{size // shards // 1000}KB")
    assert len(list(folder.glob("*.safetensors"))) >= shards
    return folder


@cache
def ids(batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(batch))
