"""Our transformer computes what transformers' Mixtral, Qwen3-MoE and DeepSeek-V3 compute, from the same weights."""

import pytest
import torch

from moec.models import ModelConfig, MoETransformer, Yarn

VOCAB = 97


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    hf = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    )
    ours = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        num_experts=4,
        top_k=2,
        moe_intermediate_size=96,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
    )
    return hf, ours


def qwen3_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    hf = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            moe_intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=8,
            num_experts_per_tok=3,
            norm_topk_prob=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    )
    ours = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        qk_norm=True,
        num_experts=8,
        top_k=3,
        moe_intermediate_size=32,
        rope_theta=1e6,
    )
    return hf, ours


def deepseek_v3(q_lora_rank=32, interleaved=True, yarn=None):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if yarn is not None:
        rope |= {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_position,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
    hf = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            moe_intermediate_size=32,
            num_hidden_layers=3,
            first_k_dense_replace=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            n_shared_experts=1,
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            q_lora_rank=q_lora_rank,
            kv_lora_rank=24,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=12,
            rope_interleave=interleaved,
            rope_parameters=rope,
            max_position_embeddings=256,
            num_mtp_layers=0,
        )
    )
    ours = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        num_layers=3,
        num_heads=4,
        first_k_dense=1,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=16,
        top_k=4,
        num_shared_experts=1,
        n_group=4,
        topk_group=2,
        scoring="sigmoid",
        routed_scaling_factor=2.5,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=24,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        rope_interleaved=interleaved,
        yarn=yarn,
        max_position=256,
    )
    return hf, ours


CASES = {
    "mixtral": mixtral,
    "qwen3-moe": qwen3_moe,
    "deepseek-v3": deepseek_v3,
    "deepseek-v3 full query": lambda: deepseek_v3(q_lora_rank=None),
    "deepseek-v3 plain rope": lambda: deepseek_v3(interleaved=False),
    "deepseek-v3 yarn": lambda: deepseek_v3(yarn=Yarn(4.0, 64, mscale=1.0, mscale_all_dim=0.8)),
    "deepseek-v3 yarn without mscale": lambda: deepseek_v3(yarn=Yarn(8.0, 32, beta_fast=16)),
}


@pytest.fixture(params=CASES, scope="module")
def pair(request):
    torch.manual_seed(3)
    hf, config = CASES[request.param]()
    hf.eval()
    with torch.no_grad():
        # Larger than the library's own initialisation: with its 0.02, experts and attention hardly move the logits.
        for name, parameter in hf.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
        for name, buffer in hf.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.2)
    return hf, MoETransformer.from_tensors(config, hf.state_dict())


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(theirs.abs().max())))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1), (2, 24), (3, 40)])
def test_logits(pair, shape):
    hf, ours = pair
    ids = torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(1))
    close(ours(ids), hf(ids).logits)


@torch.no_grad()
def test_left_padding(pair):
    hf, ours = pair
    ids = torch.randint(0, VOCAB, (3, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, :1] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    theirs = hf(ids, attention_mask=mask, position_ids=positions).logits
    real = mask.bool()
    close(ours(ids, mask)[real], theirs[real])


@torch.no_grad()
def test_cached_steps(pair):
    hf, ours = pair
    ids = torch.randint(0, VOCAB, (2, 14), generator=torch.Generator().manual_seed(4))
    theirs = hf(ids[:, :9], use_cache=True)
    logits, past = ours(ids[:, :9], None, ours.empty_cache(2))
    close(logits, theirs.logits)
    for step in (slice(9, 10), slice(10, 14)):
        theirs = hf(ids[:, step], past_key_values=theirs.past_key_values, use_cache=True)
        logits, past = ours(ids[:, step], None, past)
        close(logits, theirs.logits)
    for layer, (k, v) in zip(theirs.past_key_values.layers, past, strict=True):
        close(k, layer.keys)
        close(v, layer.values)


@torch.no_grad()
def test_a_small_perturbation_is_seen(pair):
    """The comparison above can fail: 1% on one router row or projection changes the logits by more than it allows."""
    hf, ours = pair
    ids = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = hf(ids).logits
    weight = ours.model.layers[1].self_attn.o_proj.weight
    before = weight.clone()
    weight.mul_(1.01)
    try:
        with pytest.raises(AssertionError):
            close(ours(ids), expected)
    finally:
        weight.copy_(before)
