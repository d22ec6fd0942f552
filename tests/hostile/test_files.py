"""Files that lie, lead elsewhere, block, change while they are read, or end where they should not."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moec
from moec import artifact, files
from moec.files import digest_file, manifest_digest
from moec.graph_file import load_graph, save_graph
from moec.ir import ArtifactError, CompileError

from .effects import harmless, refused
from .limits import limited

MLP = """graph(%x: f32[T, 8], %n: i64[T]) -> (%y: f32[T, 8], %m: i64[T]) {
  weight @up: f32[16, 8]
  weight @down: f32[8, 16]
  %0: f32[T, 16] = linear.linear(%x, @up)
  %1: f32[T, 16] = math.silu(%0)
  %2: f32[T, 8] = linear.linear(%1, @down)
  return %2, %n
}
"""


def model() -> moec.Graph:
    graph = moec.parse(MLP)
    g = torch.Generator().manual_seed(0)
    graph.bind_weights({"up": torch.randn(16, 8, generator=g), "down": torch.randn(8, 16, generator=g)})
    return graph


INPUTS = (torch.linspace(-1, 1, 24).reshape(3, 8), torch.arange(3))


def saved(folder: Path, backend: str = "onnxruntime") -> torch.Tensor:
    """A model in `folder`; its first result."""
    compiled = moec.compile(model(), backend=backend, threads=1)
    compiled.save(folder)
    return compiled(*INPUTS)[0]


def tree(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below, with its contents."""
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else ""
        for p in sorted(folder.rglob("*"))
    }


def sign(folder: Path, *names: str) -> None:
    """Make the manifest agree with changed files, as who crafts a folder would."""
    data = json.loads((folder / "manifest.json").read_text())
    for name in names:
        path = folder / name
        data["files"][name] = {"bytes": path.stat().st_size, "sha256": digest_file(path)}
    write(folder, data)


def write(folder: Path, data: dict) -> None:
    data["sha256"] = manifest_digest(data)
    (folder / "manifest.json").write_text(json.dumps(data))


NAMES = ["manifest.json", "forward.ir", "weights.safetensors", "forward/model.onnx", "forward/onnxruntime.json"]


# -- names and kinds of files ---------------------------------------------------------------------


@limited(wall=60)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file_of_its_own(name, tmp_path):
    folder, aside = tmp_path / "saved", tmp_path / "aside"
    saved(folder)
    path = folder / name
    path.rename(aside)
    before = tree(tmp_path)
    for make, undo in (
        (lambda: path.symlink_to(aside), path.unlink),
        (lambda: path.symlink_to("/etc/hostname"), path.unlink),
        (lambda: path.symlink_to(path), path.unlink),
        (lambda: os.link(aside, path), path.unlink),
        (lambda: os.mkfifo(path), path.unlink),
        (lambda: path.symlink_to("/dev/zero"), path.unlink),
        (lambda: path.symlink_to("/dev/stdin"), path.unlink),
        (path.mkdir, path.rmdir),
        (lambda: None, lambda: None),
    ):
        make()
        with refused(f"{path.name}.*(link|must be|missing)", ArtifactError):
            moec.load(folder)
        undo()
    assert tree(tmp_path) == before
    with contextlib.suppress(PermissionError):  # only root makes devices
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))
        with refused("must be", ArtifactError):
            moec.load(folder)


@limited()
def test_folders_that_are_links_and_strangers(tmp_path):
    folder = tmp_path / "saved"
    saved(folder)
    (folder / "forward").rename(tmp_path / "aside")
    (folder / "forward").symlink_to(tmp_path / "aside", target_is_directory=True)
    with refused("forward.*must be a file, not a link", ArtifactError):
        moec.load(folder)
    (folder / "forward").unlink()
    (tmp_path / "aside").rename(folder / "forward")
    for make in (
        lambda p: p.write_bytes(b"x"), lambda p: p.symlink_to("/etc"), lambda p: os.mkfifo(p),
        lambda p: p.symlink_to("nowhere"),
    ):  # fmt: skip
        for stranger in (folder / "more", folder / "forward" / "more"):
            make(stranger)
            with refused("more is not listed", ArtifactError):
                moec.load(folder)
            stranger.unlink()
    deep = folder
    for _ in range(200):
        deep = deep / "d"
        deep.mkdir()
    with refused("too many folders in folders", ArtifactError):
        moec.load(folder)


