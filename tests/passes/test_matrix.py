"""Every pass of the default pipeline on every stored graph, and what the pipeline makes of each family.

`make matrix-passes` (MOEC_MATRIX=all) takes every graph through every pass; without it a selection is, and the others
only through the whole pipeline. The stored graphs come from tests/model_matrix.py.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch

from moec.checks import apply_checked, check_idempotent, describe
from moec.graph_text import canonical_text
from moec.ir.equivalence import Oracle
from moec.passes import (
    AbsorbMLA,
    AppendSharedExperts,
    FoldNormWeight,
    FoldScales,
    MergeLinears,
    MergeSharedExperts,
    default_pipeline,
)

from ..model_matrix import FAMILIES, FOLDER, MATRIX, OWN, REFUSED, graphs, load, traced

ALL = graphs()
# one of each kind: head sharing, latent attention with and without a cache, sinks and windows, soft cap, complex and
# interleaved rotary embedding, LayerNorm, padding, narrow floats
CHOSEN = [
    "mixtral.sdpa.grouped.prefill", "qwen3_moe.eager.batched.masked", "deepseek_v2.sdpa.grouped.decode",
    "own_deepseek_v3.sdpa.prefill", "gpt_oss.eager.grouped.prefill", "gemma2.eager.masked", "llama4.sdpa.prefill",
    "gpt_neox.sdpa.prefill", "glm4.sdpa.prefill", "mixtral.sdpa.grouped.prefill.bf16",
]  # fmt: skip
OF_CHOICE = (MergeLinears(), FoldScales(), FoldNormWeight(), MergeSharedExperts(), AppendSharedExperts())
STAGED = ALL if os.environ.get("MOEC_MATRIX") == "all" else CHOSEN


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", STAGED)
def test_every_pass_keeps_the_meaning(name):
    """Each pass verifies, leaves its input alone, changes nothing when run again; every stage means what the graph
    meant at first."""
    graph = load(name)
    oracle = Oracle(graph)
    assert not oracle.vacuous()
    for p in default_pipeline().passes:
        result, _ = apply_checked(p, graph)
        if canonical_text(result) != canonical_text(graph):
            check_idempotent(describe(p), [p], result)
            assert (difference := oracle.difference(result)) is None, f"{describe(p)} on {name}: {difference}"
        graph = result


@pytest.mark.parametrize("name", STAGED)
def test_passes_of_choice_keep_the_meaning(name):
    """Those that the default pipeline lacks, each on the fused graph."""
    graph = load(name)
    oracle = Oracle(graph)
    pipeline = default_pipeline().drop("tidy")
    fused, _ = pipeline.run(graph)
    for p in (AbsorbMLA(dynamic=True), *OF_CHOICE):
        assert p.name not in pipeline.names
        result, _ = apply_checked(p, fused)
        if canonical_text(result) != canonical_text(fused):
            check_idempotent(describe(p), [p], result)
            assert (difference := oracle.difference(result)) is None, f"{describe(p)} on {name}: {difference}"


class Parts(NamedTuple):
    """What a family consists of: attention layers, RMSNorms (with or without residual), LayerNorms, rotated tensors,
    layers of experts, layers of linear attention, convolutions."""

    attention: int
    rms: int = 0
    layer: int = 0
    rope: int = 0
    experts: int = 0
    linear: int = 0
    conv: int = 0


# two RMSNorms a layer and one at the end, two more a layer where queries and keys are normalised (or the latents of
# MLA), and after attention and MLP too in Gemma and GLM-4; q and k are rotated where a layer has positions
PARTS = {
    "own_deepseek_v3": Parts(2, 9, rope=4, experts=1),
    "own_deepseek_v2_lite": Parts(2, 7, rope=4, experts=1),  # no latent for queries
    "own_mixtral": Parts(1, 3, rope=2, experts=1),
    "own_qwen3": Parts(1, 5, rope=2, experts=1),
    "mixtral": Parts(1, 3, rope=2, experts=1),
    "qwen2_moe": Parts(2, 5, rope=4, experts=1),
    "qwen3_moe": Parts(1, 5, rope=2, experts=1),
    "deepseek_v2": Parts(2, 9, rope=4, experts=1),
    "deepseek_v3": Parts(2, 9, rope=4, experts=1),
    "gpt_oss": Parts(2, 5, rope=4, experts=2),
    "olmoe": Parts(1, 5, rope=2, experts=1),
    "granitemoe": Parts(1, 3, rope=2, experts=1),
    "granitemoeshared": Parts(1, 3, rope=2, experts=1),
    "granitemoehybrid": Parts(1, 3, experts=1),  # no positions
    "phimoe": Parts(1, layer=3, rope=2, experts=1),
    "llama4": Parts(2, 7, rope=2, experts=1),  # the second layer has no positions; q and k are normalised in the first
    "glm4_moe": Parts(2, 9, rope=4, experts=1),
    "glm4_moe_lite": Parts(1, 5, rope=2, experts=1),
    "ernie4_5_moe": Parts(2, 5, rope=4, experts=1),
    "hunyuan_v1_moe": Parts(1, 5, rope=2, experts=1),
    "dots1": Parts(2, 9, rope=4, experts=1),
    "minimax": Parts(1, 6, rope=2, experts=2, linear=1),  # one more norm after linear attention, here and below
    "minimax_m2": Parts(1, 5, rope=2, experts=1),
    "qwen3_next": Parts(1, 8, rope=2, experts=2, linear=1, conv=1),
    "qwen3_5_moe": Parts(1, 8, rope=2, experts=2, linear=1, conv=1),
    "jamba": Parts(1, 8, experts=1, linear=1, conv=1),  # no positions; norms of the step and of both projections
    "jetmoe": Parts(1, 3, rope=2, experts=1),
    "dbrx": Parts(1, layer=3, rope=2, experts=1),
    "longcat_flash": Parts(2, 9, rope=4, experts=1),
    "lfm2_moe": Parts(1, 7, rope=2, experts=1, conv=1),
    "granitemoehybrid_mamba": Parts(1, 6, experts=2, linear=1, conv=1),
    "nemotron_h_mamba": Parts(1, 5, experts=1, linear=1, conv=1),  # layers of Mamba-2, experts, attention
    "bamba": Parts(1, 6, rope=2, linear=1, conv=1),
    "mamba": Parts(0, 2, linear=1, conv=1),
    "mamba2": Parts(0, 3, linear=1, conv=1),
    "flex_olmo": Parts(1, 5, rope=2, experts=1),
    "afmoe": Parts(2, 13, rope=2, experts=1),  # four norms a layer; no positions in its full layer
    "cohere2_moe": Parts(2, layer=3, rope=2, experts=2),  # parallel residual; no positions in its full layer
    "exaone_moe": Parts(2, 9, rope=2, experts=2),
    "solar_open": Parts(1, 3, rope=2, experts=1),
    "mimo_v2_flash": Parts(2, 5, rope=4, experts=1),
    "hy_v3": Parts(1, 5, rope=2, experts=1),
    "laguna": Parts(1, 5, rope=2, experts=1),
    "nemotron_h": Parts(1, 3, experts=1),  # one layer of experts, then one of attention without positions
    "mellum": Parts(1, 5, rope=2, experts=1),
    "aria_text": Parts(1, 3, rope=2, experts=1),
    "llama": Parts(2, 5, rope=4),
    "llama_yarn": Parts(1, 3, rope=2),
    "gpt2": Parts(1, layer=3),
    "gpt_neox": Parts(1, layer=3, rope=2),
    "gemma2": Parts(2, 9, rope=4),
    "gemma3": Parts(2, 13, rope=4),
    "phi3": Parts(1, 3, rope=2),
    "phi": Parts(1, layer=2, rope=2),
    "qwen2": Parts(1, 3, rope=2),
    "cohere": Parts(1, layer=4, rope=2),
    "glm4": Parts(1, 5, rope=2),
    "smollm3": Parts(2, 5, rope=2),
}  # fmt: skip

# what the pipeline does not reach yet, by graph: the counts that are found instead, and why
GAPS: dict[str, tuple[dict[str, int], str]] = {
    "nemotron_h.sdpa.grouped.prefill": ({"experts": 0}, "experts without a gate (squared ReLU)"),
    "nemotron_h.eager.batched.masked": ({"experts": 0}, "experts without a gate (squared ReLU)"),
    "nemotron_h_mamba.sdpa.grouped.prefill": ({"experts": 0}, "experts without a gate (squared ReLU)"),
    "nemotron_h_mamba.eager.batched.masked": ({"experts": 0}, "experts without a gate (squared ReLU)"),
    "jetmoe.sdpa.prefill": (
        {"experts": 0, "routers": 2},
        "attention has experts too; results are added at their token",
    ),
    "jetmoe.eager.masked": (
        {"experts": 0, "routers": 2},
        "attention has experts too; results are added at their token",
    ),
    "phimoe.sdpa.grouped.prefill": ({"routers": 0}, "SparseMixer chooses one expert at a time"),
    "phimoe.eager.batched.masked": ({"routers": 0}, "SparseMixer chooses one expert at a time"),
}


def parts_of(graph) -> dict[str, int]:
    ops = graph.count_ops()
    return {
        "attention": ops.get("attention.sdpa", 0),
        "rms": ops.get("norm.rms", 0) + ops.get("norm.add_rms", 0),
        "layer": ops.get("norm.layer", 0),
        "rope": ops.get("rope.apply", 0),
        "experts": ops.get("moe.experts", 0),
        "linear": ops.get("attention.linear_attention", 0),
        "conv": ops.get("linear.conv", 0),
        "routers": ops.get("moe.route", 0),
    }


@pytest.mark.parametrize("name", ALL)
def test_what_a_model_consists_of_is_recognised(name):
    graph, _ = default_pipeline().run(load(name))
    entry = MATRIX[name]
    missing, reason = GAPS.get(name, ({}, ""))
    parts = PARTS[entry.family]
    assert parts_of(graph) == parts._asdict() | {"routers": parts.experts} | missing, reason
    ops = graph.count_ops()
    # nothing is left that was part of attention or of a choice of experts
    assert not ops.keys() & {"math.softmax", "math.topk", "math.sort", "linear.grouped_matmul"} or missing
    for attention in graph.find("attention.sdpa"):
        mask = attention.operand("mask")
        padded = entry.call != "prefill"
        assert (mask is not None) >= padded
        if mask is not None and not padded:
            # a mask without padding says less than causal: a window
            assert attention.attrs["causal"]
            assert mask.dtype == "bool"
            assert WINDOWED & {entry.family}


# families with a sliding or chunked window in some layer
WINDOWED = {"afmoe", "gpt_oss", "gemma2", "gemma3", "llama4", "exaone_moe", "mimo_v2_flash", "cohere2_moe"}


def test_the_table_is_complete():
    families = {MATRIX[n].family for n in ALL}
    assert families == (FAMILIES.keys() | OWN.keys()) - REFUSED.keys()
    assert families == PARTS.keys()
    assert set(ALL) == set(MATRIX)
    assert set(CHOSEN) <= set(ALL)
    assert set(GAPS) <= set(ALL)


@pytest.mark.parametrize("name", ["llama_yarn.sdpa.prefill", "mixtral.eager.batched.masked", "own_qwen3.sdpa.decode"])
def test_stored_graphs_are_what_the_front_end_gives(name):
    assert str(traced(name)) == (FOLDER / f"{name}.ir").read_text(), "the stored graph is stale: run `make graphs`"
