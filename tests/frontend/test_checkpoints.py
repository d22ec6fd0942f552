"""Checkpoint folders of transformers, read without it, compute what it computes."""

from __future__ import annotations

import json

import pytest
import torch

import moec
from moec.checkpoints import open_model
from moec.ir.weight import StackedSource

from .hf_checkpoints import CASES, VARIANTS, ids, model, save

DYNAMIC = ({0: "B", 1: "S"},)


@pytest.fixture(scope="module", params=CASES)
def written(request, tmp_path_factory):
    """(transformers' model, its folder)"""
    hf = model(CASES[request.param]())
    return hf, save(hf, tmp_path_factory.mktemp(request.param))


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert got.dtype == want.dtype
    assert float((got - want).abs().max()) <= tolerance * max(1.0, float(want.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "onnxruntime"])
def test_logits_and_greedy_text_equal_those_of_transformers(written, backend):
    hf, folder = written
    compiled = moec.compile(folder, (ids(),), backend=backend, dynamic_shapes=DYNAMIC, threads=1)
    close(compiled(ids()), hf(ids()).logits)
    close(compiled(ids(1, 1)), hf(ids(1, 1)).logits)
    want = hf.generate(ids(), max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(compiled.generate(ids(), max_new_tokens=7, eos_token_id=None), want)
    assert compiled.generator.stops.eos == (2,)
    assert compiled.generator.stops.positions == 256


@torch.no_grad()
def test_a_path_is_enough(written):
    """Without arguments the model generates; a trace has the same graph as a compiled model starts from."""
    hf, folder = written
    compiled = moec.compile(str(folder), backend="reference")
    want = hf.generate(ids(1, 5), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(compiled.generate(ids(1, 5), max_new_tokens=4, eos_token_id=None), want)
    graph = moec.trace(folder, (ids(),))
    assert graph.inputs[0].shape == (2, 11)
    assert all(v.weight.source is not None for v in graph.weights.values())


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_what_configs_can_choose(name, tmp_path):
    hf = model(VARIANTS[name](), seed=1)
    compiled = moec.compile(save(hf, tmp_path), (ids(),), backend="reference", dynamic_shapes=DYNAMIC)
    close(compiled(ids()), hf(ids()).logits)
    close(compiled(ids(1, 40)), hf(ids(1, 40)).logits)
    if "window" in name:
        want = hf.generate(ids(), max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert torch.equal(compiled.generate(ids(), max_new_tokens=9, eos_token_id=None), want)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_dtypes_are_kept(name, dtype, tmp_path):
    hf = model(CASES[name](), dtype)
    compiled = moec.compile(save(hf, tmp_path), (ids(),), backend="reference")
    wide = {v.dtype for v in compiled.graph.weights.values() if v.weight.name.endswith("proj.weight")}
    assert {str(d) for d in wide} == {"bf16" if dtype == torch.bfloat16 else "f16"}
    close(compiled(ids()), hf(ids()).logits, 0.05)
    # nearer to the model in f32 than transformers' own rounding
    exact = hf.float()(ids()).logits
    assert float((compiled(ids()).float() - exact).abs().max()) < 0.05 * float(exact.abs().max())


def test_a_one_percent_change_is_seen(tmp_path):
    hf = model(CASES["qwen3_moe"]())
    compiled = moec.compile(save(hf, tmp_path), (ids(),), backend="reference")
    with torch.no_grad():
        hf.model.layers[1].mlp.experts.down_proj.mul_(1.01)
        with pytest.raises(AssertionError):
            close(compiled(ids()), hf(ids()).logits)


def test_nothing_is_read_before_it_is_needed(tmp_path, monkeypatch):
    """Opening reads headers; an expert is read by itself, and the stack of them once."""
    from moec.frontend.checkpoints.shards import Shard

    folder = save(model(CASES["mixtral"]()), tmp_path)
    read = []
    original = Shard.read
    monkeypatch.setattr(Shard, "read", lambda self, key: (read.append(key), original(self, key))[1])
    opened = open_model(folder)
    assert read == []
    weight = opened.weights["model.layers.1.mlp.experts.gate_up_proj"]
    assert isinstance(weight.source, StackedSource)
    one = weight.part(2)
    experts = "model.layers.1.block_sparse_moe.experts"
    assert read == [f"{experts}.2.w1.weight", f"{experts}.2.w3.weight"]
    whole = weight.load()
    assert len(read) == 2 + 2 * 4
    assert torch.equal(whole[2], one)
    assert weight.load() is whole
    assert len(read) == 2 + 2 * 4


def test_tied_weights_stay_tied(tmp_path):
    folder = save(model(CASES["llama"]().__class__(**{**CASES["llama"]().to_dict(), "tie_word_embeddings": True})),
                  tmp_path)  # fmt: skip
    opened = open_model(folder)
    assert opened.weights["lm_head.weight"].source is opened.weights["model.embed_tokens.weight"].source
    graph = moec.trace(folder, (ids(),))
    assert len([n for n in graph.weights if n in ("lm_head.weight", "model.embed_tokens.weight")]) == 1


def test_one_file_instead_of_shards(tmp_path):
    hf = model(CASES["llama"]())
    hf.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    with torch.no_grad():
        close(moec.compile(tmp_path, (ids(),), backend="reference")(ids()), hf(ids()).logits)


def test_the_single_file_counts_where_there_is_an_index_too(tmp_path):
    from transformers import AutoModelForCausalLM

    hf = model(CASES["llama"]())
    save(hf, tmp_path)
    other = model(CASES["llama"](), seed=1)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(tmp_path)(ids()).logits
        close(want, other(ids()).logits)
        close(moec.compile(tmp_path, (ids(),), backend="reference")(ids()), want)


def test_stacked_experts_as_transformers_holds_them(tmp_path):
    hf = model(CASES["mixtral"]())
    hf.save_pretrained(tmp_path, save_original_format=False)
    with torch.no_grad():
        close(moec.compile(tmp_path, (ids(),), backend="reference")(ids()), hf(ids()).logits)


def test_multi_token_prediction_layers_are_read_where_they_are(tmp_path):
    from safetensors.torch import load_file, save_file

    hf = model(CASES["deepseek_v3"]())
    hf.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert open_model(tmp_path).module.config.num_mtp_layers == 0
    tensors = load_file(tmp_path / "model.safetensors")
    last = {k.replace("layers.1.", "layers.2."): v + 0.5 for k, v in tensors.items() if "layers.1." in k}
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        last[f"model.layers.2.{norm}.weight"] = torch.ones(64)
    last["model.layers.2.eh_proj.weight"] = torch.randn(64, 128)
    last["model.layers.2.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    last["model.layers.2.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file({**tensors, **last}, tmp_path / "model.safetensors")
    opened = open_model(tmp_path)
    assert opened.module.config.num_mtp_layers == 1
    assert torch.equal(opened.weights["model.layers.2.eh_proj.weight"].load(), last["model.layers.2.eh_proj.weight"])
    compiled = moec.compile(tmp_path, (ids(),), backend="reference")
    with torch.no_grad():
        close(compiled(ids()), hf(ids()).logits)
    plain = compiled.generate(ids(), max_new_tokens=4, eos_token_id=None)
    assert torch.equal(compiled.generate(ids(), max_new_tokens=4, eos_token_id=None, speculative=True), plain)
