"""AbsorbMLA and MergeLinears in whole programs: generation, quantisation, saving."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

import moec
import moec.models
from moec.checks import check_pass
from moec.ir.printer import print_graph
from moec.passes import AbsorbMLA, MergeLinears, default_pipeline, run_pass

from ..model_matrix import load

SMALL = dataclasses.replace(moec.models.config("deepseek-v3-mini"), num_layers=2, vocab_size=64)


@pytest.fixture(scope="module")
def model():
    return moec.models.build(SMALL)


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(0, 64, (2, 5), generator=torch.Generator().manual_seed(0))


def fused(name: str):
    return default_pipeline().run(load(name))[0]


@pytest.mark.parametrize(
    "name", ["own_deepseek_v3.sdpa.decode", "deepseek_v2.sdpa.grouped.decode", "deepseek_v3.sdpa.grouped.prefill"]
)
def test_latent_attention_is_absorbed_in_every_layer(name):
    graph = check_pass(AbsorbMLA(dynamic=True), fused(name))
    attention = graph.find("attention.sdpa")
    assert len(attention) == 2
    for node in attention:
        q, k, v = node.operands[:3]
        assert k.shape[1] == v.shape[1] == 1  # one key head for all
        assert q.shape[3] - v.shape[3] == k.shape[3] - v.shape[3] > 0  # the rotated part
    assert len([w for w in graph.weights if "absorbed" in w]) == 4


def test_absorption_leaves_other_attention_alone():
    graph = fused("own_mixtral.sdpa.decode")
    assert AbsorbMLA(dynamic=True).run(graph) == graph


@pytest.mark.parametrize(("queries", "applied"), [(1, 2), (35, 2), (36, 0)])
def test_the_number_of_queries_from_which_it_costs_more(queries, applied):
    """r (dn + dv) multiplications are saved per key and head, 2 r − dn − dv more needed per query: of the sizes here,
    16 · 22 / (2 · 16 − 22) = 35."""
    text = print_graph(fused("deepseek_v3.sdpa.grouped.prefill"))
    graph = moec.parse(re.sub(r"\bS\b", str(queries), text))
    _, record = run_pass(AbsorbMLA(), graph)
    assert record.fired.get("absorb_mla", 0) == applied
    assert applied or f"{queries} queries are more than 35" in str(record.refused[0])


@pytest.mark.parametrize("passes", [(AbsorbMLA(dynamic=True),), (AbsorbMLA(dynamic=True), MergeLinears())])
def test_generated_text_is_the_same(model, prompt, passes):
    plain = moec.compile(model, backend="reference").generate(prompt, max_new_tokens=6)
    pipeline = default_pipeline().insert_after("fuse", *passes)
    compiled = moec.compile(model, backend="onnxruntime", threads=1, passes=pipeline)
    assert torch.equal(compiled.generate(prompt, max_new_tokens=6), plain)


def test_merged_weights_are_quantised_kept_and_saved(model, prompt, tmp_path):
    def pipeline(*keep):
        quantization = moec.Quantization(activations=None, keep=keep)
        return default_pipeline(quantize=quantization).insert_after("fuse", MergeLinears())

    def dtypes(graph):
        return sorted(str(v.dtype) for n, v in graph.weights.items() if "q_a_proj+kv_a_proj" in n and "scale" not in n)

    c = moec.compile(model, (prompt,), backend="onnxruntime", threads=1, passes=pipeline("lm_head"))
    assert dtypes(c.graph) == ["f8e4m3fn"] * 2
    assert not [n for n in c.graph.weights if "q_a_proj.weight" in n]  # the parts are gone
    # the merged layer is where its parts were: keeping one of them keeps the whole
    kept, _ = pipeline("lm_head", "model.layers.0.self_attn.kv_a_proj_with_mqa").run(moec.trace(model, (prompt,)))
    assert dtypes(kept) == ["f32", "f8e4m3fn"]
    c.save(tmp_path / "saved")
    torch.testing.assert_close(moec.load(tmp_path / "saved")(prompt), c(prompt), rtol=0, atol=0)


def test_comparison_follows_values_through_merged_layers(model, prompt):
    pipeline = default_pipeline().insert_after("fuse", MergeLinears())
    compiled = moec.compile(model, (prompt,), backend="onnxruntime", threads=1, passes=pipeline)
    comparison = moec.compare(model, (prompt,), backends=("reference", compiled))
    assert comparison.ok, str(comparison)
