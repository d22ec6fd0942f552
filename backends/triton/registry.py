"""The kernels that can be run by name, and where each lives. Importing this module does not import triton."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

_PACKAGE = "moec.backends.triton.kernels"

KERNELS = {
    "attention": f"{_PACKAGE}.attention",
    "elementwise": f"{_PACKAGE}.elementwise",
    "experts": f"{_PACKAGE}.experts",
    "fp8_experts": f"{_PACKAGE}.fp8_experts",
    "fp8_linear": f"{_PACKAGE}.fp8_linear",
    "linear": f"{_PACKAGE}.linear",
    "linear_attention": f"{_PACKAGE}.linear_attention",
    "quantize": f"{_PACKAGE}.quantize",
    "rms_norm": f"{_PACKAGE}.rms_norm",
    "route": f"{_PACKAGE}.route",
}


def resolve_kernel(name: str) -> Callable[..., Any]:
    """The wrapper function called `name`. Raises ValueError, naming the known ones, when there is none."""
    if name not in KERNELS:
        raise ValueError(f"no Triton kernel is called {name!r}; known: {', '.join(sorted(KERNELS))}")
    return getattr(import_module(KERNELS[name]), name)
