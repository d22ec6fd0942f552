"""What our ONNX Runtime backend writes comes in again: it means the same, and its experts are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import moec
from moec.backends.onnxruntime import backend
from moec.ir import Graph
from moec.ir.arrays import to_numpy

from ...model_matrix import load
from .builders import assert_same, session

PREFILL, DECODE = ((2, 5), (1, 1)), ((2, 4, 3), (1, 2, 1))  # (B, S) and (B, P, S)
# graph, quantisation, sizes, experts that are found again
CASES: dict[str, tuple[str, str | None, Any, int]] = {
    "mixtral": ("own_mixtral.sdpa.prefill", None, PREFILL, 1),
    "deepseek_v3 with a cache": ("own_deepseek_v3.sdpa.decode", None, DECODE, 1),
    "deepseek_v3 in fp8": ("own_deepseek_v3.sdpa.prefill", "fp8", PREFILL, 0),
    "gpt_oss": ("gpt_oss.eager.grouped.prefill", None, PREFILL, 2),
    "linear attention with states": ("qwen3_next.sdpa.grouped.decode", None, DECODE, 2),
    "convolution": ("lfm2_moe.sdpa.grouped.prefill", None, PREFILL, 1),
}


def inputs(graph: Graph, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(sizes))
    symbols = dict(zip(sorted({s for v in graph.inputs for s in v.type.symbols}), sizes, strict=True))
    found = []
    for v in graph.inputs:
        shape = [s if isinstance(s, int) else s.evaluate(symbols) for s in v.shape]
        dtype = v.dtype.torch
        if dtype.is_floating_point:
            found.append(torch.randn(shape, generator=generator).to(dtype))
        else:
            found.append(torch.randint(1, 20, shape, generator=generator).to(dtype))
    return found


@pytest.mark.parametrize("portable", [False, True], ids=["", "portable"])
@pytest.mark.parametrize("name", CASES)
def test_what_we_write_comes_in_again(name, portable, tmp_path: Path):
    stored, quantize, sizes, experts = CASES[name]
    graph = moec.compile(load(stored), backend="onnxruntime", quantize=quantize)._program.legal
    written = backend.compile(graph, threads=1, options={"portable": portable})
    written.save(tmp_path)
    path = tmp_path / "model.onnx"
    again = {b: moec.compile(path, backend=b) for b in ("reference", "onnxruntime")}
    assert again["reference"].graph.count_ops().get("moe.experts", 0) == experts
    names = [v.name for v in onnx.load(path, load_external_data=False).graph.input]
    for each in sizes:
        given = inputs(graph, each)
        want = session(path, dict(zip(names, map(to_numpy, given), strict=True)))
        for compiled in again.values():
            assert_same(compiled(*given), want, f"{name} {each}", 1e-4)


def test_the_moe_operator_comes_in_again(tmp_path: Path):
    """com.microsoft.MoE, which is written for very many experts."""
    graph = moec.compile(load("own_mixtral.sdpa.prefill"), backend="onnxruntime")._program.legal
    backend.compile(graph, threads=1, options={"experts": "moe"}).save(tmp_path)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert any(n.op_type == "MoE" for n in model.graph.node)
    compiled = moec.compile(tmp_path / "model.onnx", backend="onnxruntime")
    assert compiled.graph.count_ops()["moe.experts"] == 1
    given = inputs(graph, (2, 5))
    names = [v.name for v in model.graph.input]
    want = session(tmp_path / "model.onnx", dict(zip(names, map(to_numpy, given), strict=True)))
    assert_same(compiled(*given), want, rtol=1e-5)
