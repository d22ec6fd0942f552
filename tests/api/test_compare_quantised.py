"""Models that quantise activations, against what has no nodes of the same program: saved outputs, models, eager."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import moec
from moec.testing import assert_backends_agree


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 128))


@pytest.fixture(scope="module")
def x():
    return (torch.randn(6, 256, generator=torch.Generator().manual_seed(0)),)


@pytest.fixture(scope="module")
def compiled(x):
    return moec.compile(net(0), x, backend="onnxruntime", quantize="fp8", threads=1)


def written(path, tensor):
    save_file({"output": tensor.contiguous()}, path)
    return str(path)


def test_its_own_outputs_agree(compiled, x, tmp_path):
    saved = written(tmp_path / "own.safetensors", compiled(*x))
    again = moec.compile(net(0), x, backend="onnxruntime", quantize="fp8", threads=1)
    assert_backends_agree(compiled, x, backends=("reference", "onnxruntime", saved, again))
    assert moec.compare(net(0), x, backends=("reference", "eager"), quantize="fp8").ok


@pytest.mark.parametrize("change", [torch.zeros_like, lambda y: -y, lambda y: y[:3], lambda y: y * torch.nan])
def test_other_outputs_do_not(compiled, x, tmp_path, change):
    saved = written(tmp_path / "other.safetensors", change(compiled(*x)))
    result = moec.compare(compiled, x, backends=("reference", "onnxruntime", saved))
    assert not result.ok
    assert [o.difference.ok for o in result.outputs if o.judged] == [False]
    assert "NOT ok" in str(result)


def test_other_weights_do_not(compiled, x):
    for quantize in ("fp8", None):
        other = moec.compile(net(1), x, backend="onnxruntime", quantize=quantize, threads=1)
        assert not moec.compare(compiled, x, backends=("onnxruntime", other)).ok


def test_a_given_tolerance_holds(compiled, x, tmp_path):
    y = compiled(*x)
    y[0, 0] += 0.05 * y.abs().max()
    saved = written(tmp_path / "near.safetensors", y)
    assert moec.compare(compiled, x, backends=("onnxruntime", saved)).ok
    assert not moec.compare(compiled, x, backends=("onnxruntime", saved), tolerance=1e-3).ok
