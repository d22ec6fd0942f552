"""A model against an ONNX file of it: inputs and outputs go by position where names differ, and what is wrong in the
file is found."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn
from typer.testing import CliRunner

import moec
from moec.cli import app
from moec.ir import ArgumentValueError

MODULE = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.arange(12.0).reshape(4, 3) / 7 - 0.8)

    def forward(self, a, b):
        h = torch.softmax(a @ self.w, -1)
        return h, b - h.sum()

def net():
    return Net(), (torch.randn(5, 4), torch.randn(2, 3))
"""
W = (np.arange(12, dtype=np.float32).reshape(4, 3) / 7 - 0.8).astype(np.float32)


def write(path, weight=W, inputs=("x", "y"), outputs=("p", "q"), rows="batch", kind=1):
    """The module as an ONNX file, with names of its own. The last output is of ONNX dtype `kind`."""
    x, y = inputs
    p, q = outputs
    made = {p: (rows, 3), q: ("other", 3)}
    takes = {x: (rows, 4), y: ("other", 3)}
    nodes = [
        helper.make_node("MatMul", [x, "w"], ["mul"]),  # names that a trace has too, for other values
        helper.make_node("Softmax", ["mul"], [p], axis=-1),
        helper.make_node("ReduceSum", [p], ["matmul"], keepdims=0),
        helper.make_node("Sub", [y, "matmul"], ["softmax"]),
        helper.make_node("Cast", ["softmax"], [q], to=kind),
    ]
    named = [helper.make_tensor_value_info(n, 1, s) for n, s in takes.items()]
    outs = [helper.make_tensor_value_info(n, kind if n == q else 1, made[n]) for n in sorted(made, reverse=q < p)]
    graph = helper.make_graph(nodes, "net", named, outs, [numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "net_and_file.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def net(folder):
    import importlib

    return importlib.import_module("net_and_file").net()


@pytest.mark.parametrize("dynamic", [None, ({0: "B"}, {0: "C"})])
@pytest.mark.parametrize("rows", ["batch", 5])
def test_names_and_symbols_may_differ(folder, net, dynamic, rows):
    model, args = net
    file = write(folder / "net.onnx", rows=rows)
    compiled = moec.compile(file, backend="onnxruntime")
    for backends in (("eager", compiled), ("reference", compiled), ("eager", file), (str(file), "reference")):
        comparison = moec.compare(model, args, backends=backends, dynamic_shapes=dynamic)
        assert comparison.ok, str(comparison)
        assert len(comparison.outputs) == 2
    assert "outputs alone were judged" in " ".join(comparison.notes)
    module = moec.compile(model, args, backend="onnxruntime", dynamic_shapes=dynamic)
    assert moec.compare(file, args, backends=("reference", module)).ok


def test_a_wrong_file_is_seen_and_placed(folder, net):
    model, args = net
    wrong = write(folder / "wrong.onnx", W * np.float32(1.01))
    comparison = moec.compare(model, args, backends=("eager", wrong))
    assert not comparison.ok
    assert [o.difference.ok for o in comparison.outputs] == [False, True]  # a sum of softmax is what it is
    assert comparison.first_divergence.backend == "wrong.onnx"


def test_equal_names_go_by_name(folder, net):
    """A file that lists the outputs in another order."""
    model, args = net
    graph = moec.trace(model, args)
    (a, b), (p, q) = [v.name for v in graph.inputs], graph.output_names
    onnx_file = write(folder / "net.onnx", inputs=(a, b), outputs=(p, q))
    found = onnx.load(onnx_file)
    outs = list(found.graph.output)
    del found.graph.output[:]
    found.graph.output.extend(outs[::-1])
    inputs = list(found.graph.input)
    del found.graph.input[:]
    found.graph.input.extend(inputs[::-1])
    onnx.save(found, onnx_file)
    for backends in (("reference", onnx_file), (onnx_file, "reference")):
        comparison = moec.compare(model, args, backends=backends)
        assert comparison.ok, str(comparison)


def test_what_does_not_fit_is_named(folder, net):
    model, args = net
    file = moec.compile(write(folder / "half.onnx", kind=10), backend="onnxruntime")
    with pytest.raises(ArgumentValueError) as e:
        moec.compare(model, args, backends=("eager", file))
    text = str(e.value)
    assert "its output 'q' is f16[other, 3], that of the model, " in text
    assert "compiled  (x: f32[batch, 4], y: f32[other, 3]) -> (p: f32[batch, 3], q: f16[other, 3])" in text
    assert "Net  (a: f32[5, 4], b: f32[2, 3]) -> (" in text
    fixed = moec.compile(write(folder / "fixed.onnx", rows=4), backend="onnxruntime")
    with pytest.raises(ArgumentValueError, match="it refuses the inputs: argument 'x' axis 0 has size 5, expected 4"):
        moec.compare(model, args, backends=("eager", fixed))
    with pytest.raises(ArgumentValueError, match="it takes 2 inputs, the model 1"):
        moec.compare(nn.Linear(4, 3), args[:1], backends=("eager", file))


@pytest.mark.parametrize(
    "arguments",
    [
        ("net_and_file:net", "net.onnx"),
        ("net.onnx", "net_and_file:net"),
        ("net_and_file:net", "net.onnx", "--backends", "eager,onnxruntime"),
        ("net.onnx", "net_and_file:net", "--backends", "reference,eager"),
        ("net_and_file:net", "--backends", "eager,net.onnx"),
    ],
)
def test_on_the_command_line(folder, arguments):
    for weight, code in ((W, 0), (W * np.float32(1.01), 1)):
        write(folder / "net.onnx", weight)
        done = CliRunner().invoke(app, ["compare", *arguments])
        assert done.exit_code == code, (done.output, done.exception)


def test_an_export_of_torch(folder):
    net, x = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 3)).eval(), torch.randn(5, 4)
    torch.onnx.export(net, (x,), folder / "net.onnx", dynamo=True, verbose=False)
    assert moec.compare(net, (x,), backends=("eager", folder / "net.onnx")).ok
    with torch.no_grad():
        net[2].weight[0, 0] += 0.1
    comparison = moec.compare(net, (x,), backends=("reference", folder / "net.onnx"))
    assert comparison.first_divergence.module == "2"
