"""Memory of the process: whether a session may hold weights of its own."""

from __future__ import annotations

import ctypes
import os
from dataclasses import replace
from pathlib import Path

from moec.backends.onnxruntime.lower import Lowered
from moec.backends.onnxruntime.options import Options

_SPARE = 1.1  # of the weights, for what else a session needs
_CGROUP = Path("/sys/fs/cgroup")


def fitting(lowered: Lowered, options: Options, available: int | None = None) -> tuple[Options, str | None]:
    """The options, with memory="mapped" in place of "fast" where the weights do not fit into memory, and why. A
    session that is slower is better than a process that is killed. `available`: bytes, None to ask the system."""
    available = available_memory() if available is None else available
    need = lowered.resident["fast"]
    if options.memory != "fast" or available is None or need * _SPARE <= available:
        return options, None
    why = f"weights of {need / 1e9:.1f} GB do not fit into the {available / 1e9:.1f} GB of memory that are available"
    return replace(options, memory="mapped"), why


def give_back() -> None:
    """Return freed memory to the system, where the C library keeps it (glibc): of weights on their way, say."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def available_memory() -> int | None:
    """Bytes that this process may still take, None where the system does not tell."""
    found = [n for n in (_of_machine(), _of_group()) if n is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)
    except (OSError, ValueError):
        pass  # no Linux
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _of_group() -> int | None:
    """Of a container: its limit less what it holds that the system could not drop."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())  # "max": none
        held = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return max(limit - int(held["anon"]), 0)
    except (OSError, ValueError, KeyError):
        return None
