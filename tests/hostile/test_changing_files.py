"""Files of a saved model that change while it is read, and after it."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest
import torch

import moec
from moec import files
from moec.ir import ArtifactError

from .folders import INPUTS, NAMES, model, saved
from .limits import limited


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
