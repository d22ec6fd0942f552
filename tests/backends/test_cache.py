"""Entries on disk: whole or not at all, used only as they were written, whoever writes, alters or removes them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moec.backends.cache import MANIFEST, Cache, Unusable

KEY, OTHER = "a" * 64, "b" * 64


def put(cache: Cache, key: str = KEY, size: int = 1000) -> Path:
    with cache.writing(key) as folder:
        (folder / "small").write_text("text")
        (folder / "large").write_bytes(os.urandom(size))
    return cache.folder / key


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_what_was_written_is_found(cache: Cache):
    with pytest.raises(Unusable, match="there is none yet"):
        cache.find(KEY)
    put(cache)
    found = cache.find(KEY)
    assert sorted(p.name for p in found.iterdir()) == ["large", MANIFEST, "small"]
    assert (found / "small").read_text() == "text"
    assert [p.name for p in cache.folder.iterdir()] == [KEY]
    with pytest.raises(Unusable, match="there is none yet"):
        cache.find(OTHER)


def keep_times(path: Path, change: Callable[[Path], None]) -> None:
    info = path.stat()
    change(path)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def flip(path: Path) -> None:
    with path.open("r+b") as f:
        f.seek(500)
        (byte,) = f.read(1)
        f.seek(500)
        f.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("how", ["flip", "truncate", "extend", "remove", "empty", "copy"])
def test_altered_files(cache: Cache, how: str):
    """Also with the times put back; a copy with the same bytes is as good."""
    path = put(cache) / "large"
    time.sleep(0.02)  # the clock of file systems is coarse
    changes: dict[str, Callable[[Path], object]] = {
        "flip": flip,
        "truncate": lambda p: os.truncate(p, 999),
        "extend": lambda p: os.truncate(p, 1001),
        "remove": lambda p: p.unlink(),
        "empty": lambda p: p.write_bytes(b""),
        "copy": lambda p: (p.with_name("x").write_bytes(p.read_bytes()), p.with_name("x").rename(p)),
    }
    if how == "remove":
        path.unlink()
    else:
        keep_times(path, lambda p: changes[how](p) and None)
    if how == "copy":
        assert cache.find(KEY) == path.parent
        return
    with pytest.raises(Unusable, match="large"):
        cache.find(KEY)
    put(cache)  # over it
    cache.find(KEY)


@pytest.mark.parametrize("name", ["large", MANIFEST])
@pytest.mark.parametrize("how", ["symlink", "hardlink", "fifo", "folder"])
def test_files_that_are_not_plain(cache: Cache, name: str, how: str):
    path, moved = put(cache) / name, cache.folder.parent / "moved"
    path.rename(moved)
    if how == "symlink":
        path.symlink_to(moved)
    elif how == "hardlink":
        os.link(moved, path)
    elif how == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(Unusable, match=name):
        cache.find(KEY)


def test_an_entry_that_is_a_link(cache: Cache):
    entry = put(cache)
    entry.rename(cache.folder / "elsewhere")
    entry.symlink_to(cache.folder / "elsewhere")
    with pytest.raises(Unusable):
        cache.find(KEY)
    put(cache)
    assert not entry.is_symlink()


def test_files_that_are_not_listed(cache: Cache):
    (put(cache) / "more").write_text("")
    with pytest.raises(Unusable, match="more is not listed"):
        cache.find(KEY)


def test_an_entry_under_another_key(cache: Cache):
    put(cache).rename(cache.folder / OTHER)
    with pytest.raises(Unusable, match="another entry"):
        cache.find(OTHER)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"sha256": 1}', "\x00", "[" * 5000])
def test_damaged_manifests(cache: Cache, text: str):
    (put(cache) / MANIFEST).write_text(text)
    with pytest.raises(Unusable, match="damaged"):
        cache.find(KEY)


def test_a_manifest_that_was_edited(cache: Cache):
    path = put(cache) / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"]["large"]["bytes"] = 7
    path.write_text(json.dumps(manifest))
    with pytest.raises(Unusable, match="damaged"):
        cache.find(KEY)


def test_failing_leaves_nothing(cache: Cache):
    def fail() -> None:
        with cache.writing(KEY) as folder:
            (folder / "small").write_text("text")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert not list(cache.folder.iterdir())


WRITER = """
import os, sys, time
from pathlib import Path
from moec.backends.cache import Cache
cache, key, mode = Cache(Path(sys.argv[1])), "a" * 64, sys.argv[2]
for _ in range(20):
    with cache.writing(key) as folder:
        (folder / "large").write_bytes(os.urandom(1 << 16))
        if mode == "hang":
            print("writing", flush=True)
            time.sleep(60)
    cache.find(key)
"""


def writer(cache: Cache, mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(cache.folder), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_several_processes_write_at_once(cache: Cache):
    for process in [writer(cache, "go") for _ in range(3)]:
        assert process.communicate(timeout=120)[1] == ""
        assert process.returncode == 0
    cache.find(KEY)
    assert [p.name for p in cache.folder.iterdir()] == [KEY]


def test_files_go_while_entries_are_looked_through(cache: Cache, monkeypatch: pytest.MonkeyPatch):
    """Another process finishes, or removes, what this one has just listed."""
    put(cache)
    partial = cache.folder / f".{OTHER}.x.partial"
    partial.mkdir()
    for path in (partial, cache.folder / KEY):
        (path / "large").write_bytes(b"x")
    real = Path.lstat

    def late(path: Path):
        if path.name == "large" and path.parent in (partial, cache.folder / KEY):
            path.unlink()
        return real(path)

    monkeypatch.setattr(Path, "lstat", late)
    put(cache, OTHER)
    monkeypatch.undo()
    assert {p.name for p in cache.folder.iterdir()} == {KEY, OTHER, partial.name}


def test_killed_while_writing(cache: Cache):
    process = writer(cache, "hang")
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    (left,) = cache.folder.iterdir()
    with pytest.raises(Unusable, match="there is none yet"):
        cache.find(KEY)
    put(cache)
    assert left.exists()  # it may still be written, for all that others know
    for path in (*left.iterdir(), left):
        os.utime(path, (time.time() - 7200,) * 2)
    put(cache, OTHER)
    assert {p.name for p in cache.folder.iterdir()} == {KEY, OTHER}


def test_the_oldest_use_goes_first(tmp_path: Path):
    cache = Cache(tmp_path, limit=5000)
    keys = [c * 64 for c in "0123"]
    for i, key in enumerate(keys[:3]):
        put(cache, key)
        os.utime(tmp_path / key, (1e9 + i,) * 2)
    cache.find(keys[0])
    put(cache, keys[3])
    assert {p.name for p in tmp_path.iterdir()} == {keys[0], keys[2], keys[3]}
    put(cache, keys[1], size=10_000)  # larger than all that may be
    assert {p.name for p in tmp_path.iterdir()} == {keys[1]}
