"""What a refusal must not do: run, unpickle, write, or leave open."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from moec.ir import CompileError

_RUNNING = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn",
    "pickle.find_class", "socket.connect", "socket.bind", "code.__new__",
)  # fmt: skip
_WRITING = (
    "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.utime", "os.setxattr", "os.putenv", "os.unsetenv", "tempfile.mkstemp", "tempfile.mkdtemp", "shutil.rmtree",
    "shutil.move", "shutil.copyfile",
)  # fmt: skip
_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_LONGEST = 4000  # characters of a message

_seen: list[str] = []
_watching = False
_hooked = False


def _audit(event: str, args: tuple) -> None:
    if not _watching:
        return
    if event in _RUNNING or event in _WRITING:
        _seen.append(f"{event}{args!r}"[:300])
    elif event == "open" and isinstance(args[2], int) and args[2] & _FLAGS and args[0] != os.devnull:
        _seen.append(f"open for writing: {args[0]!r}")


@contextmanager
def harmless() -> Iterator[None]:
    """Within, no process is started, nothing is unpickled, written or removed, and no file stays open."""
    global _watching, _hooked
    if not _hooked:
        sys.addaudithook(_audit)  # for good; it looks at `_watching` first
        _hooked = True
    before = _open_files()
    _seen.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False
    assert not _seen, _seen
    if _open_files().keys() - before.keys():
        gc.collect()  # takes a tenth of a second
    left = {n: name for n, name in _open_files().items() if n not in before}
    assert not left, f"left open: {left}"


@contextmanager
def refused(match: str, kind: type[CompileError] = CompileError) -> Iterator[None]:
    """Within, a CompileError with `match` (a regular expression) in its one readable message is raised, and nothing
    else happens."""
    with harmless(), pytest.raises(CompileError, match=match) as caught:
        yield
    error, text = caught.value, str(caught.value)
    assert isinstance(error, kind), f"{type(error).__name__}, expected {kind.__name__}: {text}"
    assert len(text) < _LONGEST, f"{len(text)} characters: {text[:300]}…"
    for word in ("Traceback", "\0", "<moec", "object at 0x"):
        assert word not in text, text
    caught.value.__traceback__ = None  # it would keep what the call held open


def _open_files() -> dict[str, str]:
    found = {}
    for n in os.listdir("/proc/self/fd"):
        try:
            found[n] = os.readlink(f"/proc/self/fd/{n}")
        except OSError:  # the descriptor of the listing itself
            continue
    return found
