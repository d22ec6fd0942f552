"""Reading a saved folder without trusting it."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from moec.ir import ArgumentValueError, ArtifactError, CompileError
from moec.ir.files_below import open_below

TEXT_LIMIT = 512 << 20  # bytes of a graph's text

_DEEPEST = 4  # folders in folders

# of a file: device, inode, size, and the times of its last change, which renaming and linking move too
Identity = tuple[int, int, int, int, int]


class Folder:
    """A folder of files that may be hostile and may change meanwhile.

    A file is opened below the folder's descriptor, following no link, and checked through its own descriptor: it is a
    regular file with one name. What it was like is remembered, so that `check_unchanged` can tell, after everything
    has been read, that every name still leads to what was checked, whoever opened it in between.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (OSError, ValueError) as e:
            raise ArtifactError(f"{_named(path)} is not a folder ({_reason(e)})", code="artifact") from None
        self._seen: dict[str, Identity] = {}

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    @contextmanager
    def opened(self, name: str) -> Iterator[int]:
        """A descriptor of a file by its relative name. Raises ArtifactError for a name that leads out (`..`, absolute),
        a symbolic or hard link, anything that is no regular file, and a file that has changed since it was first
        opened."""
        fd = self._open(name)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise self._bad(name, "must be a file, not a link or anything else")
            if info.st_nlink != 1:
                raise self._bad(name, "is a hard link")
            if self._seen.setdefault(name, _identity(info)) != _identity(info):
                raise self._bad(name, "was changed while it was read")
            yield fd
        finally:
            os.close(fd)

    def read(self, name: str, limit: int) -> bytes:
        """A file's bytes. Raises ArtifactError as `opened` does, and where there are more than `limit`."""
        with self.opened(name) as fd:
            size = os.fstat(fd).st_size
            if size > limit:
                raise self._bad(name, f"has {size} bytes, more than {limit}")
            with os.fdopen(os.dup(fd), "rb") as file:
                data = file.read(limit + 1)
        if len(data) != size:
            raise self._bad(name, "was changed while it was read")
        return data

    def size(self, name: str) -> int:
        """Bytes of a file."""
        with self.opened(name) as fd:
            return os.fstat(fd).st_size

    def digest(self, name: str) -> str:
        """SHA-256 of a file's bytes."""
        with self.opened(name) as fd, os.fdopen(os.dup(fd), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def names(self) -> Iterator[str]:
        """Relative names of everything inside that is no folder; links are not followed. Raises ArtifactError where
        folders are nested deeper than a saved model's."""
        left = [PurePosixPath(".")]
        while left:
            at = left.pop()
            try:
                fd = os.open(at, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd)
            except OSError as e:
                raise self._bad(str(at), f"cannot be listed ({_reason(e)})") from None
            try:
                with os.scandir(fd) as entries:
                    for entry in entries:
                        if not entry.is_dir(follow_symlinks=False):
                            yield str(at / entry.name)
                        elif len(at.parts) >= _DEEPEST:
                            raise self._bad(str(at), "holds too many folders in folders")
                        else:
                            left.append(at / entry.name)
            finally:
                os.close(fd)

    def check_unchanged(self) -> None:
        """Raise ArtifactError unless each name that was opened still leads to the same, unchanged file."""
        for name, identity in self._seen.items():
            try:
                info = os.stat(self.path / name, follow_symlinks=False)
            except OSError as e:
                raise self._bad(name, f"was changed while it was read ({_reason(e)})") from None
            if _identity(info) != identity:
                raise self._bad(name, "was changed while it was read")

    @property
    def replaced(self) -> bool:
        """Whether another folder, or none, now has this one's name."""
        try:
            now = os.stat(self.path)
        except OSError:
            return True
        held = os.fstat(self._fd)
        return (now.st_dev, now.st_ino) != (held.st_dev, held.st_ino)

    def _open(self, name: str) -> int:
        parts = PurePosixPath(name).parts
        odd = any(c in name for c in "\\\0\n\r:") or name.startswith("/") or name != "/".join(parts)
        if not parts or odd or ".." in parts:
            shown = name if len(name) <= 100 else name[:97] + "..."
            raise ArtifactError(f"{self.path}: file name {shown!r} leads out of the folder", code="artifact")
        try:
            return open_below(self._fd, parts)
        except FileNotFoundError:
            raise self._bad(name, "is missing") from None
        except (OSError, ValueError) as e:  # a link, a FIFO's other end, a folder in a file's place
            raise self._bad(name, f"must be a file, not a link or anything else ({_reason(e)})") from None

    def _bad(self, name: str, what: str) -> ArtifactError:
        return ArtifactError(f"{_named(self.path / name)} {what}", code="artifact")


def _identity(info: os.stat_result) -> Identity:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def read_regular(path: Path, limit: int) -> bytes:
    """The bytes of a file that the user named. Raises ArgumentValueError where it cannot be read, is no regular file
    (a FIFO would block, a device never end) or has more than `limit` bytes."""
    with opened_regular(path) as fd:
        size = os.fstat(fd).st_size
        if size > limit:
            raise ArgumentValueError(f"cannot read {_named(path)}: it has more than {limit} bytes", code="arguments")
        with os.fdopen(os.dup(fd), "rb") as file:
            return file.read(size)


@contextmanager
def opened_regular(path: Path, *, own: bool = False) -> Iterator[int]:
    """A descriptor of a regular file; with `own`, one that no link leads to or from, for a file that the user has not
    named. Raises ArgumentValueError."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_NOFOLLOW if own else 0)
    try:
        fd = os.open(path, flags)
    except (OSError, ValueError) as e:
        raise ArgumentValueError(f"cannot read {_named(path)}: {_reason(e)}", code="arguments") from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise ArgumentValueError(f"cannot read {_named(path)}: it is no regular file", code="arguments")
        if own and info.st_nlink != 1:
            raise ArgumentValueError(f"cannot read {_named(path)}: it is a hard link", code="arguments")
        yield fd
    finally:
        os.close(fd)


@contextmanager
def written_whole(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Names beside the paths to write to; what is there at the end takes the places of the paths, and where something
    fails nothing is left. Raises ArgumentValueError where writing fails."""
    partial = tuple(p.with_name(f".{p.name}.{os.getpid()}.{threading.get_ident()}.partial") for p in paths)
    try:
        yield partial
        for at, path in zip(partial, paths, strict=True):
            if at.exists():
                at.replace(path)
    except (OSError, ValueError) as e:
        if isinstance(e, CompileError):
            raise
        names = ", ".join(map(_named, paths))
        raise ArgumentValueError(f"cannot write {names}: {_reason(e)}", code="arguments") from None
    finally:
        for at in partial:
            with suppress(OSError, ValueError):
                at.unlink(missing_ok=True)


def _named(path: Path) -> str:
    text = str(path)
    text = text if len(text) <= 300 else f"{text[:100]}…{text[-100:]}"
    return text if text.isprintable() else repr(text)


def exchange(a: Path, b: Path) -> bool:
    """Swap what two names stand for, at once (Linux, rename(2) with RENAME_EXCHANGE). False where the system or file
    system cannot; raises OSError where it can and fails."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(a), None, str(b))


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
