"""Generated elementwise kernels: any number of pointwise operations in one pass over memory."""

from __future__ import annotations

import hashlib
import linecache
import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.jit import KernelInterface

from moec.backends.triton.codegen import Layout, Program, render
from moec.backends.triton.kernels import scalar_math
from moec.backends.triton.kernels.checks import describe, require, require_same_device
from moec.backends.triton.kernels.tiles import interpreter_tiles
from moec.backends.triton.launch import cdiv, launch, next_pow2

# an attribute of an op from outside may be written into its expression as Python prints it
_CONSTANTS = {name: tl.constexpr(float(name)) for name in ("inf", "nan")}
_FUNCTIONS = {name: fn for name, fn in vars(scalar_math).items() if isinstance(fn, KernelInterface)}


@lru_cache(maxsize=4096)
def kernel(program: Program, layout: Layout) -> Any:
    """The Triton function of a program for a memory layout."""
    digest = hashlib.sha256(repr((program, layout)).encode()).hexdigest()[:12]
    name = f"elementwise_{digest}"
    source = render(name, program, layout)
    filename = f"<moec {name}>"
    # Triton reads a kernel's source through inspect, which asks linecache
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    namespace: dict[str, Any] = {"tl": tl, "__name__": __name__, **_FUNCTIONS, **_CONSTANTS}
    exec(compile(source, filename, "exec"), namespace)
    return triton.jit(namespace[name])


def collapse(shape: tuple[int, ...], strides: list[tuple[int, ...]]) -> tuple[list[int], list[list[int]]]:
    """Merge axes that every tensor walks through as one, and drop axes of size 1 → (sizes, strides per tensor)."""
    sizes: list[int] = []
    kept: list[list[int]] = [[] for _ in strides]
    for d, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(k[-1] == s[d] * size for k, s in zip(kept, strides, strict=True)):
            sizes[-1] *= size
            for k, s in zip(kept, strides, strict=True):
                k[-1] = s[d]
        else:
            sizes.append(size)
            for k, s in zip(kept, strides, strict=True):
                k.append(s[d])
    return sizes, kept


def elementwise(
    body: str,
    outputs: tuple[tuple[str, torch.dtype], ...],
    shape: tuple[int, ...],
    *inputs: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Run a generated program (`codegen.program`) over `shape`; one contiguous tensor of that shape per output.

    inputs: at least one tensor, any strides, each broadcasting to `shape`; x0, x1, … of the body.
    outputs: (variable, dtype) pairs. Raises ValueError for an input that does not broadcast, or on another device.
    """
    require(len(inputs) > 0, "an elementwise program needs an input")
    require_same_device(**{f"input {i}": x for i, x in enumerate(inputs)})
    device = inputs[0].device
    results = tuple(torch.empty(shape, dtype=dtype, device=device) for _, dtype in outputs)
    numel = math.prod(shape)
    strides = []
    for i, x in enumerate(inputs):
        try:
            strides.append(x.expand(shape).stride())
        except RuntimeError:
            raise ValueError(f"input {i}, {describe(x)}, does not broadcast to {list(shape)}") from None
    if numel == 0:
        return results
    sizes, walks = collapse(tuple(shape), strides)
    dense = [math.prod(sizes[d + 1 :]) for d in range(len(sizes))]
    moving = [None if w == dense else tuple(d for d, s in enumerate(w) if s) for w in walks]
    reach = max([numel, *(sum((n - 1) * s for n, s in zip(sizes, w, strict=True)) for w in walks)])
    layout = Layout(
        len(sizes), tuple((x.dtype, axes) for x, axes in zip(inputs, moving, strict=True)), wide=reach >= 2**30
    )
    function = kernel(Program(body, tuple(outputs)), layout)
    block = next_pow2(min(numel, 1 << 16)) if interpreter_tiles() else 1024
    with np.errstate(all="ignore"):  # the interpreter computes in NumPy; overflow and 0/0 are results here
        launch(
            function, (cdiv(numel, block),),
            *(_bytes(x) for x in (*inputs, *results)), numel, *sizes[1:],
            *(w[d] for w, axes in zip(walks, moving, strict=True) if axes is not None for d in axes),
            BLOCK=block, num_warps=4, num_stages=1,
        )  # fmt: skip
    return results


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.dtype == torch.bool else x
