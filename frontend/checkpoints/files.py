"""The files of a checkpoint folder, which may be hostile: nothing outside of it is opened, nothing is run."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moec.ir import CompileError
from moec.ir.strict_json import strict_json

JSON_LIMIT = 64 << 20  # bytes; of config.json, the index and tokenizer.json
# how a snapshot in the hub's cache names its files, which lie beside it
_BLOB = re.compile(r"\.\./\.\./blobs/[0-9a-f]{40,64}")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".msgpack", ".h5")


class CheckpointFolder:
    """A folder whose files are opened below its own descriptor.

    A file is a regular one with one name. Links are not followed, but for those of the hub's cache
    (`snapshots/<revision>` links to `blobs/<hash>` of the same repository).
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (OSError, ValueError) as e:
            raise CompileError(f"cannot open the folder {path}: {_reason(e)}", code="checkpoint") from None
        self._in_cache = path.resolve().parent.name == "snapshots"

    def __enter__(self) -> CheckpointFolder:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def names(self) -> list[str]:
        """Names of everything directly inside."""
        return sorted(os.listdir(self._fd))

    def pickles(self) -> list[str]:
        """Files in formats that run code when they are read, or that hold weights in another way."""
        return [n for n in self.names() if n.endswith(_PICKLES)]

    def has(self, name: str) -> bool:
        return name in self.names()

    @contextmanager
    def opened(self, name: str) -> Iterator[int]:
        """A descriptor of a file. Raises CompileError for a name that leads out of the folder, a link, anything that
        is no regular file with one name."""
        fd = self._open(name)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise self._bad(name, "is no regular file")
            if info.st_nlink != 1:
                raise self._bad(name, "is a hard link")
            yield fd
        finally:
            os.close(fd)

    def read(self, name: str, limit: int = JSON_LIMIT) -> bytes:
        """A file's bytes. Raises CompileError as `opened`, and where there are more than `limit`."""
        with self.opened(name) as fd, os.fdopen(os.dup(fd), "rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise self._bad(name, f"has more than {limit} bytes")
        return data

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object. Raises CompileError for anything else, also for an object with a name twice."""
        try:
            data = strict_json(self.read(name), constants=True)
        except ValueError as e:
            if isinstance(e, CompileError):
                raise
            raise self._bad(name, f"is no JSON: {e}") from None
        if not isinstance(data, dict):
            raise self._bad(name, f"holds a {type(data).__name__}, expected an object")
        return data

    def _open(self, name: str) -> int:
        if not is_plain(name):
            raise self._bad(name, "leads out of the folder")
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # without blocking: it may be a FIFO
        try:
            target = os.readlink(name, dir_fd=self._fd) if self._in_cache else ""
        except OSError:
            target = ""
        try:
            return os.open(target if _BLOB.fullmatch(target) else name, flags, dir_fd=self._fd)
        except FileNotFoundError:
            raise self._bad(name, "is missing") from None
        except (OSError, ValueError) as e:
            raise self._bad(name, f"must be a file, not a link or anything else ({_reason(e)})") from None

    def _bad(self, name: str, what: str) -> CompileError:
        shown = name if len(name) <= 100 else f"{name[:97]}..."
        shown = shown if shown.isprintable() else ascii(shown)
        return CompileError(f"{shown} {what}", code="checkpoint")


def is_plain(name: str) -> bool:
    """Whether this names a file directly inside a folder."""
    return bool(name) and name not in (".", "..") and not any(c in name for c in "/\\\0\n\r:")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
