"""`moec compare`: its forms, its exit codes, and what it writes."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import moec
from moec.cli import app
from moec.comparing.saved import compare_files
from moec.graph_file import save_graph
from moec.ir import ArgumentValueError, CompileError

from .samples import MLP, bind

MODEL = """
import torch

def model(scale=1.0):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.SiLU(), torch.nn.Linear(6, 3))
    with torch.no_grad():
        net[2].weight *= scale
    return net, torch.randn(5, 4)

def wrong():
    return model(1.01)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "nets_to_compare.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def call(*args, code=0):
    done = CliRunner().invoke(app, ["compare", *map(str, args)])
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


RIGHT, WRONG = "nets_to_compare:model", "nets_to_compare:wrong"


def test_made_up_inputs_are_said(folder):
    moec.compile(torch.nn.Linear(4, 3), (torch.randn(5, 4),), backend="reference").save("saved")
    save_file({"output": torch.zeros(5, 3)}, "zeros.safetensors")
    assert "saved ran on random numbers; --inputs FILE gives what zeros.safetensors" in call(
        "saved", "zeros.safetensors", code=1
    )


def test_backends(folder):
    out = call(RIGHT, "--backends", "eager,reference,onnxruntime", "--json", "c.json")
    assert "eager has no values inside" in out
    assert json.loads((folder / "c.json").read_text())["ok"]
    out = call(RIGHT, "--save", "kept")
    assert "values inside in tolerance" in out
    call(RIGHT, "kept/reference/outputs.safetensors")
    call("kept/onnxruntime/outputs.safetensors", RIGHT, "--backends", "reference,onnxruntime")
    assert "NOT ok" in call("kept/reference/outputs.safetensors", WRONG, code=1)
    call("kept/reference/outputs.safetensors", "kept/onnxruntime/outputs.safetensors")


def test_two_models(folder):
    call(RIGHT, RIGHT, "--backends", "reference,onnxruntime")
    out = call(RIGHT, WRONG, "--repro", "repro", code=1)
    assert "first diverges at linear.linear" in out
    assert (folder / "repro" / "node.ir").exists()
    call(RIGHT, WRONG, "--tolerance", "0.1")


def test_saved_folders(folder):
    model, x = moec.compile, torch.randn(5, 4)
    net = torch.nn.Linear(4, 3)
    one = model(net, (x,), backend="onnxruntime")
    one.save(folder / "one")
    with torch.no_grad():
        net.weight *= 1.01
    model(net, (x,), backend="reference").save(folder / "two")
    call("one")
    call("one", "one")
    call("one", "two", code=1)
    save_file({one.graph.inputs[0].name: x}, folder / "x.safetensors")
    assert "reference" in call("one", "--inputs", "x.safetensors")
    save_file({"y": x}, folder / "y.safetensors")
    with pytest.raises(CompileError, match="has no inputs"):
        CliRunner().invoke(app, ["compare", "one", "--inputs", "y.safetensors"], catch_exceptions=False)


def test_a_graph_file_and_a_backend_of_the_users_own(folder):
    graph = bind(moec.parse(MLP))
    save_graph(graph, folder / "mlp.ir", (torch.randn(3, 16), torch.arange(3)))
    (folder / "mine.py").write_text(
        "import dataclasses\n"
        "from moec.backends.onnxruntime import backend as real\n"
        "def wrong(e, node):\n"
        "    (x,) = e.operands(node)\n"
        "    return e.op('Mul', x, e.op('Sigmoid', e.op('Mul', x, e.scalar(1.1, node.result.dtype))))\n"
        "mine = dataclasses.replace(real, name='mine', lowerings={**real.lowerings, 'math.silu': wrong})\n"
    )
    out = call("mlp.ir", "--backends", "reference,mine.py:mine", code=1)
    assert "mine first diverges at math.silu" in out


def test_bad_calls(folder):
    np.savez(folder / "a.npz", x=np.zeros(2))
    for args, said in [
        (("a.npz",), "name what to compare it with"),
        (("a.npz", "b.npz"), r"cannot read tensors from b\.npz"),
        ((RIGHT, RIGHT, "--backends", "reference,onnxruntime,reference"), "one for both"),
        ((RIGHT, "--backends", "onnx"), "unknown backend 'onnx'"),
        ((RIGHT, "--backends", "nothing.py:mine"), "cannot import backend"),
        (("nonsense",), "no model 'nonsense'"),
    ]:
        with pytest.raises(CompileError, match=said):
            CliRunner().invoke(app, ["compare", *args], catch_exceptions=False)


def test_files_by_name(folder):
    a = {"x": torch.randn(3, 4), "i": torch.arange(3), "h": torch.randn(5).bfloat16()}
    save_file(a, folder / "a.safetensors")
    save_file({**a, "x": a["x"] * (1 + 1e-6)}, folder / "b.safetensors")
    assert compare_files(folder / "a.safetensors", folder / "b.safetensors").ok
    assert not compare_files(folder / "a.safetensors", folder / "b.safetensors", tolerance=1e-8).ok
    save_file({**a, "x": a["x"] * 1.01}, folder / "c.safetensors")
    save_file({**a, "i": a["i"] + 1}, folder / "d.safetensors")
    save_file({**a, "x": a["x"][:2]}, folder / "e.safetensors")
    for name in "cde":
        found = compare_files(folder / "a.safetensors", folder / f"{name}.safetensors", 1e-3)
        assert not found.ok
        assert sum(not o.difference.ok for o in found.outputs) == 1
    save_file({"x": a["x"]}, folder / "f.safetensors")
    with pytest.raises(ArgumentValueError, match=r"only a\.safetensors has h, i"):
        compare_files(folder / "a.safetensors", folder / "f.safetensors")
