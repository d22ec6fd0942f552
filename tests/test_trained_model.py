"""The shipped model through the whole pipeline: loss and text, judged against PyTorch."""

import pytest
import torch

import moec
from moec import models

SAMPLE = 8 << 10


@pytest.fixture(scope="module")
def model():
    return models.trained()


@pytest.fixture(scope="module")
def graph(model):
    return moec.trace(model, (torch.zeros(2, 24, dtype=torch.int64),), dynamic_shapes="auto")


@pytest.fixture(scope="module")
def text():
    return models.heldout_text()[:SAMPLE]


@pytest.fixture(scope="module")
def loss(model, text):
    return models.bits_per_byte(model, text)


def test_loss_is_pytorch_s(graph, text, loss):
    small = text[: SAMPLE // 4]
    reference = moec.compile(graph, backend="reference")
    compiled = moec.compile(graph, backend="onnxruntime", threads=1)
    assert models.bits_per_byte(lambda ids: compiled(ids)[0], text) == pytest.approx(loss, abs=1e-3)
    assert models.bits_per_byte(lambda ids: reference(ids)[0], small) == pytest.approx(
        models.bits_per_byte(lambda ids: compiled(ids)[0], small), abs=1e-3
    )


def test_fp8_costs_half_a_percent_at_most(graph, text, loss):
    compiled = moec.compile(graph, backend="onnxruntime", quantize="fp8", threads=1)
    assert len(compiled.graph.find("quant.scaled_experts")) == 3
    quantised = models.bits_per_byte(lambda ids: compiled(ids)[0], text)
    assert quantised != loss  # something was quantised
    assert quantised <= loss * 1.005


def test_placement_with_replicas_is_neutral(graph, model):
    ids = torch.tensor([list(models.heldout_text("code")[:48])])
    load = torch.stack([v for _, v in sorted(models.expert_load(model, models.heldout_text()[:4096]).items())])
    placement = moec.place_experts(load, moec.Mesh(nodes=1, gpus_per_node=4, slots_per_gpu=5))
    plain = moec.compile(graph, backend="onnxruntime", threads=1)(ids)[0]
    placed = moec.compile(graph, backend="onnxruntime", placement=placement, threads=1)
    assert len(placed.graph.find("moe.remap")) == 3
    assert placed.graph.find("moe.experts")[0].operand("gate_up").shape[0] == 20
    torch.testing.assert_close(placed(ids)[0], plain, rtol=0, atol=1e-5)
