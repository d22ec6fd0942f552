"""`save` and `load`: bit-equal in a fresh process, nothing half-written, nothing trusted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moec
from moec import saving
from moec.files import digest_file
from moec.ir import ArtifactError, CompileError
from moec.manifest import manifest_digest

PROMPT = torch.tensor([[3, 9, 27, 1]])

LOADER = """
import sys, torch, moec
folder, out = sys.argv[1:]
compiled = moec.load(folder)
x, keep = torch.load(out + ".in", weights_only=True)
y, kept = compiled(x, keep)
torch.save([y, kept], out)
assert "pickle" not in [f.suffix for f in __import__("pathlib").Path(folder).rglob("*")]
"""


@pytest.mark.parametrize("backend", ["reference", "onnxruntime"])
def test_a_fresh_process_gives_equal_bits(mlp, mlp_args, tmp_path, backend):
    compiled = moec.compile(mlp, backend=backend, threads=1)
    want = compiled(*mlp_args)
    compiled.save(tmp_path / "saved")
    torch.save(mlp_args, tmp_path / "out.in")
    command = [sys.executable, "-c", LOADER, str(tmp_path / "saved"), str(tmp_path / "out")]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for a, b in zip(want, torch.load(tmp_path / "out", weights_only=True), strict=True):
        assert torch.equal(a, b)
    loaded = moec.load(tmp_path / "saved")
    assert loaded.graph == compiled.graph
    assert loaded.backend == backend
    assert loaded.settings.threads == 1


@pytest.mark.parametrize("quantize", ["fp8", "fp8-weight-only"])
def test_fp8_weights_come_back(mlp, mlp_args, tmp_path, quantize):
    compiled = moec.compile(mlp, backend="onnxruntime", quantize=quantize, threads=1)
    compiled.save(tmp_path / "saved")
    loaded = moec.load(tmp_path / "saved")
    assert torch.equal(loaded(*mlp_args)[0], compiled(*mlp_args)[0])
    assert loaded.graph == compiled.graph
    assert {str(v.dtype) for v in loaded.graph.weights.values()} >= {"f8e4m3fn", "f32"}


@pytest.mark.parametrize("backend", ["reference", "onnxruntime"])
@pytest.mark.parametrize(("quantize", "dtype"), [("int8", "i8"), ("int4", "i4")])
def test_integer_weights_come_back(mlp, mlp_args, tmp_path, backend, quantize, dtype):
    """4-bit ones take half a byte in the file."""
    compiled = moec.compile(mlp, backend=backend, quantize=quantize, threads=1)
    compiled.save(tmp_path / "saved")
    loaded = moec.load(tmp_path / "saved")
    assert torch.equal(loaded(*mlp_args)[0], compiled(*mlp_args)[0])
    assert loaded.graph == compiled.graph
    codes = {n: v for n, v in loaded.graph.weights.items() if n.endswith("codes")}
    assert {v.dtype for v in codes.values()} == {dtype}
    for name, v in codes.items():
        mine = compiled.graph.weights[name].weight.load()
        assert torch.equal(v.weight.load().view(torch.int8), mine.view(torch.int8))
    held = load_file(tmp_path / "saved" / "weights.safetensors")
    assert sum(held[n].nbytes for n in codes) == sum(v.type.nbytes for v in codes.values())


def test_packed_weights_of_another_size_are_refused(mlp, tmp_path):
    moec.compile(mlp, backend="reference", quantize="int4").save(tmp_path / "saved")
    path = tmp_path / "saved" / "weights.safetensors"
    held = load_file(path)
    name = next(n for n in held if n.endswith("codes"))
    held[name] = torch.cat([held[name], held[name][:1]])
    save_file(held, path)
    _sign(tmp_path / "saved", path)
    with pytest.raises(ArtifactError, match=rf"weight '{name}' is u8\[\d+\], forward.ir expects u8\[\d+\]"):
        moec.load(tmp_path / "saved")


def _sign(folder: Path, path: Path) -> None:
    """Give the manifest the digest of a file that was changed."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": digest_file(path)}
    manifest["sha256"] = manifest_digest({k: v for k, v in manifest.items() if k != "sha256"})
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def saved_lm(compiled_lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm") / "saved"
    compiled_lm.save(folder)
    return folder


def test_a_language_model_comes_back_whole(compiled_lm, saved_lm):
    loaded = moec.load(saved_lm)
    ids = torch.arange(8).reshape(2, 4)
    assert torch.equal(loaded(ids), compiled_lm(ids))
    assert torch.equal(loaded.generate(PROMPT, max_new_tokens=5), compiled_lm.generate(PROMPT, max_new_tokens=5))
    assert sorted(loaded.report.to_dict()["programs"]) == ["cached", "forward"]


def test_shared_weights_are_stored_once(compiled_lm, saved_lm):
    from safetensors import safe_open

    programs = (compiled_lm.program, compiled_lm.generator.program)
    with safe_open(saved_lm / "weights.safetensors", framework="pt") as f:
        stored = sum(f.get_tensor(k).nbytes for k in f.keys())  # noqa: SIM118
    needed = [sum(v.type.nbytes for v in p.graph.weights.values()) for p in programs]
    assert max(needed) <= stored < sum(needed)


def test_no_program_is_a_pickle(saved_lm):
    assert {p.suffix for p in saved_lm.rglob("*") if p.is_file()} <= {".json", ".safetensors", ".ir", ".onnx", ".data"}


@pytest.fixture
def saved(mlp, tmp_path):
    moec.compile(mlp, backend="onnxruntime", threads=1).save(tmp_path / "saved")
    return tmp_path / "saved"


def edit(folder: Path, change) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    data["sha256"] = manifest_digest(data)
    path.write_text(json.dumps(data))


def resign(folder: Path, name: str) -> None:
    """Make the manifest agree with a changed file, as someone who crafts a folder would."""

    def change(data):
        path = folder / name
        data["files"][name] = {"bytes": path.stat().st_size, "sha256": digest_file(path)}

    edit(folder, change)


FIELDS = ["format", "kind", "backend", "threads", "fallback", "signature", "programs", "files", "name"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_named(saved, field):
    edit(saved, lambda d: d.pop(field))
    with pytest.raises(ArtifactError, match=f"manifest.json.*{field}"):
        moec.load(saved)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["format"], 99), (["format"], "1"), (["kind"], "zip"), (["backend"], "tvm"), (["backend"], 3),
        (["fallback"], "eager"), (["threads"], -1), (["threads"], "two"), (["programs"], {}), (["programs"], []),
        (["programs"], {"other": {}}), (["files"], []), (["files", "forward.ir", "sha256"], "0" * 64),
        (["files", "forward.ir", "bytes"], 1), (["files", "forward.ir"], None), (["name"], None),
        (["programs", "forward", "legal_sha256"], "0" * 64), (["programs", "forward", "weights"], {"up": "nothing"}),
        (["programs", "forward", "weights"], {"up": "down"}), (["signature"], []), (["signature", "in_spec"], []),
        (["signature", "out_spec"], [1, {"type": "os.system", "context": "null", "children_spec": []}]),
        (["signature", "input_names"], ["x"]), (["signature", "outputs"], [["tensor", 7], ["tensor", 0]]),
        (["signature", "outputs"], [["run", 0], ["tensor", 0]]), (["signature", "constants"], {"0": []}),
        (["signature", "bounds"], {"T": "wide"}),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(saved, path, value):
    def change(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    edit(saved, change)
    with pytest.raises(ArtifactError) as caught:
        moec.load(saved)
    text = str(caught.value)
    assert str(saved) in text
    assert any(word in text for word in (path[0], path[-1], "SHA-256", "bytes", "weight")), text


@pytest.mark.parametrize("name", ["manifest.json", "forward.ir", "weights.safetensors", "forward/model.onnx"])
def test_missing_and_damaged_files_are_named(saved, name):
    path = saved / name
    original = path.read_bytes()
    for damaged in (original[: len(original) // 2], b"", bytes([original[0] ^ 1]) + original[1:]):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=path.name):
            moec.load(saved)
    path.unlink()
    with pytest.raises(ArtifactError, match=path.name):
        moec.load(saved)


def test_a_crafted_graph_is_refused(saved):
    path = saved / "forward.ir"
    good = path.read_text()
    for bad in (good.replace("norm.rms", "os.system"), good.replace("f32[T, 32]", "f32[T, 33]"), "", "graph("):
        path.write_text(bad)
        resign(saved, "forward.ir")
        with pytest.raises(ArtifactError, match=r"forward\.ir"):
            moec.load(saved)


def test_weights_of_another_type_are_refused(saved):
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved / "weights.safetensors")
    save_file({**tensors, "up": tensors["up"].double()}, saved / "weights.safetensors")
    resign(saved, "weights.safetensors")
    with pytest.raises(ArtifactError, match=r"up.*f64.*f32"):
        moec.load(saved)
    save_file({k: v for k, v in tensors.items() if k != "up"}, saved / "weights.safetensors")
    resign(saved, "weights.safetensors")
    with pytest.raises(ArtifactError, match=r"up.*missing"):
        moec.load(saved)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "forward/../../secret", "", "a\\..\\b"])
def test_paths_that_lead_out_are_refused(saved, name):
    (saved.parent / "secret").write_text("x")
    edit(saved, lambda d: d["files"].__setitem__(name, {"bytes": 1, "sha256": "x"}))
    with pytest.raises(ArtifactError, match=r"leads out|missing"):
        moec.load(saved)


@pytest.mark.parametrize("kind", ["symlink", "hardlink", "fifo", "folder link", "unlisted"])
def test_links_and_strangers_are_refused(saved, kind):
    path, aside = saved / "forward.ir", saved.parent / "aside.ir"
    if kind == "folder link":
        shutil.move(saved / "forward", saved.parent / "aside")
        (saved / "forward").symlink_to(saved.parent / "aside", target_is_directory=True)
    elif kind == "unlisted":
        (saved / "forward" / "extra.onnx").write_bytes(b"x")
    else:
        shutil.move(path, aside)
        if kind == "symlink":
            path.symlink_to(aside)
        elif kind == "hardlink":
            os.link(aside, path)
        else:
            os.mkfifo(path)
    with pytest.raises(ArtifactError, match=r"link|must be|not listed"):
        moec.load(saved)


def test_foreign_folders_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="is not a folder"):
        moec.load(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        moec.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"kind": "other"}')
    with pytest.raises(ArtifactError, match="kind"):
        moec.load(tmp_path)
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match="JSON"):
        moec.load(tmp_path)


