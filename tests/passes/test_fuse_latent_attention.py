"""FuseLatentAttention: where it fires, and that the graph means the same."""

from __future__ import annotations

import re

import pytest

import moec
from moec.checks import check_pass
from moec.ir.printer import print_graph
from moec.passes import FuseLatentAttention, default_pipeline, run_pass

from ..model_matrix import load


def fused(name: str) -> moec.Graph:
    return default_pipeline().run(load(name))[0]


@pytest.mark.parametrize("name", ["own_deepseek_v3.sdpa.decode", "deepseek_v2.sdpa.grouped.decode"])
def test_every_layer_with_a_cache_is_fused(name: str):
    graph = check_pass(FuseLatentAttention(), fused(name))
    assert not graph.find("attention.sdpa")
    for node in graph.find("attention.latent"):
        assert node.operand("weight").weight is not None  # as it was
    assert len(graph.find("attention.latent")) == 2


def test_without_a_cache_there_are_as_many_keys_as_queries():
    _, record = run_pass(FuseLatentAttention(), fused("deepseek_v3.sdpa.grouped.prefill"))
    assert not record.fired
    assert "S queries of as many keys" in str(record.refused[0])


def test_other_attention_is_left_alone():
    graph = fused("own_mixtral.sdpa.decode")
    assert FuseLatentAttention().run(graph) == graph


def test_an_added_mask_is_refused():
    text = print_graph(fused("own_deepseek_v3.sdpa.decode"))
    text = re.sub(r"(attention\.sdpa\(%\d+, %\d+, %\d+), %\d+, _\)", r"\1, %extra, _)", text)
    text = text.replace("graph(", "graph(%extra: f32[1, 1, S, P + S], ", 1)
    graph = moec.parse(text)
    _, record = run_pass(FuseLatentAttention(), graph)
    assert not record.fired
    assert any("its mask is added" in str(r) for r in record.refused)
