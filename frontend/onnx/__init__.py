"""ONNX → IR."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir
from onnx_ir.passes.common import InlinePass

from moec.frontend.onnx import (  # noqa: F401  (each registers its imports)
    attention,
    convolution,
    elementwise,
    index,
    linear,
    microsoft,
    norm,
    quant,
    reduction,
    shape,
)
from moec.frontend.onnx.check import check_model
from moec.frontend.onnx.files import check_tensor, read_model, tensors
from moec.frontend.onnx.importer import Importer
from moec.frontend.onnx.registry import imports
from moec.frontend.signature import Signature, positional
from moec.ir import ArgumentTypeError, CompileError, Graph

__all__ = ["Imported", "import_onnx", "imports"]


@dataclass(frozen=True, eq=False)
class Imported:
    """A graph and how it is called; `extern`: operators that came in as themselves, with the reason."""

    graph: Graph
    signature: Signature
    extern: dict[str, str]


def import_onnx(model: str | Path | onnx.ModelProto | onnx_ir.Model) -> Imported:
    """The graph of an ONNX model. Inputs and outputs keep their names and order; weights are read when needed; model
    functions are inlined.

    model: the path of an .onnx file, or a model in memory. Raises CompileError naming the node, tensor or file that is
    wrong or not supported.
    """
    folder: Path | None = None
    if isinstance(model, str | Path):
        folder = Path(model).absolute().parent
        proto = read_model(model)
    elif isinstance(model, onnx_ir.Model):
        proto = onnx_ir.to_proto(model)
    elif isinstance(model, onnx.ModelProto):
        proto = onnx.ModelProto()
        proto.CopyFrom(model)
    else:
        raise ArgumentTypeError(f"{type(model).__name__} is no ONNX model", code="arguments")
    for t in tensors(proto):
        check_tensor(t, folder)
    check_model(proto)
    if proto.graph.sparse_initializer:
        raise CompileError("sparse initializers are not supported", code="unsupported-model")
    protos = {t.name: t for t in proto.graph.initializer}
    try:
        parsed = onnx_ir.from_proto(proto)
        if parsed.functions:
            InlinePass()(parsed)
    except CompileError:
        raise
    except Exception as e:  # onnx_ir's errors have no common base; what they are about is in their text
        raise CompileError(f"the model is malformed: {type(e).__name__}: {e}", code="structure") from None
    importer = Importer(parsed, protos, folder)
    graph = importer.run()
    return Imported(graph, positional(graph), importer.refused)
