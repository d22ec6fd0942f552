"""Entries of files on disk, found by what they were made of.

    <folder>/<key>/manifest.json     the files with their sizes and digests
    <folder>/<key>/…                 the files
    <folder>/.<key>.….partial/       an entry that is being written, or was when its process died

An entry comes into being by one rename, so that there is all of it or nothing, whoever writes at once. What is found
is not trusted: it is used where every file is a plain one with the bytes that were written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST = "manifest.json"
LIMIT = 32 << 30  # bytes
_MANIFEST_LIMIT = 1 << 20  # bytes
_ABANDONED = 3600.0  # seconds without a change after which nobody writes an entry any more
_KEY = re.compile(r"[0-9a-f]{64}\Z")
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # it may be a link or a FIFO


class Unusable(Exception):
    """Why an entry cannot be used."""


@dataclass(frozen=True)
class Cache:
    """A folder of entries that processes share. `limit`: bytes of all entries; beyond it, those that were not used for
    the longest time go. The folder may be deleted at any time: what is in use stays mapped."""

    folder: Path
    limit: int = LIMIT

    def find(self, key: str) -> Path:
        """The folder of an entry whose files are as they were written. Raises Unusable."""
        path = self.folder / key
        try:
            at = os.open(path, _FLAGS | os.O_DIRECTORY)
        except FileNotFoundError:
            raise Unusable("there is none yet") from None
        except OSError as e:
            raise Unusable(f"{path}: {e.strerror}") from None
        try:
            self._check(at, key)
            with suppress(OSError):
                os.utime(at)  # when it was last used
        except OSError as e:
            raise Unusable(f"{path}: {e.strerror}") from None
        finally:
            os.close(at)
        return path

    def _check(self, at: int, key: str) -> None:
        with _plain(at, MANIFEST) as fd:
            if os.fstat(fd).st_size > _MANIFEST_LIMIT:
                raise Unusable(f"{MANIFEST} is too long")
            manifest = _read_manifest(os.read(fd, _MANIFEST_LIMIT), key)
        files: dict[str, dict[str, Any]] = manifest["files"]
        for name in set(os.listdir(at)) - {MANIFEST, *files}:
            raise Unusable(f"{name} is not listed in {MANIFEST}")
        for name, entry in files.items():
            with _plain(at, name) as fd:
                info = os.fstat(fd)
                if info.st_size != entry["bytes"]:
                    raise Unusable(f"{name} has {info.st_size} bytes, not {entry['bytes']}")
                # the system sets the change time at every write: what it has not touched needs no reading
                if _identity(info) != entry["identity"] and _digest(fd) != entry["sha256"]:
                    raise Unusable(f"{name} has other bytes than were written")

    @contextmanager
    def writing(self, key: str) -> Iterator[Path]:
        """A folder to write the files of an entry to; it becomes the entry at the end, unless the caller fails. An
        entry that is there, which its reader found unusable, is replaced. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        partial = Path(tempfile.mkdtemp(prefix=f".{key}.", suffix=".partial", dir=self.folder))
        try:
            yield partial
            _write_manifest(partial, key)
            self._put(partial, key)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._evict(key)

    def _put(self, partial: Path, key: str) -> None:
        for _ in range(8):
            with suppress(OSError):
                os.rename(partial, self.folder / key)
                return
            with suppress(Unusable):
                self.find(key)
                return  # another process was faster
            self.discard(key)
        raise OSError(f"{self.folder / key} cannot be replaced")

    def discard(self, key: str) -> None:
        """Remove an entry, at once for everybody."""
        with suppress(OSError):
            aside = Path(tempfile.mkdtemp(prefix=f".{key}.", suffix=".partial", dir=self.folder))
            with suppress(OSError):
                os.rename(self.folder / key, aside / "entry")
            shutil.rmtree(aside, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what processes that died have left."""
        for path in self.folder.glob(".*.partial"):
            if time.time() - max((info.st_mtime for info in _stats(path)), default=time.time()) > _ABANDONED:
                shutil.rmtree(path, ignore_errors=True)

    def _evict(self, kept: str) -> None:
        entries = []
        for path in self.folder.iterdir():
            if _KEY.match(path.name):
                with suppress(OSError):
                    size = sum(info.st_size for info in _stats(path) if not stat.S_ISDIR(info.st_mode))
                    entries.append((path.lstat().st_mtime, size, path.name))
        total = sum(size for _, size, _ in entries)
        for _, size, key in sorted(entries):
            if total <= self.limit:
                break
            if key != kept:
                self.discard(key)
                total -= size


def cache_of(options: Mapping[str, Any] | None) -> tuple[Cache | None, dict[str, Any]]:
    """A backend's option `cache` (a folder, a Cache or None), and the other options."""
    others = dict(options or {})
    cache = others.pop("cache", None)
    return (cache if cache is None or isinstance(cache, Cache) else Cache(Path(cache))), others


def _stats(folder: Path) -> list[os.stat_result]:
    """Of a folder and what is in it; nothing of what goes meanwhile."""
    found, paths = [], [folder]
    with suppress(OSError):
        paths += folder.iterdir()
    for path in paths:
        with suppress(OSError):
            found.append(path.lstat())
    return found


@contextmanager
def _plain(at: int, name: str) -> Iterator[int]:
    """A descriptor of a regular file in the open folder `at` that no link leads to or from. Raises Unusable."""
    try:
        fd = os.open(name, _FLAGS, dir_fd=at)
    except OSError as e:
        raise Unusable(f"{name}: {e.strerror}") from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
            raise Unusable(f"{name} is not a plain file of its own")
        yield fd
    finally:
        os.close(fd)


def _identity(info: os.stat_result) -> list[int]:
    return [info.st_ino, info.st_mtime_ns, info.st_ctime_ns]


def _digest(fd: int) -> str:
    with os.fdopen(os.dup(fd), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(folder: Path, key: str) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            info = os.fstat(file.fileno())
            files[path.name] = {
                "bytes": info.st_size,
                "sha256": _digest(file.fileno()),
                "identity": _identity(info),
            }
    manifest: dict[str, Any] = {"format": FORMAT, "key": key, "files": files}
    manifest["sha256"] = _own_digest(manifest)
    with (folder / MANIFEST).open("w") as out:
        json.dump(manifest, out, indent=1)
        out.flush()
        os.fsync(out.fileno())


def _own_digest(manifest: Mapping[str, Any]) -> str:
    fields = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _read_manifest(data: bytes, key: str) -> dict[str, Any]:
    """A manifest that was written for `key`. Raises Unusable."""
    try:
        manifest: dict[str, Any] = json.loads(data)
        if manifest["sha256"] != _own_digest(manifest):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Unusable(f"{MANIFEST} is damaged") from None
    if (manifest["format"], manifest["key"]) != (FORMAT, key):
        raise Unusable(f"{MANIFEST} is that of another entry")
    for name in manifest["files"]:
        if "/" in name or name in ("", ".", "..", MANIFEST):
            raise Unusable(f"{MANIFEST} names {name!r}")
    return manifest
