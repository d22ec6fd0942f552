"""ONNX models through the public interface and the command line."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import helper, numpy_helper
from typer.testing import CliRunner

import moec
from moec.cli import app, main
from moec.ir import ArgumentTypeError

RNG = np.random.default_rng(0)
W = RNG.standard_normal((4, 3)).astype(np.float32)


def proto() -> onnx.ModelProto:
    """y = softmax(x w), z = unique values of x's signs: one output native, one from an operator that is not ours."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="product"),
        helper.make_node("Softmax", ["h"], ["y"], axis=-1),
        helper.make_node("Sign", ["x"], ["s"]),
        helper.make_node("Unique", ["s"], ["z"]),
    ]
    x = helper.make_tensor_value_info("x", 1, ["batch", 4])
    outs = [helper.make_tensor_value_info("y", 1, ["batch", 3]), helper.make_tensor_value_info("z", 1, ["values"])]
    graph = helper.make_graph(nodes, "net", [x], outs, [numpy_helper.from_array(W, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def want(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (x @ torch.from_numpy(W)).softmax(-1), x.sign().unique()


@pytest.fixture
def path(tmp_path):
    onnx.save(proto(), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


@pytest.mark.parametrize("backend", ["reference", "onnxruntime"])
def test_compile_takes_paths_and_models(path, backend):
    for model in (path, str(path), proto(), onnx_ir.from_proto(proto())):
        compiled = moec.compile(model, backend=backend)
        for n in (3, 1, 0):
            x = torch.randn(n, 4)
            torch.testing.assert_close(compiled(x), want(x))
    assert moec.compile(path).report.to_dict()["model"] == "net.onnx"


def test_arguments_are_checked(path):
    assert moec.compile(path, (torch.zeros(2, 4),), backend="reference").graph.output_names == ["y", "z"]
    with pytest.raises(ArgumentTypeError, match="'x' has dtype i64, expected f32"):
        moec.compile(path, (torch.zeros(2, 4, dtype=torch.int64),))
    with pytest.raises(ArgumentTypeError, match="dynamic_shapes does not apply"):
        moec.compile(path, dynamic_shapes="auto")
    with pytest.raises(ValueError, match="axis 1 has size 5, expected 4"):
        moec.compile(path, backend="reference")(torch.zeros(2, 5))


def test_trace_and_compare(path):
    graph = moec.trace(path)
    assert graph.count_ops() == {"extern.Unique": 1, "linear.matmul": 1, "math.sign": 1, "math.softmax": 1}
    assert graph.find("matmul")[0].location.module == "product"
    assert moec.compare(path, (torch.randn(3, 4),)).ok
    wrong = moec.compile(graph_with("MatMul", "math.neg"), backend="reference")
    comparison = moec.compare(path, (torch.randn(3, 4),), backends=["reference", wrong])
    assert not comparison.ok


def graph_with(op: str, after: str) -> moec.Graph:
    """The model with a node put behind an operator: a planted bug."""
    graph = moec.trace(proto())
    node = graph.find("matmul")[0]
    users = list(node.result.uses)
    new = graph.create(after, [node.result], before=node._next).result
    for user, i in users:
        graph.replace_operand(user, i, new)
    return graph


def test_save_and_load(path, tmp_path):
    compiled = moec.compile(path, backend="onnxruntime")
    compiled.save(tmp_path / "saved")
    x = torch.randn(5, 4)
    torch.testing.assert_close(moec.load(tmp_path / "saved")(x), want(x))


def test_bisect_takes_it(path):
    assert moec.bisect(path, (torch.randn(3, 4),), backend="onnxruntime").kind == "none"


def test_command_line(path, tmp_path, capsys):
    run = CliRunner().invoke
    shown = run(app, ["inspect", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "extern.Unique" in shown.output
    assert "linear.linear" in shown.output  # after the default passes
    done = run(app, ["compile", str(path), "--out", str(tmp_path / "out"), "--backend", "onnxruntime"])
    assert done.exit_code == 0, done.output
    x = torch.randn(2, 4)
    torch.testing.assert_close(moec.load(tmp_path / "out")(x), want(x))
    compared = run(app, ["compare", str(path)])
    assert compared.exit_code == 0, compared.output


def test_command_line_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.onnx").write_bytes(b"\x00\x01")
    monkeypatch.setattr("sys.argv", ["moec", "inspect", str(tmp_path / "bad.onnx")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "is no ONNX model, or is truncated" in capsys.readouterr().err