@limited()
@pytest.mark.parametrize(
    "name",
    [
        "../secret", "/etc/hostname", "forward/../../secret", "forward/..", "..", ".", "", "/", "./forward.ir",
        "forward//model.onnx", "forward/", "a\\..\\b", "C:\\secret", "C:secret", "a\nb", "a\0b", "\ud800", "a" * 5000,
        "a/" * 3000 + "b", "nowhere", "forward.ir/x", "~/secret", "$HOME/secret", "file:///etc/passwd", "CON", "a\rb",
    ],
)  # fmt: skip
def test_names_in_a_manifest(name, tmp_path):
    folder = tmp_path / "saved"
    saved(folder, "reference")
    (tmp_path / "secret").write_text("x")
    data = json.loads((folder / "manifest.json").read_text())
    data["files"][name] = {"bytes": 1, "sha256": digest_file(tmp_path / "secret")}
    write(folder, data)
    with refused("leads out|missing|must be a file", ArtifactError):
        moec.load(folder)


@limited()
def test_names_of_folders(tmp_path):
    for name in ("nowhere", "a\0b", "a" * 5000, "\ud800"):
        with refused("is not a folder", ArtifactError):
            moec.load(tmp_path / name)
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "fifo")
    for name in ("file", "fifo"):
        with refused("is not a folder", ArtifactError):
            moec.load(tmp_path / name)
    compiled = moec.compile(model(), backend="reference")
    for name in ("a\0b", "a" * 5000, "file/x"):
        with pytest.raises(ArtifactError, match=r"cannot write|is no folder|exists"):
            compiled.save(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fifo", "file"]
    with refused("exists and is no folder", ArtifactError):
        compiled.save(tmp_path / "fifo")


# -- what changes while it is read ----------------------------------------------------------------


@limited(seconds=60)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["other contents", "link", "fifo", "gone", "in place"])
def test_a_file_replaced_between_check_and_open(name, how, tmp_path):
    """Whichever call the change comes after: the saved model, or an error; never the other contents."""
    want = saved(tmp_path / "saved")
    (tmp_path / "evil").mkdir()
    evil = model()
    evil.bind_weights({"up": torch.ones(16, 8)})
    moec.compile(evil, backend="onnxruntime", threads=1).save(tmp_path / "evil" / "saved")
    calls = ("_open", "opened", "size", "digest", "read", "names")
    tried = 0
    for call in calls:
        for when in (1, 2, 3, 5, 8):
            shutil.rmtree(tmp_path / "now", ignore_errors=True)
            shutil.copytree(tmp_path / "saved", tmp_path / "now")
            done = _swap_after(call, when, tmp_path / "now" / name, tmp_path / "evil" / "saved" / name, how)
            try:
                with contextlib.suppress(ArtifactError):
                    loaded = moec.load(tmp_path / "now")
                    torch.testing.assert_close(loaded(*INPUTS)[0], want, rtol=0, atol=0)
            finally:
                tried += done()
    assert tried > 5


def _swap_after(call: str, when: int, path: Path, other: Path, how: str):
    """Change `path` when the method of Folder returns for the `when`th time. Gives a function that undoes the patch and
    says whether that happened."""
    original = getattr(files.Folder, call)
    count = 0

    def wrapped(self, *args):
        nonlocal count
        result = original(self, *args)
        count += 1
        if count == when:
            if how == "in place":
                path.write_bytes(other.read_bytes())
            else:
                path.unlink()
            if how == "other contents":
                shutil.copy(other, path)
            elif how == "link":
                path.symlink_to(other)
            elif how == "fifo":
                os.mkfifo(path)
        return result

    setattr(files.Folder, call, wrapped)

    def undo() -> bool:
        setattr(files.Folder, call, original)
        return count >= when

    return undo


