"""Test bodies in processes of their own, under limits of memory and time.

`@limited()` runs the body of a test in a child. A child is forked from one server process that has imported torch and
the backends and run nothing, so that a case costs milliseconds and sees what a fresh process sees. What the body raises
fails the test with the child's traceback and output; so does a child that a signal ends, that takes longer than it may,
or that leaves processes running. Arguments (fixtures, parameters) are paths, bytes and what JSON holds.

Memory is RLIMIT_AS: unlike RLIMIT_DATA it counts mapped files and shared memory too, and all that the server has
loaded takes less than half of what a case may use.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

MEMORY = 2 << 30
SECONDS = 30  # CPU time, so that other work on the machine does not matter
WALL = 180  # for what waits instead of computing
ROOT = Path(__file__).resolve().parents[2]
PRELOADED = (
    "moec.compiler",
    "moec.backends.reference",
    "moec.backends.onnxruntime.executable",
    "torch._dynamo",  # this and the next are what a first trace would import, for longer than most cases take
    "torch.export._trace",
)

Test = TypeVar("Test", bound=Callable[..., None])


def limited(*, memory: int = MEMORY, seconds: int = SECONDS, wall: int = WALL) -> Callable[[Test], Test]:
    """The test's body in a child with at most `memory` bytes of address space, `seconds` of CPU time, and `wall`
    seconds by the clock."""

    def wrap(body: Test) -> Test:
        @functools.wraps(body)
        def test(*args: Any, **kwargs: Any) -> None:
            assert not args, "fixtures and parameters come by name"
            problem = run(body.__module__, body.__qualname__, kwargs, memory=memory, seconds=seconds, wall=wall)
            if problem is not None:
                pytest.fail(f"{body.__qualname__}: {problem}", pytrace=False)

        test.body = body  # type: ignore[attr-defined]
        return test  # type: ignore[return-value]

    return wrap


def run(module: str, name: str, arguments: dict[str, Any], *, memory: int, seconds: int, wall: int) -> str | None:
    """Run `module.name.body(**arguments)` in a child. None where it returned, else what happened."""
    request = {
        "module": module,
        "name": name,
        "arguments": {k: _packed(v) for k, v in arguments.items()},
        "memory": memory,
        "seconds": seconds,
        "wall": wall,
    }
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    if not answer:
        _server.cache_clear()
        return "the server of the cases ended"
    problem: str | None = json.loads(answer)
    return problem


@functools.cache
def _server() -> subprocess.Popen[str]:
    # threads of a server would be missing in its children
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def _serve() -> None:
    """Answer requests, one line each, until there are no more."""
    sys.path.append(str(ROOT))
    for module in PRELOADED:
        importlib.import_module(module)
    for line in sys.stdin:
        print(json.dumps(_case(json.loads(line))), flush=True)


def _case(request: dict[str, Any]) -> str | None:
    output = os.memfd_create("output")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            nothing = os.open(os.devnull, os.O_RDONLY)
            for fd, target in ((nothing, 0), (output, 1), (output, 2)):
                os.dup2(fd, target)
            _limit(request)
            _body(request)
            code = 0
        except BaseException as error:
            _show(error)
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os._exit(code)
    status = _wait(child, request["wall"])
    left = _end_group(child)
    with os.fdopen(output, "rb") as file:
        file.seek(0)
        said = file.read()[-20_000:].decode("utf-8", "replace").strip()
    problem = _problem(status, request)
    if problem is None and left:
        problem = "it left processes running"
    return None if problem is None else f"{problem}\n{said}".strip()


def _limit(request: dict[str, Any]) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # the second figure is for a case that catches the signal of the first
    resource.setrlimit(resource.RLIMIT_CPU, (request["seconds"], request["seconds"] + 2))
    resource.setrlimit(resource.RLIMIT_AS, (request["memory"], request["memory"]))


def _body(request: dict[str, Any]) -> None:
    test: Any = importlib.import_module(request["module"])
    for part in request["name"].split("."):
        test = getattr(test, part)
    test.body(**{k: _unpacked(*v) for k, v in request["arguments"].items()})


def _packed(value: Any) -> tuple[str, Any]:
    if isinstance(value, Path):
        return "path", str(value)
    if isinstance(value, bytes):
        return "bytes", value.decode("latin-1")
    return "json", value


def _unpacked(kind: str, value: Any) -> Any:
    return Path(value) if kind == "path" else value.encode("latin-1") if kind == "bytes" else value


def _show(error: BaseException) -> None:
    """The traceback with the values of each frame's names; of a MemoryError just the lines."""
    values = not isinstance(error, MemoryError)
    report = traceback.TracebackException.from_exception(error, capture_locals=values, limit=-12)
    text = "".join(report.format())
    sys.stderr.write("\n".join(row[:400] for row in text.splitlines()))


def _wait(child: int, wall: int) -> int | None:
    """The exit code (negative: the signal), None where it has not ended in time."""
    end = time.monotonic() + wall
    pause = 0.001
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _end_group(child: int) -> bool:
    """End what a case has started. True where something still ran after a while."""
    for _ in range(50):
        try:
            os.killpg(child, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return True


def _problem(status: int | None, request: dict[str, Any]) -> str | None:
    if status is None:
        return f"it did not end in {request['wall']} s"
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"it was ended ({signal.Signals(-status).name}): it may take {request['seconds']} s of CPU time"
    if status < 0:
        return f"it died of {signal.Signals(-status).name}; it may use {request['memory'] >> 20} MiB"
    return None if status == 0 else "it failed"


if __name__ == "__main__":
    _serve()
