"""Options of a backend, by `moec.compile` and the command line."""

from __future__ import annotations

import onnx
import pytest
from typer.testing import CliRunner

import moec
from moec.cli import app
from moec.cli_options import options_of
from moec.ir import ArgumentTypeError, ArgumentValueError


def domains(folder) -> set[str]:
    return {n.domain for n in onnx.load(folder / "forward" / "model.onnx", load_external_data=False).graph.node}


def test_a_portable_model_has_standard_operators_only(mlp, tmp_path):
    for portable, expected in ((False, {"", "com.microsoft"}), (True, {""})):
        moec.compile(mlp, backend="onnxruntime", threads=1, options={"portable": portable}).save(tmp_path / "m")
        assert domains(tmp_path / "m") == expected


@pytest.mark.parametrize(
    ("backend", "options", "error", "words"),
    [
        ("onnxruntime", {"nope": 1}, ArgumentValueError, "has no option 'nope'"),
        ("onnxruntime", {"experts": "x"}, ArgumentValueError, "one of auto, unrolled"),
        ("onnxruntime", {"memory": "fp8"}, ArgumentValueError, "memory among the options"),
        ("reference", {"portable": True}, ArgumentValueError, "backend 'reference' has no options, got portable"),
        ("triton", {"portable": True}, ArgumentValueError, "backend 'triton' has no options"),
        ("onnxruntime", 3, ArgumentTypeError, "options=3 must map names to values"),
        ("onnxruntime", {1: 2}, ArgumentTypeError, "must map names"),
    ],
)
def test_what_is_wrong_is_said(mlp, backend, options, error, words):
    with pytest.raises(error, match=words):
        moec.compile(mlp, backend=backend, options=options)


def test_no_options_are_no_error(mlp):
    for nothing in (None, {}):
        assert moec.compile(mlp, backend="reference", options=nothing).backend == "reference"


MODEL = """
import torch

def make():
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU()), (torch.ones(2, 4),)
"""


@pytest.mark.parametrize(("given", "expected"), [([], {"", "com.microsoft"}), (["--option", "portable=true"], {""})])
def test_on_the_command_line(tmp_path, given, expected):
    (tmp_path / "model.py").write_text(MODEL)
    spec, out = f"{tmp_path / 'model.py'}:make", tmp_path / "out"
    done = CliRunner().invoke(app, ["compile", spec, "--out", str(out), "--backend", "onnxruntime", *given])
    assert done.exit_code == 0, done.output
    assert domains(out) == expected


def test_texts_of_options():
    assert options_of(None) is None
    assert options_of(["portable=true", "huge_pages=False", "experts=moe"]) == {
        "portable": True, "huge_pages": False, "experts": "moe",
    }  # fmt: skip
    for texts, words in (
        (["portable"], "is no NAME=VALUE"),
        (["=1"], "is no NAME"),
        (["a=1", "a=2"], "is there twice"),
    ):
        with pytest.raises(ArgumentValueError, match=words):
            options_of(texts)
