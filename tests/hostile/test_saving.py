"""Saves at the same time as others, onto a full disk, or killed: a whole model stays under the name."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moec
from moec import artifact, saving
from moec.graph_file import save_graph
from moec.ir import ArtifactError, CompileError

from .folders import INPUTS, model, saved, tree
from .limits import limited

SAVE = """
import sys, torch, moec
sys.path.append(sys.argv[3])
from tests.hostile.folders import INPUTS, model
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


@limited()
def test_the_model_there_is_replaced_while_it_is_looked_at(tmp_path):
    """A save looks at what it is to replace, while another one removes just that."""
    folder = tmp_path / "saved"
    want = saved(folder, "reference")
    compiled = moec.compile(model(), backend="reference")
    read, calls = saving.read_manifest, []

    def late(*args):
        calls.append(args)
        if len(calls) == 1:
            compiled.save(folder)
        return read(*args)

    saving.read_manifest = late
    try:
        compiled.save(folder)
    finally:
        saving.read_manifest = read
    assert len(calls) > 2
    assert torch.equal(moec.load(folder)(*INPUTS)[0], want)
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


@limited()
def test_a_model_is_replaced_whenever_it_is_read(tmp_path):
    """Reading starts over as often as another model has come meanwhile; one that goes away is an error."""
    folder = tmp_path / "saved"
    want = saved(folder, "reference")
    compiled = moec.compile(model(), backend="reference")
    check, calls = artifact._check_files, []

    def late(files, manifest):
        calls.append(files)
        if len(calls) <= 12:
            compiled.save(folder)
        check(files, manifest)

    artifact._check_files = late
    try:
        assert torch.equal(moec.load(folder)(*INPUTS)[0], want)
        assert len(calls) == 13
        artifact._check_files = lambda files, manifest: (folder.rename(tmp_path / "away"), check(files, manifest))
        with pytest.raises(ArtifactError, match="saved is not a folder"):
            moec.load(folder)
    finally:
        artifact._check_files = check


@limited()
def test_a_stranger_in_the_way_is_put_back(tmp_path):
    """What comes to the target while a model is written, and is no model, stays."""
    compiled = moec.compile(model(), backend="reference")
    folder = tmp_path / "saved"
    write_all = saving._write

    def late(*args):
        write_all(*args)
        folder.mkdir()
        (folder / "thesis.txt").write_text("years of work")

    saving._write = late
    try:
        with pytest.raises(ArtifactError, match="saved is not empty and holds no saved model"):
            compiled.save(folder)
    finally:
        saving._write = write_all
    assert tree(tmp_path) == {"saved": "", "saved/thesis.txt": b"years of work"}


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