def test_saving_replaces_only_what_save_wrote(mlp, mlp_args, tmp_path):
    compiled = moec.compile(mlp, backend="reference")
    for empty in (tmp_path / "empty", tmp_path / "new" / "deep"):
        if empty.name == "empty":
            empty.mkdir()
        compiled.save(empty)
        compiled.save(empty)
        assert torch.equal(moec.load(empty)(*mlp_args)[0], compiled(*mlp_args)[0])
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="not empty and holds no saved model"):
        compiled.save(other)
    assert [p.name for p in other.iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(other)
    for target in ("file", "link"):
        with pytest.raises(ArtifactError, match="is no folder"):
            compiled.save(tmp_path / target)


@pytest.mark.parametrize("point", ["save_file", "digest_file", "_sync", "exchange", "os.replace", "executable"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), RuntimeError("boom")])
def test_a_failing_save_leaves_what_was_there(mlp, mlp_args, tmp_path, monkeypatch, point, error):
    compiled = moec.compile(mlp, backend="reference")
    compiled.save(tmp_path / "old")
    before = {p: p.read_bytes() for p in (tmp_path / "old").rglob("*") if p.is_file()}

    def fail(*args, **kwargs):
        raise error

    if point == "executable":
        monkeypatch.setattr(compiled.program.executable, "save", fail, raising=False)
    elif point == "os.replace":
        calls = []

        def second(*args):
            calls.append(args)
            if len(calls) == 2:
                raise error
            return real(*args)

        real = os.replace
        monkeypatch.setattr(saving, "exchange", lambda a, b: False)  # as on other systems
        monkeypatch.setattr(saving.os, "replace", second)
    else:
        monkeypatch.setattr(saving, point, fail)
    with pytest.raises(ArtifactError if isinstance(error, OSError) else type(error)):
        compiled.save(tmp_path / "old")
    if point not in ("os.replace", "exchange"):
        with pytest.raises(ArtifactError if isinstance(error, OSError) else type(error)):
            compiled.save(tmp_path / "new")
        assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    assert {p: p.read_bytes() for p in (tmp_path / "old").rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert torch.equal(moec.load(tmp_path / "old")(*mlp_args)[0], compiled(*mlp_args)[0])


def test_what_cannot_be_saved_says_so(tmp_path):
    from typing import NamedTuple

    class Result(NamedTuple):
        y: torch.Tensor

    class Model(torch.nn.Module):
        def forward(self, x):
            return Result(x + 1)

    compiled = moec.compile(Model(), (torch.ones(2),), backend="reference")
    assert compiled(torch.ones(2)).y[0] == 2
    with pytest.raises(CompileError, match="cannot be saved"):
        compiled.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_result_class_of_transformers_comes_back(tmp_path):
    from transformers import modeling_outputs as outputs

    class Model(torch.nn.Module):
        def forward(self, x):
            return outputs.CausalLMOutputWithPast(logits=x * 2)

    moec.compile(Model(), (torch.ones(2, 3),), backend="reference").save(tmp_path / "saved")
    code = f"import moec, torch; print(type(moec.load({str(tmp_path / 'saved')!r})(torch.ones(2, 3))).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "CausalLMOutputWithPast", done.stderr
