"""Our own models: every mini config, plain and cached, at sizes they were not traced at."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch

import moec.models
from moec.frontend import trace
from moec.ir import run

MINIS = ["deepseek-v3-mini", "deepseek-v2-lite-mini", "mixtral-8x7b-mini", "qwen3-30b-a3b-mini"]


@cache
def traced_mini(name: str):
    """(model, trace at (2, 24) with both axes dynamic), made once."""
    model = moec.models.build(name)
    ids = torch.randint(0, 256, (2, 24))
    return model, trace(model, (ids,), dynamic_shapes={"input_ids": {0: "B", 1: "S"}})


@pytest.mark.parametrize("name", MINIS)
def test_mini_agrees_at_other_shapes(name, same, well_formed):
    model, traced = traced_mini(name)
    well_formed(traced)
    assert str(traced.graph.inputs[0].type) == "i64[B, S]"
    assert traced.specialised == ()
    assert {"B=3, S=5", "B=4, S=27", "B=1, S=1"} <= {*traced.checked}
    for shape in [(2, 24), (1, 1), (1, 17), (3, 40), (5, 100)]:
        same(traced, model, (torch.randint(0, 256, shape),))


def test_experts_are_represented_as_grouped_products():
    model, traced = traced_mini("mixtral-8x7b-mini")
    graph = traced.graph
    layers = model.config.num_layers
    assert len(graph.find("linear.grouped_matmul")) == 2 * layers
    assert len(graph.find("attention.sdpa")) == layers
    assert len(graph.find("tensor.histc")) == layers
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert {n: v.shape for n, v in graph.weights.items() if n in shapes} == shapes


def test_weights_are_shared_not_copied():
    model, traced = traced_mini("mixtral-8x7b-mini")
    held = traced.graph.weights["lm_head.weight"].weight.load()
    assert held.data_ptr() == model.lm_head.weight.data_ptr()


@pytest.mark.parametrize("name", ["deepseek-v3-mini", "qwen3-30b-a3b-mini"])
def test_cached_step_with_dynamic_batch_sequence_and_past(name, same, well_formed):
    config = dataclasses.replace(moec.models.config(name), num_layers=1, first_k_dense=0)
    model = moec.models.build(config)

    def arguments(batch: int, length: int, past: int):
        cache = [tuple(torch.randn(*t.shape[:2], past, t.shape[3]) for t in pair) for pair in model.empty_cache(batch)]
        mask = torch.ones(batch, past + length, dtype=torch.int64)
        mask[0, 0] = 0
        return torch.randint(0, 256, (batch, length)), mask, cache

    pair = ({0: "B", 2: "P"}, {0: "B", 2: "P"})
    traced = trace(
        model,
        arguments(2, 3, 5),
        dynamic_shapes={"input_ids": {0: "B", 1: "S"}, "attention_mask": {0: "B", 1: torch.export.Dim.AUTO},
                        "past": [pair] * config.num_layers},
    )  # fmt: skip
    well_formed(traced)
    types = {v.name: str(v.type).split("[", 1)[1] for v in traced.graph.inputs}
    assert types["input_ids"] == "B, S]"
    assert types["attention_mask"] == "B, P + S]"
    assert types["past_0_0"].startswith("B, ")
    assert ", P, " in types["past_0_0"]
    for sizes in [(2, 3, 5), (1, 1, 0), (1, 1, 17), (3, 7, 0), (4, 1, 33)]:
        same(traced, model, arguments(*sizes), tol=2e-5)
    logits, cache = traced.unflatten(run(traced.graph, traced.flatten(arguments(1, 2, 4))))
    assert isinstance(cache, list)
    assert isinstance(cache[0], tuple)
    assert cache[0][0].shape[2] == 6
    assert logits.shape == (1, 2, 256)


def test_bfloat16(same, well_formed):
    config = dataclasses.replace(moec.models.config("mixtral-8x7b-mini"), num_layers=1)
    model = moec.models.build(config).to(torch.bfloat16)
    traced = trace(model, (torch.randint(0, 256, (2, 6)),), dynamic_shapes="auto", check=False)
    well_formed(traced)
    for shape in [(2, 6), (1, 1), (3, 11)]:
        same(traced, model, (torch.randint(0, 256, shape),), tol=4e-2)


def test_meta_model_traces_without_data():
    config = dataclasses.replace(moec.models.config("deepseek-v3-mini"), num_layers=1)
    with torch.device("meta"):
        model = moec.models.build(config)
    graph = trace(model, (torch.zeros(2, 4, dtype=torch.int64),), dynamic_shapes="auto").graph
    assert all(v.weight.source is None for v in graph.weights.values())
    assert "model.layers.0.self_attn.o_proj.weight" in graph.weights


def test_locations_name_module_and_file():
    graph = traced_mini("deepseek-v3-mini")[1].graph
    where = {n.location.module: n.location.frames[0].file for n in graph.find("linear.grouped_matmul")}
    assert where == dict.fromkeys([f"model.layers.{i}.mlp.experts" for i in (1, 2)], "moec/models/moe.py")
    assert {n.location.frames[0].file for n in graph.find("attention.sdpa")} == {"moec/models/attention.py"}
    assert graph.find("linear.linear")[-1].location.module == "lm_head"
    every = [n.location.module for n in graph.nodes]
    assert sum(m.startswith(("model.", "lm_head", "model")) for m in every) >= 0.95 * len(every)
