"""The backend: what ONNX Runtime on CPU takes, and how a graph becomes an executable."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.backends.base import Backend
from moec.backends.onnxruntime.options import Options
from moec.ir import DType, Graph, Node

if TYPE_CHECKING:
    from moec.backends.onnxruntime.executable import OnnxExecutable

# what a graph may hold; 16-bit and 8-bit floats are carried in f32 (see types.carrier)
DTYPES = frozenset(DType) - {DType.C64}

# ops whose ONNX operator has no f64 kernel on CPU and no exact composition
NO_F64 = frozenset({"math.erf"})


class OnnxRuntimeBackend(Backend):
    """ONNX Runtime's CPUExecutionProvider.

    `compile(..., options=)` takes the fields of `Options`: `portable` (standard opset only), `experts` and
    `memory`.
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

    def compile(
        self, graph: Graph, *, threads: int | None = None, options: Mapping[str, Any] | None = None
    ) -> OnnxExecutable:
        from moec.backends.onnxruntime.executable import OnnxExecutable  # it imports the lowerings, they this module

        return OnnxExecutable.compile(graph, Options.of(options), threads, self)

    def load(self, graph: Graph, folder: Path, *, threads: int | None = None) -> OnnxExecutable:
        from moec.backends.onnxruntime.executable import OnnxExecutable

        return OnnxExecutable.load(graph, folder, threads, self)


backend = OnnxRuntimeBackend(
    "onnxruntime",
    dtypes=DTYPES,
    holds_wide=True,
    tuning="deinterleave_rope, merge_linears, sink_transposes, common_subexpressions, dead_code",
)
