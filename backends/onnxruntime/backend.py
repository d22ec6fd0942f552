"""The backend: what ONNX Runtime on CPU takes, and how a graph becomes an executable."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.backends.base import Backend
from moec.backends.cache import cache_of
from moec.backends.onnxruntime.nbits import rounded_products
from moec.backends.onnxruntime.options import Options
from moec.ir import DType, Graph, Node

if TYPE_CHECKING:
    from moec.backends.onnxruntime.executable import OnnxExecutable

# what a graph may hold; 16-bit and 8-bit floats are carried in f32 (see types.carrier)
DTYPES = frozenset(DType) - {DType.C64}

# ops whose ONNX operator has no f64 kernel on CPU and no exact composition
NO_F64 = frozenset({"math.erf"})


ROUNDED_ROWS = 2.0**-9  # how far the rows of products with integer weights are rounded, relative to a block's amax
PEAK = 25  # (amax / root mean square)² of a spiky block, as a gate times an up projection makes them


class OnnxRuntimeBackend(Backend):
    """ONNX Runtime's CPUExecutionProvider.

    `compile(..., options=)` takes the fields of `Options`: `portable` (standard opset only), `experts` and
    `memory`; and `cache`, a folder or Cache for optimised models.
    """

    def check(self, node: Node) -> str | None:
        wide = any(v is not None and v.dtype is DType.F64 for v in node.operands)
        exact_gelu = node.op == "math.gelu" and node.attrs["approximate"] == "none"
        exact_gelu |= node.attrs.get("activation") == "gelu"
        if wide and (node.op in NO_F64 or exact_gelu):
            return f"ONNX Runtime has no f64 kernel for {node.op}"
        eps = node.attrs.get("eps")
        if wide and eps is not None and struct.unpack("f", struct.pack("f", eps))[0] != eps:
            return f"attributes of ONNX operators are f32, eps={eps} is not"
        return None

    def coarse_sums(self, node: Node) -> tuple[float, int] | None:
        """Products with stored integer weights round activations to i8 per block: by amax / (127·√12) in the root mean
        square, 2⁻⁹ · amax with room to spare, where amax is about 3 times the root mean square of a block, and up to 5
        where that is spiky."""
        rounds = rounded_products(node)
        return (ROUNDED_ROWS, PEAK * rounds) if rounds else None

    def compile(
        self, graph: Graph, *, threads: int | None = None, options: Mapping[str, Any] | None = None
    ) -> OnnxExecutable:
        from moec.backends.onnxruntime.executable import OnnxExecutable  # it imports the lowerings, they this module

        cache, others = cache_of(options)
        return OnnxExecutable.compile(graph, Options.of(others), threads, self, cache)

    def load(
        self, graph: Graph, folder: Path, *, threads: int | None = None, options: Mapping[str, Any] | None = None
    ) -> OnnxExecutable:
        """A saved model has the options it was compiled with; of those here, only `cache` counts."""
        from moec.backends.onnxruntime.executable import OnnxExecutable

        return OnnxExecutable.load(graph, folder, threads, self, cache_of(options)[0])


backend = OnnxRuntimeBackend(
    "onnxruntime",
    dtypes=DTYPES,
    holds_wide=True,
    caches=True,
    in_place=True,
    has_options=True,
    tuning="deinterleave_rope, merge_linears, fuse_latent_attention, sink_transposes, common_subexpressions, dead_code",
)
