"""Graphs with very many nodes, inputs, weights or uses stay within the limits of time and memory."""

from __future__ import annotations

import sys

import pytest
import torch

import moec
from moec.ir import parse
from moec.ir.interpreter import run
from moec.passes import Pipeline

from .limits import limited
from .texts import chain, text

MIXED = ("math.silu({})", "math.add({}, @w)", "math.sigmoid({})", "norm.rms({}, @w)", "math.mul({0}, {0})")


@limited(seconds=90)
@pytest.mark.parametrize("n", [2_000, pytest.param(10_000, marks=pytest.mark.large)])
def test_a_chain_of_thousands_of_nodes(tmp_path, n):
    """Everywhere: parsing, printing, verifying, every pass, both backends, comparing, saving and loading."""
    limit = sys.getrecursionlimit()
    graph = parse(chain(n, *MIXED))
    graph.bind_weights({"w": torch.linspace(0.5, 1.5, 4)})
    assert parse(str(graph)) == graph == graph.clone()
    assert graph.to_networkx().number_of_nodes() == n + 3
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    (want,) = run(graph, [x])
    compiled = moec.compile(graph, backend="onnxruntime", threads=1)
    compiled.save(tmp_path / "saved")
    for model in (compiled, moec.load(tmp_path / "saved"), moec.compile(graph, backend="reference", passes=Pipeline())):
        torch.testing.assert_close(model(x)[0], want, rtol=1e-3, atol=1e-5)
    assert sys.getrecursionlimit() == limit


@pytest.mark.large
@limited(seconds=90)
@pytest.mark.parametrize("n", [100_000])
def test_a_hundred_thousand_nodes(n):
    graph = parse(chain(n, *MIXED))
    graph.bind_weights({"w": torch.linspace(0.5, 1.5, 4)})
    assert len(graph.clone()) == n == str(graph).count(" = ")
    assert torch.isfinite(run(graph, [torch.randn(1, 4)])[0]).all()


@pytest.mark.large
@limited(seconds=120)
def test_forty_thousand_nodes_through_every_pass():
    graph = parse(chain(40_000, *MIXED))
    graph.bind_weights({"w": torch.linspace(0.5, 1.5, 4)})
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    (want,) = run(graph, [x])
    compiled = moec.compile(graph, backend="reference")
    torch.testing.assert_close(compiled(x)[0], want, rtol=1e-3, atol=1e-5)


@limited(seconds=60)
def test_many_of_everything_else():
    """Inputs, outputs, weights, operands of one node, uses of one value, results of one node: none is quadratic."""
    n = 20_000
    inputs = ", ".join(f"%x{i}: f32[1]" for i in range(n))
    outputs = ", ".join(f"%y{i}: f32[1]" for i in range(n))
    results = ", ".join(f"%r{i}: f32[1]" for i in range(n))
    weights = [f"weight @w{i}: f32[1]" for i in range(n)]
    joined = ", ".join(f"%x{i}" for i in range(n))
    same = ", ".join(["%x0"] * n)
    parse(text(inputs=inputs, outputs=outputs, result=joined))
    parse(text(*weights, inputs="%x0: f32[1]", outputs="%y: f32[1]", result="%x0"))
    for operands in (joined, same):
        graph = parse(
            text(
                f"%0: f32[{n}] = tensor.concat({operands}) {{axis=0}}",
                f"{results} = tensor.split(%0) {{axis=0, sizes=[{', '.join(['1'] * n)}]}}",
                inputs=inputs, outputs=outputs, result=", ".join(f"%r{i}" for i in range(n)),
            )
        )  # fmt: skip
        graph.replace_value(graph.inputs[0], graph.inputs[1])
        graph.verify()
        compiled = moec.compile(graph, backend="reference", passes=Pipeline())
        assert len(compiled.graph.outputs) == n
