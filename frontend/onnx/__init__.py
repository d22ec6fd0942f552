"""ONNX → IR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from onnx_ir.passes.common import InlinePass

from moec.frontend.onnx import (  # noqa: F401  (each registers its imports)
    attention,
    convolution,
    elementwise,
    index,
    linear,
    microsoft,
    microsoft_attention,
    microsoft_moe,
    norm,
    padding,
    pooling,
    quant,
    recurrent,
    reduction,
    resize,
    shape,
)
from moec.frontend.onnx.assume import Facts, explore
from moec.frontend.onnx.check import check_model
from moec.frontend.onnx.files import check_tensor, read_model, tensors
from moec.frontend.onnx.importer import Importer
from moec.frontend.onnx.registry import imports
from moec.frontend.signature import Signature, by_name, positional
from moec.ir import ArgumentTypeError, CompileError, Dim, Graph

__all__ = ["Imported", "import_onnx", "imports"]


@dataclass(frozen=True, eq=False)
class Imported:
    """A graph and how it is called; `extern`: operators that came in as themselves, with the reason."""

    graph: Graph
    signature: Signature
    extern: dict[str, str]


def import_onnx(
    model: str | Path | onnx.ModelProto | onnx_ir.Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Imported:
    """The graph of an ONNX model. Inputs and outputs keep their names and order; weights are read when needed; model
    functions are inlined.

    model: the path of an .onnx file, or a model in memory. args, kwargs: example arguments, by position or name. A
    number among them takes the place of its input, which the graph then lacks; sizes of tensors decide the ways that
    the model cannot keep open. Raises CompileError naming the node, tensor or file that is wrong or not supported, and
    ArgumentTypeError for arguments that the model does not take.
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
    names = [str(v.name) for v in parsed.graph.inputs if v.name not in parsed.graph.initializers]
    arguments = by_name(names, args, kwargs or {})
    numbers = {n: a for n, a in arguments.items() if isinstance(a, bool | int | float)}
    example = _sizes(parsed, arguments)

    def build(facts: Facts) -> Imported:
        importer = Importer(parsed, protos, folder, facts, numbers)
        graph = importer.run()
        signature = replace(positional(graph, names), constants={names.index(n): a for n, a in numbers.items()})
        return Imported(graph, replace(signature, bounds=facts.bounds()), importer.refused)

    return explore(build, example)


def _sizes(model: onnx_ir.Model, arguments: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that example arguments give to the symbols of the inputs."""
    if not any(isinstance(a, torch.Tensor) for a in arguments.values()):
        return {}
    scratch = Importer(model, {}, None)
    scratch.inputs()
    found: dict[str, int] = {}
    for v in scratch.graph.inputs:
        given = arguments.get(str(v.name))
        if isinstance(given, torch.Tensor) and given.dim() == v.type.rank:
            for size, n in zip(v.shape, given.shape, strict=True):
                if isinstance(size, Dim) and size.is_symbol:
                    found.setdefault(str(size), n)
    return found
