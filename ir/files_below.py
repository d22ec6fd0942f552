"""Opening a file below a folder whose contents are not trusted, and may change meanwhile."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence


def open_below(folder: int, parts: Sequence[str]) -> int:
    """A descriptor of the file at `parts`, below the folder of a descriptor: each part is opened below the one before
    it, so that no link is followed, whatever takes the place of a part in between. It does not block at a FIFO. Raises
    OSError, with ELOOP for a link in any place."""
    at = os.dup(folder)
    for part in parts[:-1]:
        try:
            below = _open(part, os.O_DIRECTORY, at)
        finally:
            os.close(at)
        at = below
    try:
        return _open(parts[-1], os.O_NONBLOCK, at)
    finally:
        os.close(at)


def _open(name: str, flags: int, folder: int) -> int:
    try:
        return os.open(name, flags | os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except NotADirectoryError:  # what a link in the place of a folder is called
        if stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name) from None
        raise
