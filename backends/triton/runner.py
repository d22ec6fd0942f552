"""Running a kernel by name: directly on a GPU, directly in the interpreter, or in an interpreter worker process."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, Literal

import torch

from moec.backends.triton import wire
from moec.backends.triton.registry import resolve_kernel

_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from moec.backends.triton.worker import serve; serve(*map(int, sys.argv[2:]))"
)


class KernelError(RuntimeError):
    """A kernel failed in the interpreter worker; the message ends with the worker's traceback."""


class WorkerCrashed(KernelError):
    """The interpreter worker died; the next call starts a new one."""


class Resident:
    """A CPU tensor that is sent to the interpreter worker once and kept there, such as a weight.

    The tensor must not be modified afterwards. Everywhere else it stands for the tensor itself.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class InterpreterWorker:
    """A child process in which Triton interprets kernels. Started at the first call, restarted after a crash.

    Calls from several threads take turns. The child ends with this process, and `close()` ends it sooner.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: BinaryIO
        self._answers: BinaryIO
        self._log: Any = None
        self._kept: weakref.WeakKeyDictionary[Resident, int] = weakref.WeakKeyDictionary()
        self._next_id = 0
        self._forget: list[int] = []
        self._waiting = False

    @property
    def pid(self) -> int | None:
        """Process id of the running worker, or None."""
        return self._process.pid if self._process else None

    def call(self, kernel: str, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapper `kernel` in the worker. Tensors, `Resident`s, scalars, strings, dtypes and tuples pass.

        Raises ValueError and TypeError as the wrapper does, KernelError for anything else that goes wrong in the
        kernel, and WorkerCrashed when the worker dies on the way.
        """
        with self._lock:
            self._start()
            sent_args = [self._reference(arg) for arg in args]
            sent_kwargs = {name: self._reference(arg) for name, arg in kwargs.items()}
            return self._ask({"do": "call", "kernel": kernel, "args": sent_args, "kwargs": sent_kwargs})

    def launch(self, kernel: Any, grid: tuple[int, ...], args: Sequence[Any], constants: Mapping[str, Any]) -> None:
        """Run a @triton.jit kernel of the user's in the worker: its source goes there, and what it wrote comes back
        into the tensors given. Raises as `call` does, and CompileError for a kernel that cannot be sent."""
        from moec.backends.triton.shipping import pack_arguments, pack_kernel, pack_value

        parts = pack_kernel(kernel)
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        memory, packed = pack_arguments(args)
        request = {
            "do": "launch", "kernel": key, "parts": parts, "grid": grid, "memory": memory, "args": packed,
            "constants": {name: pack_value(value) for name, value in constants.items()},
        }  # fmt: skip
        with self._lock:
            self._start()
            for place, tensor in self._ask(request).items():
                memory[int(place)].copy_(tensor)

    def close(self) -> None:
        """End the worker. The next call starts a new one."""
        with self._lock:
            process, self._process = self._process, None
            if process is None:
                return
            process.kill()
            process.wait()
            for stream in (self._requests, self._answers, self._log):
                with contextlib.suppress(OSError):  # unflushed bytes for a dead reader
                    stream.close()
            self._kept.clear()
            self._forget.clear()

    def _start(self) -> None:
        if self._process is not None:
            return
        to_worker, requests = os.pipe()
        answers, from_worker = os.pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the worker)
        command = [sys.executable, "-c", _START, json.dumps([os.path.abspath(p) for p in sys.path])]
        try:
            self._process = subprocess.Popen(
                [*command, str(to_worker), str(from_worker), str(os.getpid())],
                env=os.environ | {"TRITON_INTERPRET": "1"},
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(to_worker, from_worker),
            )
        finally:
            os.close(to_worker)
            os.close(from_worker)
        self._requests, self._answers = os.fdopen(requests, "wb"), os.fdopen(answers, "rb")
        self._ask({"do": "hello"})

    def _reference(self, value: Any) -> Any:
        if not isinstance(value, Resident):
            return value
        if value not in self._kept:
            key = self._next_id = self._next_id + 1
            self._ask({"do": "keep", "id": key, "tensor": value.tensor})
            self._kept[value] = key
            weakref.finalize(value, self._forget.append, key)
        return wire.Reference(self._kept[value])

    def _ask(self, request: dict[str, Any]) -> Any:
        if self._waiting:  # the lock lets this thread in again, from a signal handler or a finaliser
            raise KernelError("the Triton interpreter worker was called while this thread waited for its answer")
        forget = [self._forget.pop() for _ in range(len(self._forget))]
        self._waiting = True
        try:
            wire.send(self._requests, request | {"forget": forget})
            answer = wire.receive(self._answers)
        except TypeError:  # a value without an encoding: refused before anything was written
            raise
        except (OSError, EOFError) as error:
            raise WorkerCrashed(f"the Triton interpreter worker died{self._last_words()}") from error
        except BaseException:  # such as KeyboardInterrupt: the answer to this request would meet the next one
            self.close()
            raise
        finally:
            self._waiting = False
        if answer["ok"]:
            return answer["result"]
        if answer["refused"]:
            raise (TypeError if answer["type"] == "TypeError" else ValueError)(answer["message"])
        raise KernelError(f"{answer['type']}: {answer['message']}\nIn the interpreter worker:\n{answer['traceback']}")

    def _last_words(self) -> str:
        assert self._process is not None
        try:
            status = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            status = None
        self._log.seek(0)
        text = self._log.read().decode(errors="replace")[-4000:].strip()
        self.close()
        return f" (exit status {status})" + (f":\n{text}" if text else "")


_worker: InterpreterWorker | None = None
_worker_pid = 0
_guard = threading.Lock()


def worker() -> InterpreterWorker:
    """The interpreter worker of this process (a forked child gets its own)."""
    global _worker, _worker_pid
    with _guard:
        if _worker is None or _worker_pid != os.getpid():
            _worker, _worker_pid = InterpreterWorker(), os.getpid()
            atexit.register(_close_at_exit, _worker, _worker_pid)
        return _worker


def _close_at_exit(instance: InterpreterWorker, pid: int) -> None:
    if os.getpid() == pid:
        instance.close()


def mode(device: torch.device | str = "cpu") -> Literal["gpu", "interpreter", "worker"]:
    """How a kernel on tensors of `device` would run.

    "gpu" for a CUDA device; for the CPU "interpreter" when triton was first imported with TRITON_INTERPRET=1 in this
    process, else "worker". Never changes the environment; imports triton only when it is needed to tell.
    """
    imported = "triton" in sys.modules
    if not imported and os.environ.get("TRITON_INTERPRET", "") not in ("1", "true", "True", "on", "y", "yes"):
        return "gpu" if torch.device(device).type == "cuda" else "worker"
    from moec.backends.triton.launch import interpreted

    if interpreted():
        return "interpreter"
    return "gpu" if torch.device(device).type == "cuda" else "worker"


def _recording() -> bool:
    """Whether launches are only written down (`launch.record_launches`), for which triton has been imported."""
    direct = sys.modules.get("moec.backends.triton.launch")
    return direct is not None and direct.recording()


def _plain(value: Any) -> Any:
    return value.tensor if isinstance(value, Resident) else value


def run(kernel: str, *args: Any, **kwargs: Any) -> Any:
    """Run the wrapper function `kernel` (a name in `registry.KERNELS`) on tensors and scalars.

    CUDA tensors: on that GPU. CPU tensors: in Triton's interpreter, in this process or in a worker (see `mode`).
    Raises ValueError or TypeError for arguments the wrapper refuses, KernelError when a kernel fails in the worker.
    """
    tensors = (_plain(value) for value in (*args, *kwargs.values()))
    device = next((value.device for value in tensors if isinstance(value, torch.Tensor)), torch.device("cpu"))
    if mode(device) == "worker" and not _recording():
        return worker().call(kernel, *args, **kwargs)
    plain_kwargs = {name: _plain(value) for name, value in kwargs.items()}
    return resolve_kernel(kernel)(*(_plain(value) for value in args), **plain_kwargs)


def launch(
    kernel: Any,
    grid: int | Sequence[int] | Callable[[dict[str, Any]], Sequence[int]],
    args: Sequence[Any],
    *,
    num_warps: int = 4,
    num_stages: int = 2,
    constants: Mapping[str, Any],
) -> None:
    """See `TritonBackend.launch`."""
    sizes = grid(dict(constants)) if callable(grid) else grid
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    if not 1 <= len(sizes) <= 3 or not all(isinstance(s, int) and s >= 0 for s in sizes):
        raise ValueError(f"grid must be 1 to 3 sizes, got {sizes}")
    device = next((a.device for a in args if isinstance(a, torch.Tensor)), None)
    if device is None:
        raise ValueError("launch() needs a tensor among the kernel's arguments")
    from moec.backends.triton import launch as direct
    from moec.backends.triton.shipping import check_kernel

    if mode(device) == "worker" and not direct.recording():
        check_kernel(kernel, constants)
        if 0 not in sizes:
            worker().launch(kernel, sizes, args, constants)
        return
    if not direct.interpreted():
        check_kernel(kernel, constants)
    direct.launch(kernel, sizes, *args, num_warps=num_warps, num_stages=num_stages, **constants)
