"""The interpreter worker: a process started with TRITON_INTERPRET=1 that runs kernels for its parent.

It reads requests from one pipe and answers on another (`wire.py`), one at a time, and ends when its parent does.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from typing import Any

import numpy as np
import torch

from moec.backends.triton import wire
from moec.backends.triton.registry import KERNELS, resolve_kernel

_OWN = (
    "/triton/runtime/interpreter.py", "/triton/runtime/jit.py", "/triton/language/core.py", "/triton/worker.py",
    "/triton/launch.py",
)  # fmt: skip


def _end_with_parent(parent: int) -> None:
    # The pipe closes when the parent dies, but not while a forked sibling still holds its other end.
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _launch(request: dict[str, Any], kernels: dict[str, Any]) -> Any:
    """Run a kernel that was sent; what it wrote to, by position in the memory that was sent along."""
    from moec.backends.triton.launch import launch
    from moec.backends.triton.shipping import unpack_arguments, unpack_kernel, unpack_value

    key, memory = request["kernel"], request["memory"]
    if key not in kernels:
        kernels[key] = unpack_kernel(request["parts"])
    before = [m.clone() for m in memory]
    arguments = unpack_arguments(memory, request["args"])
    constants = {name: unpack_value(tree) for name, tree in request["constants"].items()}
    with np.errstate(all="ignore"):  # overflow and 0/0 are results
        launch(kernels[key], request["grid"], *arguments, **constants)
    return {str(i): m for i, (m, old) in enumerate(zip(memory, before, strict=True)) if not torch.equal(m, old)}


def _handle(request: dict[str, Any], kept: dict[int, torch.Tensor], kernels: dict[str, Any]) -> Any:
    for key in request.get("forget", ()):
        kept.pop(key, None)
    match request["do"]:
        case "hello":
            return {"pid": os.getpid(), "kernels": sorted(KERNELS)}
        case "keep":
            kept[request["id"]] = request["tensor"]
            return None
        case "call":
            return resolve_kernel(request["kernel"])(*request["args"], **request["kwargs"])
        case "launch":
            return _launch(request, kernels)
        case other:
            raise ValueError(f"unknown request {other!r}")


def _describe(error: Exception) -> dict[str, Any]:
    """An error for the parent. `refused`: the wrapper itself did not take its arguments. The traceback is that of the
    kernel, without the frames of the interpreter and of this module."""
    cause = error.__cause__ if type(error).__name__ == "InterpreterError" and error.__cause__ is not None else error
    frames = [f for f in traceback.extract_tb(cause.__traceback__) if not f.filename.endswith(_OWN)]
    return {
        "refused": cause is error and isinstance(error, ValueError | TypeError), "type": type(cause).__name__,
        "message": str(cause), "traceback": "".join(traceback.format_list(frames)),
    }  # fmt: skip


def serve(read_fd: int, write_fd: int, parent: int) -> None:
    """Answer requests until the parent closes its end of the pipe or dies."""
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    kept: dict[int, torch.Tensor] = {}
    kernels: dict[str, Any] = {}
    with os.fdopen(read_fd, "rb") as requests, os.fdopen(write_fd, "wb") as answers, torch.no_grad():
        while True:
            try:
                request = wire.receive(requests, kept.__getitem__)
            except EOFError:
                return
            try:
                answer = {"ok": True, "result": _handle(request, kept, kernels)}
                wire.send(answers, answer)
            except BrokenPipeError:
                return
            except Exception as error:  # whatever a kernel raises goes to who asked for it
                wire.send(answers, {"ok": False} | _describe(error))
