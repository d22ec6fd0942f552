"""Hugging Face models with small random configs."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from moec.frontend import Signature, trace
from moec.ir import CompileError, run

BASE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "num_hidden_layers": 1,
}  # fmt: skip
LATENT = BASE | {
    "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 8, "n_group": 4, "topk_group": 2,
    "num_experts_per_tok": 3, "n_shared_experts": 1, "first_k_dense_replace": 0, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
CONFIGS = {
    "mixtral": ("MixtralConfig", BASE | {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", BASE | {"head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2,
                                           "moe_intermediate_size": 16, "norm_topk_prob": True}),
    "deepseek_v3": ("DeepseekV3Config", LATENT),
    "deepseek_v2": ("DeepseekV2Config", LATENT | {"topk_method": "group_limited_greedy"}),
    "gpt_oss": ("GptOssConfig", BASE | {"head_dim": 8, "num_local_experts": 6, "num_experts_per_tok": 2,
                                        "sliding_window": 128}),
    "llama": ("LlamaConfig", BASE),
}  # fmt: skip


def build(name: str, experts: str = "grouped_mm", attention: str = "sdpa", dtype=torch.float32):
    cls, values = CONFIGS[name]
    config = getattr(transformers, cls)(**values)
    extra = {"experts_implementation": experts} if experts else {}
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype, **extra)
    return model.eval()


def call(*shape: int) -> dict:
    return {"input_ids": torch.randint(0, 97, shape), "use_cache": False}


@pytest.mark.parametrize(
    ("name", "experts", "attention"),
    [
        ("mixtral", "grouped_mm", "sdpa"),
        ("mixtral", "batched_mm", "eager"),
        ("deepseek_v3", "grouped_mm", "sdpa"),
        ("deepseek_v3", "batched_mm", "sdpa"),
        ("qwen3_moe", "grouped_mm", "eager"),
        ("deepseek_v2", "grouped_mm", "sdpa"),
        ("gpt_oss", "grouped_mm", "eager"),
    ],
)
def test_agrees_at_other_shapes(name, experts, attention, same, well_formed):
    model = build(name, experts, attention)
    traced = trace(model, (), call(2, 24), dynamic_shapes={"input_ids": {0: "B", 1: "S"}})
    well_formed(traced)
    assert str(traced.graph.inputs[0].type) == "i64[B, S]"
    for shape in [(2, 24), (1, 1), (1, 17), (3, 40), (5, 100)]:
        same(traced, model, (), call(*shape))
    files = {f.file for n in traced.graph.nodes for f in n.location.frames}
    assert f"transformers/models/{name}/modeling_{name}.py" in files


@pytest.mark.parametrize(
    ("example", "type", "others"), [((1, 6), "i64[1, S]", [(1, 1), (1, 9)]), ((2, 1), "i64[B, 1]", [(5, 1), (3, 1)])]
)
def test_an_example_of_one_row_or_token(example, type, others, same):
    """transformers asks whether it is one, as torch's operators do: that size is fixed, and the other one open."""
    model = build("mixtral", attention="sdpa")
    traced = trace(model, (), call(*example), dynamic_shapes="auto")
    assert str(traced.graph.inputs[0].type) == type
    for shape in [example, *others]:
        same(traced, model, (), call(*shape))


def test_bfloat16(same, well_formed):
    model = build("mixtral", dtype=torch.bfloat16)
    traced = trace(model, (), call(2, 6), dynamic_shapes="auto")
    well_formed(traced)
    assert {"B=3, S=5", "B=4, S=9", "B=1, S=1"} <= {*traced.checked}
    assert traced.graph.find("linear.grouped_matmul")
    same(traced, model, (), call(2, 6), tol=4e-2)
    same(traced, model, (), call(1, 3), tol=4e-2)


def test_model_output_and_cache_structure_come_back():
    model = build("llama", "")
    ids = torch.randint(0, 97, (2, 6))
    traced = trace(model, (ids,), {"use_cache": True})
    saved = json.loads(json.dumps(traced.signature.to_dict()))
    assert Signature.from_dict(saved) == traced.signature
    result = Signature.from_dict(saved).unflatten(run(traced.graph, traced.flatten((ids,), {"use_cache": True})))
    assert type(result).__name__ == "CausalLMOutputWithPast"
    assert type(result.past_key_values).__name__ == "DynamicCache"
    assert result.loss is None
    torch.testing.assert_close(result.past_key_values.layers[0].keys, model(ids).past_key_values.layers[0].keys)
    assert traced.graph.output_names == ["logits", "past_key_values_key_cache_0", "past_key_values_value_cache_0"]


def test_filling_an_empty_tensor_leaves_only_what_was_written():
    traced = trace(build("deepseek_v3"), (), call(2, 4))
    assert not [n for n in traced.graph.find("tensor.full") if len(n.results[0].shape) == 4]


def test_eager_experts_are_refused_with_their_line():
    model = build("mixtral", "eager")
    with pytest.raises(CompileError) as e:
        trace(model, (), call(2, 4))
    assert e.value.code == "data-dependent"
    assert e.value.location.module == "model.layers.0.mlp.experts"
    assert e.value.location.frames[0].file == "transformers/models/mixtral/modeling_mixtral.py"
    assert "grouped_mm" in e.value.hint
