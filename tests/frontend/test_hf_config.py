"""What a config.json leaves out means what it means to transformers' configuration classes."""

from __future__ import annotations

from typing import Any

import pytest

from moec.frontend.checkpoints.counts import check_counts
from moec.frontend.checkpoints.errors import Problems
from moec.frontend.checkpoints.hf_config import ARCHITECTURES, read_config
from moec.ir import CompileError

from .hf_checkpoints import CASES, VARIANTS


def read(data: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of a config; None where it is refused."""
    problems = Problems("it")
    fields = read_config(data, problems)[1]
    return None if problems.found else fields


@pytest.mark.parametrize("name", [*CASES, *VARIANTS])
def test_fields_that_are_left_out(name):
    """Each by itself: what transformers fills in, or a refusal."""
    config = (CASES | VARIANTS)[name]()
    data = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures", "head_dim")}
    kind, absent = config.model_type, 0
    assert read({"model_type": kind, **data}) is not None
    for field in data:
        rest = {k: v for k, v in data.items() if k != field}
        fields = read({"model_type": kind, **rest})
        if fields is None:
            continue
        absent += 1
        filled = type(config).from_dict(rest).to_dict()
        filled = {k: v for k, v in filled.items() if k in {*data, "head_dim"}}
        assert fields == read({**filled, "model_type": kind}), field
    assert absent > 5


def test_the_numbers_that_differ_between_architectures():
    bare = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 4}
    bare |= {"max_position_embeddings": 8, "intermediate_size": 8}
    mixtral = read({"model_type": "mixtral", **bare})
    assert mixtral is not None
    assert (mixtral["rms_norm_eps"], mixtral["num_kv_heads"], mixtral["rope_theta"]) == (1e-5, 8, 1e6)
    latent = dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8)
    latent |= {"moe_intermediate_size": 8, "n_routed_experts": 16, "num_experts_per_tok": 2}
    v3 = read({"model_type": "deepseek_v3", **bare, **latent})
    assert v3 is not None
    assert (v3["routed_scaling_factor"], v3["n_group"], v3["topk_group"]) == (2.5, 8, 4)
    assert (v3["q_lora_rank"], v3["first_k_dense"], v3["num_shared_experts"]) == (1536, 3, 1)
    v2 = read({"model_type": "deepseek_v2", **bare, **latent, "q_lora_rank": None})
    assert v2 is not None
    assert (v2["routed_scaling_factor"], v2["q_lora_rank"], v2["num_shared_experts"]) == (1.0, None, 2)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_null_is_no_number_and_no_flag(kind):
    """A normalisation that is null is none to transformers; it is not the default."""
    problems = Problems("it")
    read_config({"model_type": kind, "rms_norm_eps": None, "tie_word_embeddings": None}, problems)
    assert "config.json: rms_norm_eps is null, expected a number" in problems.found
    assert "config.json: tie_word_embeddings is null, expected true or false" in problems.found


def test_layers_and_experts_that_are_counted():
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i in range(3) for e in range(4)]
    for fields, said in (
        ({"num_layers": 65}, "the config has 65 layers, and no tensor of layer 3 is there"),
        ({"num_layers": 2, "num_mtp_layers": 63}, "the config has 65 layers, and no tensor of layer 3"),
        ({"num_layers": 3, "head_dim": 2**30}, "heads of head_dim 1073741824, expected at most 65536"),
        ({"num_layers": 3, "qk_rope_head_dim": 2**30}, "heads of qk_rope_head_dim 1073741824"),
        ({"num_layers": 3, "num_experts": 2**31}, "the config has 2147483648 experts, and no tensor of expert 4"),
    ):
        with pytest.raises(CompileError, match=said):
            check_counts(fields, names, Problems("it"))
    # where some are missing, all that lacks is listed later
    for fields in ({"num_layers": 3, "num_experts": 4}, {"num_layers": 2, "num_mtp_layers": 1}, {"num_layers": 5}):
        check_counts(fields, names, Problems("it"))
    fields = {"num_layers": 3, "num_mtp_layers": 3_000_000}
    check_counts(fields, names, Problems("it"))
    assert fields["num_mtp_layers"] == 0
    check_counts({"num_layers": 1, "num_experts": 9}, ["model.layers.0.mlp.experts.down_proj"], Problems("it"))
    check_counts({"num_layers": 1, "num_experts": 2, "first_k_dense": 1}, ["blk.0.ffn_up.weight"], Problems("it"))
