"""A Mixture-of-Experts block as PyTorch exports it to ONNX: what comes in means what the module does, and the passes
find router and experts in it as they do in a traced module."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import moec
from moec.frontend.onnx import import_onnx


class Block(nn.Module):
    """x [B, S, d] → x + Σ weight · experts(rms(x)), each row with its own experts' matrices."""

    def __init__(self, d: int = 16, f: int = 24, experts: int = 4, k: int = 2):
        super().__init__()
        self.k = k
        self.norm = nn.RMSNorm(d)
        self.router = nn.Linear(d, experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * f, d) * 0.2)
        self.down = nn.Parameter(torch.randn(experts, d, f) * 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x).reshape(-1, x.shape[-1])
        weights, experts = self.router(h).softmax(-1).topk(self.k)
        weights = weights / weights.sum(-1, keepdim=True)
        flat = experts.reshape(-1)
        rows = h[:, None, :].expand(-1, self.k, -1).reshape(-1, h.shape[-1])
        gate, up = torch.bmm(self.gate_up[flat], rows[:, :, None]).squeeze(-1).chunk(2, -1)
        y = torch.bmm(self.down[flat], (nn.functional.silu(gate) * up)[:, :, None]).squeeze(-1)
        y = (y * weights.reshape(-1, 1)).reshape(-1, self.k, h.shape[-1]).sum(1)
        return x + y.reshape(x.shape)


class Looped(Block):
    """The same in a loop over all experts, each on the rows that chose it: as Optimum has its models exported."""

    def chosen(self, experts: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, slots = torch.where(experts == number)
        return tokens, slots

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x).reshape(-1, x.shape[-1])
        weights, experts = self.router(h).softmax(-1).topk(self.k)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(h)
        for e in range(len(self.gate_up)):
            tokens, slots = self.chosen(experts, e)
            gate, up = nn.functional.linear(h[tokens], self.gate_up[e]).chunk(2, -1)
            part = nn.functional.linear(nn.functional.silu(gate) * up, self.down[e])
            y = y.index_add(0, tokens, part * weights[tokens, slots, None])
        return x + y.reshape(x.shape)


class Masked(Looped):
    """With the mask of choices that transformers had."""

    def chosen(self, experts: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        slots, tokens = torch.where(nn.functional.one_hot(experts, len(self.gate_up)).permute(2, 1, 0)[number])
        return tokens, slots


@pytest.fixture(scope="module", params=[Block, Looped, Masked])
def exported(request, tmp_path_factory):
    torch.manual_seed(0)
    module = nn.Sequential(request.param(), request.param()).eval()
    path = tmp_path_factory.mktemp("onnx") / "moe.onnx"
    logging.disable(logging.WARNING)  # the exporter's
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module, (torch.randn(2, 5, 16),), dynamo=True, dynamic_shapes=({0: "B", 1: "S"},), verbose=False
            )
    finally:
        logging.disable(logging.NOTSET)
    program.save(path)
    return module, path


@pytest.mark.parametrize("backend", ["reference", "onnxruntime"])
def test_it_means_what_the_module_does(exported, backend):
    module, path = exported
    compiled = moec.compile(path, backend=backend)
    for shape in ((2, 5), (1, 1), (3, 7), (0, 4), (2, 0)):
        x = torch.randn(*shape, 16)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x)[0], module(x), rtol=1e-4, atol=1e-5)


def test_router_and_experts_are_found(exported):
    _, path = exported
    imported = import_onnx(path)
    assert not imported.extern
    graph = moec.compile(imported.graph, backend="reference").graph
    counts = graph.count_ops()
    assert (counts["moe.route"], counts["moe.experts"]) == (2, 2)
    assert graph.find("moe.route")[0].location.frames[0].file == Path(__file__).name


def test_backends_agree_and_a_planted_bug_is_found(exported):
    _, path = exported
    x = torch.randn(2, 5, 16)
    assert moec.compare(path, (x,)).ok
    graph = moec.trace(path)
    gates = [v.weight for v in graph.weights.values() if v.shape[-2:] == (48, 16)]
    graph.bind_weights({w.name: w.load() * 1.01 for w in gates})
    wrong = moec.compile(graph, backend="onnxruntime")
    assert not moec.compare(path, (x,), backends=["reference", wrong]).ok
