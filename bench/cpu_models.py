"""The models of the CPU figures: DeepSeek-V3 and Qwen3-MoE of transformers, reduced in size but not in structure, with
seeded random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

VOCABULARY = 4096
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_attention_heads": 8,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 4096,
    "use_cache": False,
}
# batch and new tokens of one call without a cache
ROWS: dict[str, tuple[int, int]] = {
    "decode 1": (1, 1),
    "decode 8": (8, 1),
    "prefill 128": (1, 128),
    "prefill 512": (1, 512),
}


def deepseek_v3() -> torch.nn.Module:
    """4 layers, the first dense; 32 experts in 4 groups, 2 of them chosen, and a shared one; latent attention."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **SIZES, first_k_dense_replace=1, n_routed_experts=32, n_group=4, topk_group=2, n_shared_experts=1,
        num_key_value_heads=8, q_lora_rank=192, kv_lora_rank=128, qk_rope_head_dim=32, qk_nope_head_dim=64,
        v_head_dim=64,
    )  # fmt: skip
    return _seeded(lambda: DeepseekV3ForCausalLM(config))


def qwen3_moe() -> torch.nn.Module:
    """4 layers of 32 experts, their weights normalised; 8 heads, 4 of keys and values."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(**SIZES, num_experts=32, norm_topk_prob=True, num_key_value_heads=4, head_dim=64)
    return _seeded(lambda: Qwen3MoeForCausalLM(config))


MODELS: dict[str, Callable[[], torch.nn.Module]] = {"deepseek_v3": deepseek_v3, "qwen3_moe": qwen3_moe}


def _seeded(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    torch.manual_seed(0)
    return make().eval()


def ids(batch: int, length: int) -> torch.Tensor:
    """Tokens i64[batch, length], the same ones in every call."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
