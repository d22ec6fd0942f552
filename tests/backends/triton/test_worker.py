"""The interpreter worker: isolation, errors, crashes, threads, large tensors, and its end."""

import gc
import io
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from moec.backends.triton import InterpreterWorker, KernelError, Resident, WorkerCrashed, mode, wire


@pytest.fixture(scope="module")
def own():
    instance = InterpreterWorker()
    yield instance
    instance.close()


def python(code):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_import_leaves_the_process_alone():
    code = (
        "import os, sys; before = dict(os.environ); import moec.backends.triton as t; "
        "assert dict(os.environ) == before and 'triton' not in sys.modules and t.mode() == 'worker'; "
        "assert 'triton' not in sys.modules; print('ok')"
    )
    result = python(code)
    assert result.stdout.strip() == "ok", result.stderr


def test_this_process_does_not_interpret(own):
    assert mode() == "worker"
    own.call("rms_norm", torch.randn(2, 3))
    assert "TRITON_INTERPRET" not in os.environ
    assert own.pid != os.getpid()


def test_errors_are_the_wrappers_own(own):
    with pytest.raises(ValueError, match=r"x must end in K=4 to meet weight float32\[3, 4\], got float32\[2, 5\]"):
        own.call("linear", torch.randn(2, 5), torch.randn(3, 4))
    with pytest.raises(TypeError, match="unexpected keyword"):
        own.call("linear", torch.randn(2, 5), torch.randn(3, 5), nonsense=1)
    with pytest.raises(ValueError, match="known: attention"):
        own.call("no_such_kernel")
    with pytest.raises(KernelError, match=r"(?s)AttributeError: .*In the interpreter worker:.*checks\.py"):
        own.call("rms_norm", 3)
    with pytest.raises(TypeError, match="cannot send a set"):
        own.call("rms_norm", {1})
    with pytest.raises(TypeError, match="complex64"):
        own.call("rms_norm", torch.zeros(3, dtype=torch.complex64))
    assert own.call("rms_norm", torch.ones(1, 4)).shape == (1, 4)


def test_restarts_after_a_crash(own):
    weight = Resident(torch.full((8,), 2.0))
    first = own.call("rms_norm", torch.ones(1, 8), weight)
    before = own.pid
    os.kill(before, signal.SIGKILL)
    with pytest.raises(WorkerCrashed, match="exit status -9"):
        own.call("rms_norm", torch.ones(1, 8), weight)
    assert torch.equal(own.call("rms_norm", torch.ones(1, 8), weight), first)
    assert own.pid != before


def test_a_resident_is_sent_once(own, monkeypatch):
    sent = []
    real = wire.send
    monkeypatch.setattr(wire, "send", lambda stream, message: (sent.append(message), real(stream, message)))
    weight = Resident(torch.ones(8))
    for _ in range(3):
        own.call("rms_norm", torch.ones(1, 8), weight)
    assert [message["do"] for message in sent] == ["keep", "call", "call", "call"]
    key = sent[0]["id"]
    del weight
    gc.collect()
    own.call("rms_norm", torch.ones(1, 8))
    assert key in sent[-1]["forget"]


def test_threads_take_turns(own):
    results = {}

    def work(i):
        x = torch.full((3, 5), float(i + 1))
        results[i] = own.call("linear", x, torch.eye(5))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(results[i], torch.full((3, 5), float(i + 1))) for i in range(8))


def test_large_tensors_pass(own):
    x = torch.randn(512, 16384)  # 32 MiB each way, far more than a pipe holds
    y = own.call("rms_norm", x)
    assert torch.allclose(y, torch.nn.functional.rms_norm(x, (16384,), eps=1e-6), atol=1e-5)


def test_fork_and_end_of_the_parent():
    """A forked child does not share the worker, which ends even when its parent is killed."""
    code = (
        "import os, signal, torch; from moec.backends.triton import run, worker; run('rms_norm', torch.ones(1, 2)); "
        "first = worker().pid; child = os.fork()\n"
        "if child == 0: os._exit(0 if worker().pid is None else 1)\n"
        "status = os.waitpid(child, 0)[1]; run('rms_norm', torch.ones(1, 2)); "
        "print(first if status == 0 and worker().pid == first else 'shared', flush=True); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    pid = int(python(code).stdout)
    deadline = time.time() + 20
    while alive(pid) and time.time() < deadline:
        time.sleep(0.1)
    assert not alive(pid)


def test_wire_keeps_every_dtype_and_shape():
    read, write = os.pipe()
    tensors = [torch.empty(shape, dtype=dtype) for dtype in wire.NAMES for shape in ((), (0, 3), (1,), (2, 3, 5))]
    for tensor in tensors:
        tensor.copy_(torch.randn(tensor.shape) * 3)
    message = {"t": tuple(tensors), "f": [1.5, float("inf"), None, True, "x"], "d": torch.bfloat16, "n": 2**40}
    with os.fdopen(read, "rb") as reader, os.fdopen(write, "wb") as writer:
        sender = threading.Thread(target=wire.send, args=(writer, message))
        sender.start()
        received = wire.receive(reader)
        sender.join()
    assert received["f"] == message["f"]
    assert received["d"] is torch.bfloat16
    assert received["n"] == 2**40
    assert isinstance(received["t"], tuple)
    for got, want in zip(received["t"], tensors, strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert torch.equal(got.reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8))
    strided = torch.arange(12.0).reshape(3, 4).T
    with os.fdopen((pipe := os.pipe())[0], "rb") as reader, os.fdopen(pipe[1], "wb") as writer:
        wire.send(writer, [strided])
        assert torch.equal(wire.receive(reader)[0], strided)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_any_stride_arrive(dtype):
    x = torch.arange(12, dtype=torch.float32).to(dtype).reshape(3, 4)
    for t in (x[:1, 0], x[::3, 1], x.T, x[1:, ::2], x[:0], x[2, 3], x[:1, :1].expand(2, 3)):
        stream = io.BytesIO()
        wire.send(stream, t)
        stream.seek(0)
        assert torch.equal(wire.receive(stream), t)
