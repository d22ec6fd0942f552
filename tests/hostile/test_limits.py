"""The limits themselves: what goes over one fails, with its name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import moec
from moec.ir import CompileError

from .limits import limited


@limited()
def test_a_case_runs(tmp_path):
    (tmp_path / "made").write_text("x")
    graph = moec.parse("graph(%x: f32[T]) -> (%y: f32[T]) {\n  %0: f32[T] = math.silu(%x)\n  return %0\n}")
    assert moec.compile(graph, backend="onnxruntime", threads=1)(torch.zeros(3))[0].tolist() == [0, 0, 0]


@limited()
def over_memory():
    torch.ones(3 << 28)


@limited(memory=1 << 30)
def over_memory_in_python():
    [bytearray(64 << 20) for _ in range(40)]


@limited(seconds=1)
def over_time():
    while True:
        pass


@limited(seconds=1)
def over_time_and_deaf():
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    while True:
        pass


@limited(wall=1)
def waiting():
    time.sleep(60)


@limited(wall=1)
def blocked_by_a_fifo(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "fifo").read_text()


@limited()
def crashing():
    os.kill(os.getpid(), signal.SIGSEGV)


@limited()
def failing(n):
    found = n + 1
    assert found == n, "one more"


@limited()
def leaving():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


@limited()
def refused():
    raise CompileError("no")


@pytest.mark.parametrize(
    ("case", "arguments", "said"),
    [
        (over_memory, {}, "allocate memory"),
        (over_memory_in_python, {}, "MemoryError"),
        (over_time, {}, "1 s of CPU time"),
        (over_time_and_deaf, {}, "1 s of CPU time"),
        (waiting, {}, "did not end in 1 s"),
        (crashing, {}, "SIGSEGV"),
        (failing, {"n": 41}, "found = 42"),
        (leaving, {}, "left processes running"),
        (refused, {}, "CompileError"),
    ],
)
def test_a_case_over_a_limit_fails_with_its_name(case, arguments, said):
    with pytest.raises(pytest.fail.Exception) as caught:
        case(**arguments)
    assert case.__name__ in str(caught.value)
    assert said in str(caught.value)


def test_a_case_that_waits_for_a_fifo_fails(tmp_path):
    test_a_case_over_a_limit_fails_with_its_name(blocked_by_a_fifo, {"tmp_path": tmp_path}, "did not end in 1 s")