@limited()
@pytest.mark.parametrize("backend", ["reference", "onnxruntime"])
def test_a_loaded_model_stays_what_it_is(backend, tmp_path):
    """Weights are read when they are needed: another model that is saved there later does not change them."""
    want = saved(tmp_path / "saved", backend)
    loaded = moec.load(tmp_path / "saved")
    other = model()
    other.bind_weights({"up": torch.ones(16, 8), "down": torch.ones(8, 16)})
    moec.compile(other, backend=backend, threads=1).save(tmp_path / "saved")
    assert torch.equal(loaded(*INPUTS)[0], want)
    assert not torch.equal(moec.load(tmp_path / "saved")(*INPUTS)[0], want)
    loaded.save(tmp_path / "saved")  # and over what it was read from
    assert torch.equal(moec.load(tmp_path / "saved")(*INPUTS)[0], want)
    shutil.rmtree(tmp_path / "saved")
    assert torch.equal(loaded(*INPUTS)[0], want)


SAVE = """
import sys, torch, moec
sys.path.append(sys.argv[3])
from tests.hostile.test_files import INPUTS, model
graph = model()
graph.bind_weights({"up": torch.full((16, 8), float(sys.argv[2])), "down": torch.ones(8, 16)})
compiled = moec.compile(graph, backend="reference", threads=1)
for _ in range(12):
    compiled.save(sys.argv[1])
"""


@limited(memory=4 << 30, seconds=120)
def test_several_processes_save_and_load_one_folder(tmp_path):
    """Every load gives one of the models, whole; nothing but the folder is left."""
    folder = tmp_path / "saved"
    saved(folder, "reference")
    root = str(Path(__file__).parents[2])
    writers = [
        subprocess.Popen([sys.executable, "-c", SAVE, str(folder), str(i), root], stderr=subprocess.PIPE, text=True)
        for i in range(3)
    ]
    loads, seen = 0, set()
    while any(w.poll() is None for w in writers):
        loaded = moec.load(folder)
        ups = loaded.graph.weights["up"].weight.load()
        if loads:  # the first may be the model from before
            seen.add(float(ups[0, 0]))
            assert (ups == ups[0, 0]).all() or torch.equal(ups, model().weights["up"].weight.load())
        loads += 1
    for w in writers:
        _, said = w.communicate()
        assert w.returncode == 0, said
    assert float(moec.load(folder).graph.weights["up"].weight.load()[0, 0]) in (0.0, 1.0, 2.0)
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    assert loads > 3


@limited()
def test_a_stranger_in_the_way_is_put_back(tmp_path):
    """What comes to the target while a model is written, and is no model, stays."""
    compiled = moec.compile(model(), backend="reference")
    folder = tmp_path / "saved"
    write_all = artifact._write

    def late(*args):
        write_all(*args)
        folder.mkdir()
        (folder / "thesis.txt").write_text("years of work")

    artifact._write = late
    try:
        with pytest.raises(ArtifactError, match="saved is not empty and holds no saved model"):
            compiled.save(folder)
    finally:
        artifact._write = write_all
    assert tree(tmp_path) == {"saved": "", "saved/thesis.txt": b"years of work"}


# -- manifests ------------------------------------------------------------------------------------


