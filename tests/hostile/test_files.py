"""Files that are links, devices or folders, and names that lead elsewhere: in a saved model and on the command line."""

from __future__ import annotations

import contextlib
import json
import os
import pickle

import pytest

import moec
from moec.files import digest_file
from moec.graph_file import load_graph, save_graph
from moec.ir import ArtifactError, CompileError

from .effects import refused
from .folders import INPUTS, MLP, NAMES, model, saved, tree, write
from .limits import limited

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
