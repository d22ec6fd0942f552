"""Named configs: published models with the values of their released config.json, and reduced `-mini` twins."""

from __future__ import annotations

import dataclasses

import torch

from moec.models.model_config import ModelConfig, Yarn
from moec.models.transformer import MoETransformer

# deepseek-ai/DeepSeek-V3
DEEPSEEK_V3 = ModelConfig(
    vocab_size=129280,
    hidden_size=7168,
    num_layers=61,
    first_k_dense=3,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_heads=128,
    num_experts=256,
    top_k=8,
    num_shared_experts=1,
    n_group=8,
    topk_group=4,
    scoring="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rope_theta=10000.0,
    rope_interleaved=True,
    yarn=Yarn(factor=40, original_max_position=4096, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0),
    num_mtp_layers=1,
    max_position=163840,
)

# deepseek-ai/DeepSeek-V2-Lite
DEEPSEEK_V2_LITE = ModelConfig(
    vocab_size=102400,
    hidden_size=2048,
    num_layers=27,
    first_k_dense=1,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    num_heads=16,
    num_experts=64,
    top_k=6,
    num_shared_experts=2,
    scoring="softmax",
    norm_topk_prob=False,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rope_theta=10000.0,
    rope_interleaved=True,
    yarn=Yarn(factor=40, original_max_position=4096, beta_fast=32, beta_slow=1, mscale=0.707, mscale_all_dim=0.707),
    max_position=163840,
)

# mistralai/Mixtral-8x7B-v0.1
MIXTRAL_8X7B = ModelConfig(
    vocab_size=32000,
    hidden_size=4096,
    num_layers=32,
    moe_intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    num_experts=8,
    top_k=2,
    rope_theta=1e6,
    rms_norm_eps=1e-5,
    max_position=32768,
)

# Qwen/Qwen3-30B-A3B
QWEN3_30B_A3B = ModelConfig(
    vocab_size=151936,
    hidden_size=2048,
    num_layers=48,
    moe_intermediate_size=768,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    qk_norm=True,
    num_experts=128,
    top_k=8,
    norm_topk_prob=True,
    rope_theta=1e6,
    max_position=40960,
)

_SMALL_YARN = Yarn(factor=4, original_max_position=256, mscale=1.0, mscale_all_dim=1.0)

CONFIGS: dict[str, ModelConfig] = {
    "deepseek-v3": DEEPSEEK_V3,
    "deepseek-v2-lite": DEEPSEEK_V2_LITE,
    "mixtral-8x7b": MIXTRAL_8X7B,
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "deepseek-v3-mini": dataclasses.replace(
        DEEPSEEK_V3,
        vocab_size=256,
        hidden_size=128,
        num_layers=3,
        first_k_dense=1,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_heads=4,
        num_experts=16,
        top_k=4,
        n_group=4,
        topk_group=2,
        q_lora_rank=64,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        yarn=_SMALL_YARN,
        max_position=1024,
    ),
    "deepseek-v2-lite-mini": dataclasses.replace(
        DEEPSEEK_V2_LITE,
        vocab_size=256,
        hidden_size=128,
        num_layers=3,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_heads=4,
        num_experts=16,
        top_k=6,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        yarn=dataclasses.replace(_SMALL_YARN, mscale=0.707, mscale_all_dim=0.707),
        max_position=1024,
    ),
    "mixtral-8x7b-mini": dataclasses.replace(
        MIXTRAL_8X7B,
        vocab_size=256,
        hidden_size=128,
        num_layers=2,
        moe_intermediate_size=192,
        num_heads=8,
        num_kv_heads=2,
        head_dim=16,
        max_position=1024,
    ),
    "qwen3-30b-a3b-mini": dataclasses.replace(
        QWEN3_30B_A3B,
        vocab_size=256,
        hidden_size=128,
        num_layers=2,
        moe_intermediate_size=64,
        num_heads=8,
        num_kv_heads=2,
        head_dim=32,
        num_experts=16,
        top_k=4,
        max_position=1024,
    ),
}


def config(name: str) -> ModelConfig:
    """The config called `name`. Raises ValueError listing the names if there is none."""
    try:
        return CONFIGS[name]
    except KeyError:
        raise ValueError(f"no config {name!r}; there are {', '.join(CONFIGS)}") from None


def build(name_or_config: str | ModelConfig, seed: int = 0) -> MoETransformer:
    """A float32 model in eval mode with random weights from `seed` (see MoETransformer.init_weights).

    Selection biases are random too (σ = 0.05), so that tests see them. Under `torch.device("meta")` no weights are
    made.
    """
    model = MoETransformer(config(name_or_config) if isinstance(name_or_config, str) else name_or_config)
    if model.lm_head.weight.is_meta:
        return model.eval()
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.05)
    return model.eval()
