"""Configs: published sizes, validation, JSON."""

import dataclasses
import functools

import pytest
import torch

from moec.models import CONFIGS, ModelConfig, Yarn, build, config

# Published totals in billions: DeepSeek-V3 (arXiv:2412.19437, without the MTP module), DeepSeek-V2-Lite and
# Qwen3-30B-A3B (model cards), Mixtral 8x7B (arXiv:2401.04088).
PUBLISHED = {"deepseek-v3": 671.0, "deepseek-v2-lite": 15.7, "mixtral-8x7b": 46.7, "qwen3-30b-a3b": 30.5}


@functools.cache
def on_meta(name):
    with torch.device("meta"):
        return build(name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    model = on_meta(name)
    mtp = f"model.layers.{model.config.num_layers}."
    count = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(mtp))
    assert round(count / 1e9, 1) == PUBLISHED[name]
    assert all(p.is_meta for p in model.parameters())


# Activated per token, in billions, from the same sources.
@pytest.mark.parametrize(("name", "active"), [("deepseek-v3", 37), ("mixtral-8x7b", 13), ("qwen3-30b-a3b", 3.3)])
def test_published_active_parameters(name, active):
    model = on_meta(name)
    c = model.config
    mtp = f"model.layers.{c.num_layers}."
    count = 0.0
    for n, p in model.named_parameters():
        if n.startswith(mtp) or "embed_tokens" in n:
            continue
        count += p.numel() * (c.top_k / c.num_experts if ".experts." in n else 1)
    assert count / 1e9 == pytest.approx(active, rel=0.08)


@pytest.mark.parametrize("name", PUBLISHED)
def test_mini_is_the_reduced_twin(name):
    full, mini = config(name), config(f"{name}-mini")
    assert sum(p.numel() for p in build(mini).parameters()) < 4e6
    for field in ("scoring", "norm_topk_prob", "num_shared_experts", "first_k_dense", "qk_norm", "num_mtp_layers"):
        if field != "first_k_dense" or full.first_k_dense <= 1:
            assert getattr(full, field) == getattr(mini, field), field
    assert full.is_mla == mini.is_mla
    assert (full.q_lora_rank is None) == (mini.q_lora_rank is None)
    assert (full.yarn is None) == (mini.yarn is None)
    assert (full.n_group > 1) == (mini.n_group > 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_json_round_trip(name):
    assert ModelConfig.from_json(config(name).to_json()) == config(name)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mixtral-8x7b-mini", {"top_k": 9}, "top_k is 9, must be at most num_experts 8"),
        ("mixtral-8x7b-mini", {"hidden_size": 0}, "hidden_size is 0, must be at least 1"),
        ("mixtral-8x7b-mini", {"hidden_size": 12.0}, "hidden_size is 12.0, must be an int"),
        ("mixtral-8x7b-mini", {"num_kv_heads": 3}, "num_kv_heads is 3, must be a divisor of 8"),
        ("mixtral-8x7b-mini", {"head_dim": 15}, "head_dim is 15, must be even"),
        ("mixtral-8x7b-mini", {"v_head_dim": 8}, "v_head_dim is 8, must be 0 without MLA"),
        ("mixtral-8x7b-mini", {"scoring": "tanh"}, "scoring is 'tanh'"),
        ("mixtral-8x7b-mini", {"first_k_dense": 1}, "intermediate_size is 0"),
        ("mixtral-8x7b-mini", {"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0, must be positive"),
        ("deepseek-v3-mini", {"n_group": 3}, "n_group is 3, must be a divisor"),
        ("deepseek-v3-mini", {"topk_group": 5}, "topk_group is 5, must be at most n_group 4"),
        ("deepseek-v3-mini", {"topk_group": 1, "top_k": 5}, "top_k is 5, must be at most 1 groups of 4"),
        ("deepseek-v3-mini", {"n_group": 16, "topk_group": 4}, "such that a group has 2 experts"),
        ("deepseek-v3-mini", {"num_kv_heads": 4}, "num_kv_heads is 4, must be 0 with MLA"),
        ("deepseek-v3-mini", {"qk_norm": True}, "qk_norm is True"),
        ("deepseek-v3-mini", {"first_k_dense": 4}, "first_k_dense is 4, must be at most num_layers 3"),
    ],
)
def test_bad_sizes_are_named(name, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config(name), **changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "a config is a JSON object"),
        ('{"colour": 1}', "unknown config fields: \\['colour'\\]"),
        ('{"vocab_size": 5}', "missing"),
        ("{", "Expecting"),
    ],
)
def test_bad_json(text, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_json(text)


def test_bad_yarn_and_unknown_name():
    with pytest.raises(ValueError, match=r"yarn\.factor"):
        Yarn(0.5, 10)
    with pytest.raises(ValueError, match="beta_fast"):
        Yarn(2, 10, beta_fast=1, beta_slow=2)
    with pytest.raises(ValueError, match=r"no config 'gpt-5'; there are deepseek-v3, "):
        config("gpt-5")