@limited()
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "no JSON"), (b"\xff\xfe{}", "no JSON"), (b"[" * 1_000_000, "nested too deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
        (b"null", "kind"), (b"[]", "kind"), (b"{}", "kind"),
        (b'{"kind": "moec", "kind": "moec"}', "'kind' twice"), (b'{"kind": "moec", "format": NaN}', "NaN is no number"),
        (b'{"kind": "moec", "format": -Infinity}', "no number"), (b'{"kind": "moec", "format": 1.0}', "an integer"),
        (b'{"kind": "moec", "format": true}', "an integer"),
        (b'{"kind": "moec", "format": ' + b"9" * 9999 + b"}", "no JSON"),
        (b'{"kind": "moec"}', "'format' is missing"), (b'{"kind": "moec", "format": 1}', "'sha256' is missing"),
        (b'{"kind": "moec", "format": 1, "sha256": "0"}', "sha256"), (pickle.dumps({"kind": "moec"}), "no JSON"),
        (b'{"kind": "moec"}\0', "no JSON"), (b'\xef\xbb\xbf{"kind": "moec"}', "no JSON"),
    ],
    ids=lambda v: "" if isinstance(v, str) else repr(v[:24]),
)  # fmt: skip
def test_manifests(text, said, tmp_path):
    saved(tmp_path / "saved", "reference")
    (tmp_path / "saved" / "manifest.json").write_bytes(text)
    with refused(said, ArtifactError):
        moec.load(tmp_path / "saved")


@limited()
@pytest.mark.parametrize("name", ["manifest.json", "forward.ir"])
def test_files_that_are_huge(name, tmp_path):
    """A sparse gigabyte is refused by its size, before it is read."""
    saved(tmp_path / "saved", "reference")
    with (tmp_path / "saved" / name).open("r+b") as f:
        f.truncate(1 << 30)
    if name != "manifest.json":
        data = json.loads((tmp_path / "saved" / "manifest.json").read_text())
        data["files"][name]["bytes"] = 1 << 30
        write(tmp_path / "saved", data)
    with refused("1073741824 bytes, more than", ArtifactError):
        moec.load(tmp_path / "saved")


