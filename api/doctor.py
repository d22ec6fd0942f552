"""What is installed and whether it works."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from moec.backends import BACKENDS, get_backend
from moec.ir import Graph, parse

PACKAGES = ("moec", "torch", "onnx", "onnx-ir", "onnxruntime", "triton", "transformers", "numpy", "safetensors")
OPTIONAL = {"triton", "transformers"}

PROGRAM = """
graph(%x: f32[T, 32]) -> (%y: f32[T, 32]) {
  weight @norm: f32[32]
  weight @linear: f32[32, 32]
  %0: f32[T, 32] = norm.rms(%x, @norm) {eps=1e-06}
  %1: f32[T, 32] = linear.linear(%0, @linear)
  %2: f32[T, 32] = math.silu(%1)
  %3: f32[T, 32] = math.add(%x, %2)
  return %3
}
"""


@dataclass(frozen=True)
class Check:
    what: str
    state: str
    ok: bool = True


def examine() -> list[Check]:
    """All checks, in the order they are printed."""
    checks = [Check("python", f"{platform.python_version()} on {platform.machine()}")]
    for package in PACKAGES:
        try:
            checks.append(Check(package, version(package)))
        except PackageNotFoundError:
            checks.append(Check(package, "not installed", package in OPTIONAL))
    checks.append(Check("CPU", f"{torch.get_num_threads()} threads"))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    checks.append(Check("GPU", ", ".join(gpus) or "none: triton runs in its interpreter"))
    return checks + [self_check(name) for name in BACKENDS]


def sample_program() -> Graph:
    """A few nodes with weights, one dynamic size."""
    graph = parse(PROGRAM)
    generator = torch.Generator().manual_seed(0)
    graph.bind_weights({n: torch.randn(v.shape, generator=generator) / 6 for n, v in graph.weights.items()})
    return graph


def self_check(backend: str) -> Check:
    """A small program on one backend against the reference."""
    from moec.comparing import compare

    what = f"backend {backend}"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return Check(what, "triton is not installed")
    x = torch.linspace(-2, 2, 5 * 32).reshape(5, 32)
    try:
        get_backend(backend)
        result = compare(sample_program(), (x,), backends=("reference", backend))
    except Exception as e:  # whatever is wrong with the machine is what is asked for
        return Check(what, f"failed: {type(e).__name__}: {e}", ok=False)
    error = max(o.difference.max_error for o in result.outputs)
    return Check(what, f"agrees with the reference to {error:.1e}", result.ok)
