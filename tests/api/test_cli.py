"""The command line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import moec
from moec.cli import app
from moec.graph_file import load_graph, save_graph
from moec.ir import CompileError

from . import wrong_rules
from .samples import MLP, bind

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


def test_compile_in_int4(module, tmp_path):
    done = call("compile", f"{module}:model", "--out", tmp_path / "out", "--quantize", "int4")
    assert done.exit_code == 0, done.output
    loaded = moec.load(tmp_path / "out")
    assert {v.dtype for n, v in loaded.graph.weights.items() if n.endswith("codes")} == {"i4"}
    done = call("compile", f"{module}:model", "--out", tmp_path / "out", "--quantize", "int5")
    assert done.exit_code == 1
    assert "'int8', 'int4'" in str(done.exception)


def test_generate_from_a_saved_folder(compiled_lm, tmp_path):
    compiled_lm.save(tmp_path / "lm")
    done = call("generate", tmp_path / "lm", "--prompt", "\x01\x02", "--max-new-tokens", "3")
    assert done.exit_code == 0, done.output
    want = compiled_lm.generate(torch.tensor([[1, 2]]), max_new_tokens=3)[0].tolist()
    assert done.output.encode() == bytes(want) + b"\n"
    assert call("generate", tmp_path / "lm", "--prompt", "").exit_code == 2
    assert call("generate", tmp_path / "lm", "--prompt", "x", "--quantize", "fp8").exit_code == 2


def test_compare_exits_with_one_where_backends_differ(module, monkeypatch):
    monkeypatch.setattr("moec.comparing.Comparison.ok", False)
    assert call("compare", f"{module}:model").exit_code == 1


WRONG = f"{wrong_rules.__file__}:WrongSilu"


@pytest.fixture
def ir_file(tmp_path):
    path = tmp_path / "mlp.ir"
    path.write_text(MLP)
    return path


def test_passes_by_name(module, tmp_path, ir_file):
    """--pass on every command that runs passes."""
    dump = tmp_path / "dump"
    done = call("compile", f"{module}:model", "--out", tmp_path / "o", "--backend", "reference", "--dump", dump,
                "--pass", "fuse_swiglu{max=3}", "--pass", "dead_code, fold_constants{limit=8}")  # fmt: skip
    assert done.exit_code == 0, done.output
    names = [p.stem.split("_", 1)[1] for p in sorted(dump.glob("*.ir"))]
    assert names[-4:] == ["fuse_swiglu", "dead_code", "fold_constants", "legalise"]
    done = call("inspect", f"{module}:model", "--pass", WRONG)
    assert done.exit_code == 0, done.output
    assert "math.sigmoid(" in done.output
    assert "math.silu(" not in done.output
    done = call("compare", f"{module}:model", "--backends", "eager,reference", "--pass", WRONG)
    assert done.exit_code == 1, done.output


def test_ir_files(ir_file, tmp_path):
    done = call("inspect", ir_file)
    assert done.exit_code == 0, done.output
    assert "norm.rms(%x, @norm)" in done.output
    done = call("inspect", ir_file, "--pass", WRONG, "--no-ir")
    assert done.exit_code == 0, done.output
    assert "math.sigmoid" in done.output
    assert "norm.rms(%x" not in done.output
    done = call("compare", ir_file)
    assert done.exit_code == 0, done.output
    with pytest.raises(CompileError, match="has no data"):
        runner.invoke(app, ["compile", str(ir_file), "--out", str(tmp_path / "o")], catch_exceptions=False)
    inputs = (torch.randn(5, 16), torch.arange(5))
    save_graph(bind(moec.parse(MLP)), ir_file, inputs, header="what it is\nand why")
    graph, stored = load_graph(ir_file)
    assert all(torch.equal(a, b) for a, b in zip(stored, inputs, strict=True))
    done = call("compile", ir_file, "--out", tmp_path / "o", "--backend", "onnxruntime")
    assert done.exit_code == 0, done.output
    expected = moec.compile(graph, backend="reference")(*inputs)[0]
    torch.testing.assert_close(moec.load(tmp_path / "o")(*inputs)[0], expected)


@pytest.mark.parametrize("text", [b"graph(%x: f32[2]) -> (%y: f32[2]) {", b"\xff\xfe", None])
def test_bad_ir_files(tmp_path, text):
    path = tmp_path / "bad.ir"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(CompileError, match=r"bad\.ir"):
        runner.invoke(app, ["inspect", str(path)], catch_exceptions=False)


def test_bad_data_beside_an_ir_file(ir_file):
    beside = ir_file.with_suffix(".safetensors")
    beside.write_bytes(b"nonsense")
    with pytest.raises(CompileError, match=r"mlp\.safetensors: .*header"):
        load_graph(ir_file)
    save_file({"weight.up": torch.ones(3)}, beside)
    with pytest.raises(CompileError, match=r"mlp\.safetensors: 'up': declared f32\[32, 16\], got f32\[3\]"):
        load_graph(ir_file)


def test_explain(module, ir_file, tmp_path):
    done = call("explain", "silu", f"{module}:model")
    assert done.exit_code == 0, done.output
    assert "there is no math.mul" in done.output
    done = call("explain", WRONG, ir_file)
    assert done.output.startswith(f"the graph in {ir_file}")
    assert "1 match" in done.output
    assert "wrong_rules.py:" in done.output
    done = call("explain", f"{wrong_rules.__file__}:RightThenWrong", ir_file, "--at", "elsewhere")
    assert "there is no math.mul in elsewhere" in done.output
    done = call("explain", "fuse_norm", f"{module}:model", "--before", "clean")
    assert done.output.startswith("the graph before pass dead_code")
    done = call("explain", "fuse_norm", f"{module}:model")
    assert done.output.startswith("the graph before pass fuse_norm")
    done = call("explain", "fuse_norm", f"{module}:model", "--before", "tidy.canonicalise")
    assert done.output.startswith("the graph before pass canonicalise")
    assert "there is no" in done.output
    for says, words in (
        ("no pass 'fuse_nrm'", ["fuse_norm", f"{module}:model", "--before", "fuse_nrm"]),
        ("occurs 2 times", ["fuse_norm", f"{module}:model", "--before", "dead_code"]),
        ("is not a Rewrite", ["dead_code", str(ir_file)]),
    ):
        with pytest.raises(CompileError, match=says):
            runner.invoke(app, ["explain", *words], catch_exceptions=False)


def test_bisect(module, ir_file, tmp_path):
    done = call("bisect", f"{module}:model")
    assert done.exit_code == 0, done.output
    assert "nothing is wrong" in done.output
    done = call("bisect", ir_file, "--backend", "onnxruntime")
    assert done.exit_code == 0, done.output
    done = call("bisect", f"{module}:model", "--pass", f"dead_code, {WRONG}", "--out", tmp_path / "small")
    assert done.exit_code == 1, done.output
    assert "rule wrong_silu" in done.output
    done = call("bisect", tmp_path / "small" / "culprit.ir", "--pass", WRONG)
    assert done.exit_code == 1, done.output
    assert "number 1 of the pipeline" in done.output


def test_bad_passes_name_the_column():
    with pytest.raises(CompileError, match="column 13: fuse_swiglu has no option 'mx'"):
        runner.invoke(app, ["bisect", "trained", "--pass", "fuse_swiglu{mx=3}"], catch_exceptions=False)


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


def test_cache(module, tmp_path, monkeypatch):
    """By option, or by the environment; without either nothing is written."""
    command = ("compile", f"{module}:model", "--out", tmp_path / "out", "--backend", "onnxruntime")
    assert "forward: cache" not in call(*command).output
    assert "cache miss: there is none yet" in call(*command, "--cache", tmp_path / "cache").output
    monkeypatch.setenv("MOEC_CACHE", str(tmp_path / "cache"))
    done = call(*command)
    assert "forward: cache hit" in done.output
    assert "forward: cache hit" in call(*command, "--threads", "1").output