@limited()
def test_a_manifest_as_long_as_it_may_be_stays_within_memory(tmp_path):
    saved(tmp_path / "saved", "reference")
    for filler in (b"[" + b"[]," * ((files.MANIFEST_LIMIT - 8) // 3) + b"[]]", b'"' + b"a" * (15 << 20) + b'"'):
        (tmp_path / "saved" / "manifest.json").write_bytes(filler[: files.MANIFEST_LIMIT])
        with refused("kind|no JSON", ArtifactError):
            moec.load(tmp_path / "saved")


def mutate(value: object, r: random.Random) -> object:
    """The same JSON with one thing changed somewhere."""
    strange = [
        None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.0, "", "x", "../x", "\0", "\ud800", [], {}, [[]],
        {"": {}}, "forward", "os.system", [None] * 9, "9" * 99,
    ]  # fmt: skip
    if isinstance(value, dict) and value and r.random() < 0.85:
        key = r.choice(sorted(value))
        what = r.random()
        if what < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if what < 0.15:
            return {**value, r.choice(["x", "", "../x", "format"]): r.choice(strange)}
        return {**value, key: mutate(value[key], r)}
    if isinstance(value, list) and value and r.random() < 0.85:
        i = r.randrange(len(value))
        what = r.random()
        if what < 0.1:
            return value[:i] + value[i + 1 :]
        if what < 0.2:
            return [*value, value[i]]
        return [*value[:i], mutate(value[i], r), *value[i + 1 :]]
    if isinstance(value, str) and value.startswith(("{", "[")) and r.random() < 0.7:
        with contextlib.suppress(ValueError):
            return json.dumps(mutate(json.loads(value), r))
    return r.choice(strange)


class Nested(torch.nn.Module):
    """Arguments and results of every container that a signature keeps."""

    def forward(self, x, more, *, scale=2.0):
        return {"y": x * scale + more["a"][0], "rest": [more["a"][1], (x.shape[0], None)]}


@limited(seconds=100)
@pytest.mark.parametrize("signed", [True, False])
def test_manifests_with_anything_changed(signed, tmp_path):
    """Hundreds of random changes, by accident and by someone who signs them: an ArtifactError, or a model. Unsigned it
    computes the same; signed, it runs or says why not."""
    folder = tmp_path / "saved"
    x = torch.ones(2, 3)
    args, kwargs = (x, {"a": (x, x + 1)}), {"scale": 3.0}
    compiled = moec.compile(Nested(), args, kwargs, backend="reference")
    compiled.save(folder)
    want = compiled(*args, **kwargs)
    original = (folder / "manifest.json").read_text()
    r = random.Random(7)
    loads, said = 0, set()
    for _ in range(400):
        data = mutate(json.loads(original), r)
        if signed and isinstance(data, dict):
            data["sha256"] = manifest_digest(data)
        (folder / "manifest.json").write_text(json.dumps(data))
        try:
            with harmless():
                loaded = moec.load(folder)
        except ArtifactError as e:
            said.add(str(e))
            continue
        loads += 1
        if signed:
            with contextlib.suppress(CompileError):
                loaded(*args, **kwargs)
        else:
            got = loaded(*args, **kwargs)
            assert torch.equal(got["y"], want["y"])
            assert torch.equal(got["rest"][0], want["rest"][0])
            assert got["rest"][1] == want["rest"][1]
    assert loads > 3 or not signed
    assert all(str(folder) in text and len(text) < 4000 for text in said)


CANARY = """
import pathlib
pathlib.Path(__file__).with_name("executed").write_text("yes")
class Evil: pass
factory = lambda: None
"""


@limited()
def test_a_signature_cannot_name_code_to_run(tmp_path):
    """pytree's own reader imports the modules of enumerations and of a defaultdict's factory."""
    folder = tmp_path / "saved"
    saved(folder, "reference")
    (tmp_path / "canary_of_moec.py").write_text(CANARY)
    (tmp_path / "transformers").mkdir()
    sys.path.insert(0, str(tmp_path))
    leaf = {"type": None, "context": None, "children_spec": []}
    enum = json.dumps([{"__enum__": True, "fqn": "canary_of_moec:Evil", "name": "x"}])
    factory = {"default_factory_module": "canary_of_moec", "default_factory_name": "factory", "dict_context": ["a"]}
    system = {**factory, "default_factory_module": "os", "default_factory_name": "system"}
    for kind, context in (
        ("collections.defaultdict", factory), ("collections.defaultdict", system), ("builtins.dict", enum),
        ("collections.OrderedDict", enum), ("collections.deque", enum[1:-1]), ("builtins.list", enum),
        ("canary_of_moec.Evil", "null"), ("os.system", "null"), ("transformers.canary.Evil", "null"),
        ("transformers.models.canary_of_moec.modeling_x.Evil", "null"),
        ("collections.namedtuple", "canary_of_moec.Evil"),
    ):  # fmt: skip
        for spec in ("in_spec", "out_spec"):
            data = json.loads((folder / "manifest.json").read_text())
            node = {"type": kind, "context": context, "children_spec": [leaf]}
            good = data["signature"][spec]
            data["signature"][spec] = [1, {"type": "builtins.tuple", "context": "null", "children_spec": [node, leaf]}]
            write(folder, data)
            with refused("signature", ArtifactError):
                moec.load(folder)
            data["signature"][spec] = good
            write(folder, data)
    assert "canary_of_moec" not in sys.modules
    assert not (tmp_path / "executed").exists()
    moec.load(folder)


# -- contents -------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@limited()
def test_pickles_are_never_read(tmp_path):
    folder, fired = tmp_path / "saved", tmp_path / "fired"
    saved(folder)
    torch.save({"up": Bomb(fired)}, tmp_path / "bomb.pt")
    for name in NAMES:
        for content in (pickle.dumps(Bomb(fired)), (tmp_path / "bomb.pt").read_bytes()):
            original = (folder / name).read_bytes()
            (folder / name).write_bytes(content)
            if name != "manifest.json":
                sign(folder, name)
            with refused(Path(name).name, ArtifactError):
                moec.load(folder)
            (folder / name).write_bytes(original)
            if name != "manifest.json":
                sign(folder, name)
    for suffix in (".ir", ".onnx", ".pt2", ".pt", ".safetensors", ".json"):
        path = tmp_path / f"model{suffix}"
        path.write_bytes(pickle.dumps(Bomb(fired)))
        for use in (load_graph, moec.compile, moec.load):
            with pytest.raises(CompileError):
                use(path)
            with pytest.raises(CompileError):
                use(str(path))
    assert not fired.exists()


def header(data: bytes, size: int | None = None, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(data) if size is None else size) + data + body


def tensors(**fields: object) -> bytes:
    return json.dumps(fields).encode()


GOOD = {"dtype": "F32", "shape": [16, 8], "data_offsets": [0, 512]}
WEIGHTS = [
    b"", b"\0" * 7, header(b""), header(b"{}"), header(b"{}", 2**63), header(b"{}", 2**64 - 1),
    header(b"{}", 100_000_000), header(b"{}", 99_999_999), header(b"[" * 10_000), header(b"{" * 10_000),
    header(b'{"up":' * 5000), header(b"\xff" * 8),
    header(tensors(up=GOOD, down={**GOOD, "shape": [8, 16], "data_offsets": [512, 1024]}), body=b"\0" * 1000),
    header(tensors(up=GOOD, down={**GOOD, "shape": [8, 16], "data_offsets": [0, 512]}), body=b"\0" * 512),
    header(tensors(up=GOOD, down={**GOOD, "shape": [8, 16], "data_offsets": [256, 768]}), body=b"\0" * 768),
    header(tensors(up=GOOD, down={**GOOD, "shape": [8, 16], "data_offsets": [1024, 1536]}), body=b"\0" * 1536),
    header(tensors(up=GOOD, down={**GOOD, "shape": [8, 16], "data_offsets": [512, 1024]}), body=b"\0" * 2048),
    header(tensors(up={**GOOD, "shape": [2**62, 2**62]}), body=b"\0" * 512),
    header(tensors(up={**GOOD, "shape": [2**64 + 16, 8]}), body=b"\0" * 512),
    header(tensors(up={**GOOD, "shape": [-16, -8]}), body=b"\0" * 512),
    header(tensors(up={**GOOD, "shape": [16, 9]}), body=b"\0" * 512),
    header(tensors(up={**GOOD, "data_offsets": [512, 0]}), body=b"\0" * 512),
    header(tensors(up={**GOOD, "data_offsets": [0, 2**63]}), body=b"\0" * 512),
    header(tensors(up={**GOOD, "dtype": "F31"}), body=b"\0" * 512),
    header(tensors(up={"dtype": "U16", "shape": [16, 16], "data_offsets": [0, 512]}), body=b"\0" * 512),
    header(tensors(up={"dtype": "F8_E8M0", "shape": [512], "data_offsets": [0, 512]}), body=b"\0" * 512),
    header(tensors(up=GOOD, __metadata__={"a": 1}), body=b"\0" * 512), header(tensors(up=None)), header(tensors(up=[])),
    header(b'{"up":' + json.dumps(GOOD).encode() + b',"up":' + json.dumps(GOOD).encode() + b"}", body=b"\0" * 512),
    header(tensors(**{"../up": GOOD}), body=b"\0" * 512),
]  # fmt: skip


@limited()
def test_weights_that_lie(tmp_path):
    folder = tmp_path / "saved"
    saved(folder)
    save_graph(model(), tmp_path / "model.ir", INPUTS)
    for i, content in enumerate(WEIGHTS):
        (folder / "weights.safetensors").write_bytes(content)
        sign(folder, "weights.safetensors")
        with refused("weights.safetensors", ArtifactError):
            moec.load(folder)
        if i in (0, 1, 2) or len(content) < 600:
            (tmp_path / "model.safetensors").write_bytes(content)
            with contextlib.suppress(CompileError):
                load_graph(tmp_path / "model.ir")


@limited()
def test_a_header_of_a_hundred_megabytes(tmp_path):
    """As long as the library takes, all of it entries: within the limits, whatever it says."""
    folder = tmp_path / "saved"
    saved(folder)
    entry = json.dumps({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
    rows = ",".join(f'"t{i}":{entry}' for i in range(90_000_000 // (len(entry) + 12) // 8))
    text = b"{" + rows.encode() + b"}"
    (folder / "weights.safetensors").write_bytes(header(text.ljust(99_999_992)))
    sign(folder, "weights.safetensors")
    with refused("weights.safetensors", ArtifactError):
        moec.load(folder)


@limited(seconds=60)
def test_every_byte_of_a_folder(tmp_path):
    """Files damaged at random and signed: an ArtifactError, or a model that runs or says why not."""
    folder = tmp_path / "saved"
    saved(folder)
    r = random.Random(3)
    names = [n for n in tree(folder) if (folder / n).is_file() and n != "manifest.json"]
    for name in names:
        original = (folder / name).read_bytes()
        for _ in range(40):
            data = bytearray(original)
            for _ in range(r.choice((1, 1, 2, 8))):
                at = r.randrange(min(len(data), 2000))
                what = r.random()
                if what < 0.6:
                    data[at] = r.randrange(256)
                elif what < 0.8:
                    del data[at : at + r.choice((1, 4, 100))]
                else:
                    data[at:at] = bytes(r.randrange(256) for _ in range(r.choice((1, 8))))
                if not data:
                    break
            (folder / name).write_bytes(bytes(data))
            sign(folder, name)
            try:
                with harmless():
                    loaded = moec.load(folder)
            except ArtifactError:
                continue
            with contextlib.suppress(CompileError):
                loaded(*INPUTS)
        (folder / name).write_bytes(original)
        sign(folder, name)
    moec.load(folder)


# -- files on the command line --------------------------------------------------------------------


@limited(wall=60)
def test_graph_files(tmp_path):
    save_graph(model(), tmp_path / "good.ir", INPUTS)
    graph, inputs = load_graph(tmp_path / "good.ir")
    assert graph == model()
    assert len(inputs) == 2
    os.mkfifo(tmp_path / "fifo.ir")
    (tmp_path / "zero.ir").symlink_to("/dev/zero")
    (tmp_path / "folder.ir").mkdir()
    (tmp_path / "huge.ir").touch()
    os.truncate(tmp_path / "huge.ir", 1 << 40)
    (tmp_path / "latin.ir").write_bytes(MLP.replace("up", "\u00fc").encode("latin-1"))
    for name, said in (
        ("fifo.ir", "no regular file"), ("zero.ir", "no regular file"), ("folder.ir", "no regular file|directory"),
        ("huge.ir", "more than"), ("latin.ir", "utf-8"), ("nowhere.ir", "No such file"), ("a\0b.ir", "null"),
        ("a" * 5000 + ".ir", "name too long"),
    ):  # fmt: skip
        with refused(f"cannot read.*({said})"):
            load_graph(tmp_path / name)
    beside, aside = tmp_path / "good.safetensors", tmp_path / "aside"
    beside.rename(aside)
    for make in (
        lambda: beside.symlink_to(aside), lambda: os.link(aside, beside), lambda: os.mkfifo(beside), beside.mkdir,
        lambda: beside.symlink_to("/dev/zero"),
    ):  # fmt: skip
        make()
        with refused("good.safetensors"):
            load_graph(tmp_path / "good.ir")
        if beside.is_dir() and not beside.is_symlink():
            beside.rmdir()
        else:
            beside.unlink()


@limited(wall=60)
def test_loads_for_placement(tmp_path):
    from typer.testing import CliRunner

    from moec.cli import app

    os.mkfifo(tmp_path / "fifo")
    contents = {
        "deep": b"[" * 200_000, "nan": b"[[NaN, 1]]", "inf": b"[[1e999, 1]]", "twice": b'{"a": 1, "a": 2}',
        "text": b'"x"',
        "null": b"null", "ragged": b"[[1, 2], [1]]", "strings": b'[["1", "2"]]', "empty": b"[]", "bin": b"\xff\xfe",
        "negative": b"[[-1, 1]]", "objects": b"[[{}, []]]", "scalar": b"1", "pickle": pickle.dumps([[1.0]]),
        "long": b"[[" + b"9" * 5000 + b"]]", "none": b"[[null, 1]]",
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 1 << 40)
    for name in (*contents, "fifo", "huge", "nowhere", "/dev/zero"):
        result = CliRunner().invoke(
            app, ["place", str(tmp_path / name), "--slots", "2", "--out", str(tmp_path / "out")]
        )
        assert isinstance(result.exception, CompileError), (name, result.exception, result.output)
        assert not (tmp_path / "out").exists()


# -- no room --------------------------------------------------------------------------------------


@limited(seconds=100)
def test_a_full_disk_while_saving(tmp_path):
    """At whichever byte writing ends, the model from before stays whole and nothing is left beside it."""
    folder = tmp_path / "saved"
    want = saved(folder)
    before = tree(tmp_path)
    os.environ["TMPDIR"] = str(tmp_path / "scratch")
    (tmp_path / "scratch").mkdir()
    compiled = moec.compile(model(), backend="onnxruntime", threads=1)
    largest = max(len(v) for v in before.values())
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in sorted({0, 1, 16, 100, *range(200, largest, 150), largest - 1}):
        for target in (folder, tmp_path / "new"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            try:
                with pytest.raises(ArtifactError, match="cannot write"):
                    compiled.save(target)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "scratch").iterdir()) == []
    (tmp_path / "scratch").rmdir()
    assert tree(tmp_path) == before
    assert torch.equal(moec.load(folder)(*INPUTS)[0], want)


@limited()
def test_no_room_for_graph_files_and_reports(tmp_path):
    compiled = moec.compile(model(), backend="reference")
    save_graph(model(), tmp_path / "g.ir", INPUTS)
    compiled.report.save(tmp_path / "r.html")
    before = tree(tmp_path)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for size in (0, 10, 300):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        for name in ("g.ir", "new.ir"):
            with pytest.raises(CompileError, match="cannot write"):
                save_graph(model(), tmp_path / name, INPUTS)
        for name in ("r.html", "new.json"):
            with pytest.raises(CompileError, match="cannot write"):
                compiled.report.save(tmp_path / name)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert tree(tmp_path) == before


@limited()
def test_a_save_that_is_killed_leaves_the_model(tmp_path):
    """There is a whole model under the name whenever the process ends."""
    folder = tmp_path / "saved"
    want = saved(folder, "reference")
    for delay in (0, 0.002, 0.005, 0.01, 0.02):
        child = os.fork()
        if child == 0:
            compiled = moec.compile(model(), backend="reference")
            while True:
                compiled.save(folder)
        time.sleep(0.3 + delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert torch.equal(moec.load(folder)(*INPUTS)[0], want)


@limited()
def test_threads_of_one_process(tmp_path):
    folder = tmp_path / "saved"
    want = saved(folder, "reference")
    compiled = moec.compile(model(), backend="reference")
    problems: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for _ in range(10):
                if i % 2:
                    compiled.save(folder)
                else:
                    assert torch.equal(moec.load(folder)(*INPUTS)[0], want)
        except BaseException as e:
            problems.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not problems
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    assert load_file(folder / "weights.safetensors").keys() == {"up", "down"}
    save_file({}, tmp_path / "empty")  # the library is as it was
