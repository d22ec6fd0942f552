"""A graph as an ONNX model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as onnx
from onnx_ir.passes.common import RemoveUnusedNodesPass

from moec.backends.base import Backend, lowering_failed, returned, ships
from moec.backends.onnxruntime.emit import MICROSOFT, Emitter
from moec.backends.onnxruntime.emitted import check_emitted
from moec.backends.onnxruntime.opsets import OPSET, choose, domain_versions
from moec.backends.onnxruntime.options import Options
from moec.backends.onnxruntime.types import onnx_type
from moec.backends.onnxruntime.weights import WeightReader
from moec.ir import CompileError, Dim, DType, Graph, Node, Value, Weight

IR_VERSION = 11


@dataclass(frozen=True, eq=False)
class Interface:
    """How a session of the model is used. `inputs` and `outputs` are the ONNX names of the graph's, in order; `sources`
    leads from prefixes of ONNX node names to IR nodes; the sizes of `needed` have to be 1 at least."""

    inputs: list[str]
    outputs: list[str]
    sources: dict[str, Node]
    needed: frozenset[Dim]

    def takes(self, binding: Mapping[str, int]) -> bool:
        """Whether no size is 0 that has to be 1 at least, where symbols have these sizes."""
        return all(size.evaluate(binding) > 0 for size in self.needed)


@dataclass(frozen=True, eq=False)
class Lowered:
    """An ONNX model of a graph. `choices` counts the forms of lowerings; `experts` says of layers
    of experts which form they took, what it costs and what the others would; `resident` says how many bytes the weights
    take in each `Options.memory`. `stored` leads from initialisers to the weights that they are made of and says how;
    `foreign`: some lowering is not ours."""

    model: onnx.Model
    interface: Interface
    choices: dict[str, int]
    experts: list[dict[str, Any]]
    weight_bytes: int
    resident: dict[str, int]
    reader: WeightReader
    stored: dict[str, tuple[tuple[Weight, ...], str]]
    foreign: bool

    def forget_weights(self) -> None:
        """Drop what reading the weights kept."""
        self.reader.forget()


def lower(
    graph: Graph, options: Options, backend: Backend, extra: list[Value] | None = None, *, empty: bool = False
) -> Lowered:
    """Lower a graph by the lowerings of `backend`; values of `extra` become further outputs. `empty`: for any sizes,
    also where a faster model needs some to be 1 at least. Raises CompileError."""
    lowered, exact = _lower(graph, options, backend, extra, None, empty)
    # where no opset holds all operators, those that do not fit are converted
    opset = lowered.model.graph.opset_imports[""]
    return lowered if exact else _lower(graph, options, backend, extra, opset, empty)[0]


def _lower(
    graph: Graph, options: Options, backend: Backend, extra: list[Value] | None, opset: int | None, empty: bool
) -> tuple[Lowered, bool]:
    """(the model, whether its opset suits all of its operators); `opset`: as `Emitter.opset`."""
    e = Emitter(graph, options, backend, opset, empty=empty)
    inputs = []
    for v in graph.inputs:
        emitted = onnx.Value(
            name=e.unique(str(v.name)), type=onnx.TensorType(onnx_type(v.dtype)), shape=interface_shape(v)
        )
        inputs.append(emitted)
        e.bind(v, emitted)
    # outputs are named before inner values so that they get the names of the graph where those are free
    names = [e.unique(n) for n in graph.output_names]
    names += [e.unique(f"tap_{i}") for i in range(len(extra or []))]
    emit_nodes(e, graph)
    outputs = []
    for v, name in zip([*graph.outputs, *(extra or [])], names, strict=True):
        out = e.op("Identity", e.value(v))
        out.name = name
        out.type, out.shape = onnx.TensorType(onnx_type(v.dtype)), interface_shape(v)
        outputs.append(out)
    written, exact = choose(e.native, e.foreign)
    imports = {"": written, **domain_versions(e.foreign)}
    if not outputs:  # of a model whose results are all constant; ONNX Runtime asks for one
        outputs.append(e.op("Identity", e.scalar(0, DType.I64)))
        outputs[0].type, outputs[0].shape = onnx.TensorType(onnx_type(DType.I64)), onnx.Shape([])
    body = onnx.Graph(
        inputs,
        outputs,
        nodes=e.nodes,
        initializers=tuple(e.initializers.values()),
        opset_imports=imports if options.portable else {**imports, MICROSOFT: 1},
        name=graph.name or "graph",
    )
    model = onnx.Model(body, ir_version=IR_VERSION, producer_name="moec")
    RemoveUnusedNodesPass()(model)
    if all(n.domain != MICROSOFT for n in body.all_nodes()):
        body.opset_imports.pop(MICROSOFT, None)
    total = sum(v.const_value.nbytes for v in body.initializers.values() if v.const_value is not None)
    kept = [e.resident[name] for name in body.initializers if name in e.resident]
    resident = {"fast": sum(folded for folded, _ in kept), "fp8": sum(stored for _, stored in kept)}
    named = [str(v.name) for v in inputs]
    stored = {name: e.read_from[name] for name in body.initializers if name in e.read_from}
    interface = Interface(named, names, e.sources, frozenset(e.needed))
    return Lowered(model, interface, e.choices, e.experts, total, resident, e.reader, stored, e.others), exact


def interface_shape(v: Value) -> onnx.Shape:
    """Symbols by name; other symbolic sizes are left open."""
    return onnx.Shape([s if isinstance(s, int) else str(s) if s.is_symbol else None for s in v.shape])


def emit_nodes(e: Emitter, graph: Graph) -> None:
    """Lower every node in order."""
    for i, node in enumerate(graph.nodes):
        fn = e.backend.lowering(node.op)
        if fn is None:
            reason = e.backend.missing(node)
            raise CompileError(
                f"{node.op}: {reason}", code="unsupported-op", location=node.location, hint="legalise the graph first"
            )
        before = len(e.nodes)
        with e.scope(node, i):
            try:
                emitted = fn(e, node)
            except CompileError as error:
                raise (error.located(node.location) if ships(fn) else lowering_failed(fn, node, error)) from None
            except Exception as error:  # whatever a lowering does wrong is said with its place
                raise lowering_failed(fn, node, error) from error
        results = returned(fn, node, emitted, onnx.Value)
        if not ships(fn):
            e.others = True
            try:
                check_emitted(e, node, e.nodes[before:], results, OPSET)
            except CompileError as error:
                raise lowering_failed(fn, node, error) from None
        for v, out in zip(node.results, results, strict=True):
            e.bind(v, out)
        e.sizes.introduce(node)
