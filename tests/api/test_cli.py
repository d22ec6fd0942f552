"""The command line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import moec
from moec.cli import app
from moec.ir import CompileError

runner = CliRunner()

MODULE = """
import torch

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.SiLU()), (torch.ones(2, 4),)

def nothing():
    return 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "sample_models.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "sample_models"


def call(*args):
    return runner.invoke(app, [str(a) for a in args])


def test_compile_inspect_compare(module, tmp_path):
    folder = tmp_path / "out"
    done = call("compile", f"{module}:model", "--out", folder, "--backend", "onnxruntime", "--report",
                tmp_path / "r.html", "--dump", tmp_path / "dump")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "legalise" in done.output
    assert (tmp_path / "r.html").exists()
    assert (tmp_path / "dump" / "00_input.ir").exists()
    assert moec.load(folder)(torch.ones(3, 4)).shape == (3, 3)
    for source in (folder, f"{module}:model"):
        done = call("inspect", source, "--weights")
        assert done.exit_code == 0, done.output
        assert "linear.linear(" in done.output
        assert "f32[3, 4]" in done.output
    done = call("compare", f"{module}:model", "--backends", "eager,reference,onnxruntime")
    assert done.exit_code == 0, done.output
    assert "onnxruntime" in done.output


def test_generate_from_a_saved_folder(compiled_lm, tmp_path):
    compiled_lm.save(tmp_path / "lm")
    done = call("generate", tmp_path / "lm", "--prompt", "\x01\x02", "--max-new-tokens", "3")
    assert done.exit_code == 0, done.output
    want = compiled_lm.generate(torch.tensor([[1, 2]]), max_new_tokens=3)[0].tolist()
    assert done.output.encode() == bytes(want) + b"\n"
    assert call("generate", tmp_path / "lm", "--prompt", "").exit_code == 2
    assert call("generate", tmp_path / "lm", "--prompt", "x", "--quantize", "fp8").exit_code == 2


def test_compare_exits_with_one_where_backends_differ(module, monkeypatch):
    monkeypatch.setattr("moec.comparison.Comparison.ok", False)
    assert call("compare", f"{module}:model").exit_code == 1


def test_place(tmp_path):
    load = tmp_path / "load.json"
    load.write_text(json.dumps([[8, 1, 1, 1, 1, 1, 1, 2], [1] * 8]))
    done = call("place", load, "--gpus", "4", "--slots", "3", "--out", tmp_path / "p.json")
    assert done.exit_code == 0, done.output
    rows = moec.Placement.from_dict(json.loads((tmp_path / "p.json").read_text())).physical_to_logical
    assert [len(r) for r in rows] == [12, 12]
    assert all(set(r) == set(range(8)) for r in rows)
    load.write_text("{}")
    with pytest.raises(CompileError, match=r"load\.json"):
        runner.invoke(app, ["place", str(load), "--slots", "3"], catch_exceptions=False)


def test_doctor():
    done = call("doctor")
    assert "onnxruntime" in done.output
    assert "agrees with the reference" in done.output
    assert done.exit_code == 0, done.output


def test_bad_input_prints_the_error_and_exits_with_two(tmp_path):
    command = [sys.executable, "-c", "from moec.cli import main; main()"]
    command += ["compile", "no-such-model", "--out", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no model 'no-such-model'" in done.stderr
    assert "trained" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("spec", ["sample_models:nothing", "sample_models:missing", "no_module_here:model", "nonsense"])
def test_bad_models(module, spec):
    with pytest.raises(CompileError):
        runner.invoke(app, ["inspect", spec], catch_exceptions=False)
