"""Huge pages for what a session allocates: reading weights misses the TLB less, which decoding gains most by.

Linux gives huge pages to memory that asks for them (madvise(2): MADV_HUGEPAGE, and MADV_COLLAPSE, since 6.1, for what
is in use already). ONNX Runtime does not ask, so we do for the anonymous memory that came while a session was made, on
a thread beside, as moving pages takes seconds per GB. Contents stay what they are; where the system has no huge pages
or refuses, nothing happens.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HUGE = 1 << 21  # bytes
LEAST = 32 << 20  # bytes; less is in the caches anyway
_HUGEPAGE, _COLLAPSE = 14, 25
_MAPS = Path("/proc/self/maps")
Range = tuple[int, int]


@contextmanager
def huge_pages(wanted: bool = True) -> Iterator[list[threading.Thread]]:
    """Afterwards: asks for huge pages for the memory that was allocated within. Yields a list that then holds the
    thread which does so, if there is one."""
    threads: list[threading.Thread] = []
    before = _anonymous() if wanted else []
    yield threads
    if not before:
        return
    ranges = grown(before, _anonymous())
    if sum(end - start for start, end in ranges) >= LEAST:
        thread = threading.Thread(target=_advise, args=(ranges,), name="moec-huge-pages", daemon=True)
        thread.start()
        threads.append(thread)


def grown(before: list[Range], after: list[Range]) -> list[Range]:
    """The parts of the ranges `after` that are not in those `before` (both ascending), in whole huge pages: widened to
    them where the range reaches that far."""
    found: list[Range] = []
    for start, end in after:
        at, parts = start, []
        for low, high in before:
            if high <= at or low >= end:
                continue
            if low > at:
                parts.append((at, low))
            at = max(at, high)
        if at < end:
            parts.append((at, end))
        least, most = -(-start // HUGE) * HUGE, end // HUGE * HUGE
        for low, high in parts:
            low, high = max(low // HUGE * HUGE, least), min(-(-high // HUGE) * HUGE, most)
            if found and low <= found[-1][1]:
                low = found[-1][1]
            if low < high:
                found.append((low, high))
    return found


def _anonymous() -> list[Range]:
    """Private memory of this process that belongs to no file, ascending; empty where that cannot be known."""
    if sys.platform != "linux":
        return []
    try:
        lines = _MAPS.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        bounds, access, _, _, inode, *path = line.split(maxsplit=5)
        if access == "rw-p" and inode == "0" and (not path or path[0] == "[heap]"):
            low, high = bounds.split("-")
            found.append((int(low, 16), int(high, 16)))
    return found


def _advise(ranges: list[Range]) -> None:
    """Ask for them; what was given back meanwhile is refused, which does no harm."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for start, end in ranges:
        madvise(start, end - start, _HUGEPAGE)
        for page in range(start, end, HUGE):
            madvise(page, HUGE, _COLLAPSE)
