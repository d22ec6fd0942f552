"""One transformer block with routed experts at every opset from 13 to 24, by both of PyTorch's exporters: it means what
ONNX Runtime makes of the file, and attention, norms, router and experts are found in it."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import moec
from moec.frontend.onnx import import_onnx

from .builders import assert_same, session


class Block(nn.Module):
    """x [B, S, d] → x + attention(norm(x)), then + Σ weight · experts(norm(·))."""

    def __init__(self, d: int = 32, heads: int = 4, experts: int = 4, k: int = 2, f: int = 24):
        super().__init__()
        self.heads, self.k = heads, k
        self.first, self.second = nn.LayerNorm(d), nn.Parameter(torch.ones(d))
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.router = nn.Linear(d, experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * f, d) * 0.2)
        self.down = nn.Parameter(torch.randn(experts, d, f) * 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, d = x.shape
        q, k, v = self.qkv(self.first(x)).view(b, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        place = torch.arange(s, device=x.device)
        scores = q @ k.transpose(-1, -2) * (d // self.heads) ** -0.5
        scores = scores.masked_fill(place[None, :] > place[:, None], float("-inf"))
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, d))
        h = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.second).reshape(-1, d)
        weights, experts = self.router(h).softmax(-1).topk(self.k)
        weights = weights / weights.sum(-1, keepdim=True)
        flat = experts.reshape(-1)
        rows = h[:, None, :].expand(-1, self.k, -1).reshape(-1, d)
        gate, up = torch.bmm(self.gate_up[flat], rows[:, :, None])[..., 0].chunk(2, -1)
        y = torch.bmm(self.down[flat], (nn.functional.silu(gate) * up)[:, :, None])[..., 0]
        return x + (y * weights.reshape(-1, 1)).reshape(-1, self.k, d).sum(1).reshape(b, s, d)


def exported(path: Path, opset: int, dynamo: bool) -> Path:
    torch.manual_seed(0)
    module, x = Block().eval(), torch.randn(2, 5, 32)
    logging.disable(logging.WARNING)  # the exporters'
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if dynamo:
                sizes = ({0: "B", 1: "S"},)
                torch.onnx.export(module, (x,), path, dynamo=True, dynamic_shapes=sizes, opset_version=opset)
            else:
                axes = {"x": {0: "B", 1: "S"}}
                torch.onnx.export(module, (x,), path, dynamo=False, input_names=["x"], dynamic_axes=axes,
                                  opset_version=opset)  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
    return path


# the exporter that works on traces writes up to opset 20, the other from 18 on
FORMS = [(opset, False) for opset in range(13, 21)] + [(opset, True) for opset in range(18, 25)]


@pytest.mark.parametrize(("opset", "dynamo"), FORMS)
def test_a_block_at_every_opset(opset, dynamo, tmp_path):
    path = exported(tmp_path / "block.onnx", opset, dynamo)
    assert onnx.load(path, load_external_data=False).opset_import[0].version == opset
    imported = import_onnx(path)
    assert not imported.extern
    (name,) = imported.signature.input_names
    for backend in ("reference", "onnxruntime"):
        compiled = moec.compile(path, backend=backend)
        counts = compiled.graph.count_ops()
        assert {"attention.sdpa", "norm.layer", "moe.route", "moe.experts"} <= counts.keys()
        assert {"norm.rms", "norm.add_rms"} & counts.keys()
        for b, s in ((2, 5), (1, 1), (3, 7)):
            x = torch.randn(b, s, 32)
            assert_same(compiled(x), session(path, {name: x.numpy()}), f"[{b}, {s}]", 1e-4)
