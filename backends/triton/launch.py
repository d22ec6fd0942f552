"""Launching a kernel: on the GPU, in the interpreter, or only writing down what would be launched.

Every wrapper in `moec.backends.triton.kernels` ends in `launch`, so that ahead-of-time compilation (`aot.py`) sees
exactly the kernels, block sizes and argument types that a GPU would get.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import KernelInterface

from moec.backends.triton.interpreter import exact_interpreter

FP_FUSION = {"enable_fp_fusion": True}
"""Contract a · b + c to fused multiply-adds; given explicitly because Triton's default changes after 3.9."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the kernel, its grid, positional arguments, compile-time constants and launch options."""

    kernel: KernelInterface
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


_recorder: ContextVar[list[Launch] | None] = ContextVar("moec_triton_recorder", default=None)


def interpreted() -> bool:
    """True where triton was imported with TRITON_INTERPRET=1, so that kernels run as Python on the CPU."""
    return isinstance(tl.sum, InterpretedFunction)


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect launches instead of running them; wrappers may then be called with tensors on the meta device."""
    launches: list[Launch] = []
    token = _recorder.set(launches)
    try:
        yield launches
    finally:
        _recorder.reset(token)


def recording() -> bool:
    """True inside `record_launches`."""
    return _recorder.get() is not None


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **constexprs: Any
) -> None:
    """Run `kernel` over `grid` (nothing happens when a side of it is 0).

    Raises RuntimeError when the kernel would need a GPU and the tensors are not on one.
    """
    if 0 in grid:
        return
    launches = _recorder.get()
    if launches is not None:
        launches.append(Launch(kernel, grid, args, constexprs, num_warps, num_stages))
        return
    if isinstance(kernel, InterpretedFunction):
        with exact_interpreter():
            kernel[grid](*args, **constexprs)
        return
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    if device.type != "cuda":
        raise RuntimeError(
            f"kernel {kernel.__name__} needs CUDA tensors, got tensors on {device}; "
            "moec.backends.triton.run(name, ...) runs it in the interpreter instead"
        )
    with torch.cuda.device(device):
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **FP_FUSION, **constexprs)


def cdiv(a: int, b: int) -> int:
    """Ceiling of a / b."""
    return -(-a // b)


def next_pow2(n: int, at_least: int = 1) -> int:
    """The smallest power of two that is >= n and >= at_least."""
    return max(at_least, 1 << max(n - 1, 0).bit_length())
