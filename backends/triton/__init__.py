"""Triton kernels: on a GPU, in Triton's interpreter without one, and compiled ahead of time to be inspected.

Importing this package does not import triton, which decides at its first import whether it interprets.
"""

from moec.backends.triton.backend import TritonBackend, backend
from moec.backends.triton.registry import KERNELS
from moec.backends.triton.runner import InterpreterWorker, KernelError, Resident, WorkerCrashed, mode, run, worker

__all__ = [
    "KERNELS", "InterpreterWorker", "KernelError", "Resident", "TritonBackend", "WorkerCrashed", "backend", "mode",
    "run", "worker",
]  # fmt: skip
