"""Lowerings of `extern.aten_*` through torch's own ONNX exporter: the op is exported alone, its nodes are spliced in.

What that exporter has no form for, and what ONNX Runtime has no kernel for, is refused with the reason.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import onnx_ir as onnx
import onnxruntime
import torch
from onnx_ir.passes.common import InlinePass

from moec.backends.onnxruntime.backend import backend
from moec.backends.onnxruntime.emit import Emitter
from moec.backends.onnxruntime.types import carrier
from moec.ir import DType, Node, TensorType, lookup
from moec.ir.ops.extern_aten import FORMS, NAMES, call, op_of, overload

OPSET = 23
# of those that decompose, what has operators of its own that are tried first
_OWN = ("linalg_det", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
_OPS = {op_of(name): name for name in NAMES if name not in FORMS or name in _OWN}
_CACHE = 256  # translated calls


@dataclass(frozen=True)
class Call:
    """What a translation depends on."""

    name: str
    operands: tuple[TensorType | None, ...]
    attrs: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(node: Node) -> Call:
        types = (None if v is None else v.type.with_dtype(carrier(v.dtype)) for v in node.operands)
        attrs = ((k, _carried(v)) for k, v in node.attrs.items())
        return Call(_OPS[node.op], tuple(types), tuple(sorted(attrs)))


def _carried(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_carried, value))
    if isinstance(value, TensorType):
        return value.with_dtype(carrier(value.dtype))
    return carrier(value) if isinstance(value, DType) else value


class _Module(torch.nn.Module):
    """The op on the operands that are there."""

    def __init__(self, call: Call):
        super().__init__()
        self.call = call

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(tensors)
        operands = [None if t is None else next(given) for t in self.call.operands]
        attrs = dict(self.call.attrs)
        pairs = attrs.pop("complex")
        attrs.pop("types")
        named = lookup(op_of(self.call.name)).named_operands(operands) | attrs
        return call(overload(self.call.name), named, pairs)


@lru_cache(_CACHE)
def translate(call: Call) -> tuple[bytes | None, str]:
    """The ONNX model of a call, serialised; or None and why there is none."""
    if not all(t is None or t.is_static for t in call.operands) or not all(
        t.is_static for t in dict(call.attrs)["types"]
    ):
        return None, "with dynamic sizes it has no lowering to ONNX Runtime"
    examples = tuple(_example(t) for t in call.operands if t is not None)
    try:
        with _quiet():
            program = torch.onnx.export(
                _Module(call), examples, dynamo=True, opset_version=OPSET, verbose=False, optimize=True
            )
            assert program is not None
            InlinePass()(program.model)
            proto = onnx.to_proto(program.model)
    except Exception as e:  # whatever the exporter raises
        return None, f"torch has no ONNX form of aten::{call.name}: {_reason(e)}"
    foreign = {n.domain for n in program.model.graph.all_nodes()} - {""}
    if foreign:
        return None, f"torch's ONNX form of aten::{call.name} needs {', '.join(sorted(foreign))}"
    data = proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # whatever ONNX Runtime raises
        return None, f"ONNX Runtime does not take torch's ONNX form of aten::{call.name}: {_reason(e)}"
    problem = _differs(call, session)
    return (data, "") if problem is None else (None, f"torch's ONNX form of aten::{call.name} {problem}")


def _differs(call: Call, session: onnxruntime.InferenceSession) -> str | None:
    """How the translation differs from the op itself on seeded numbers (some forms ignore an argument), or None."""
    generator = torch.Generator().manual_seed(0)
    inputs = [_sample(t, generator) for t in call.operands if t is not None]
    try:
        want = _Module(call)(*[t.clone() for t in inputs])
    except Exception as e:  # whatever torch raises
        return f"cannot be checked: {_reason(e)}"
    feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)}
    try:
        got = [torch.as_tensor(y) for y in session.run(None, feed)]
    except Exception as e:  # whatever ONNX Runtime raises
        return f"does not run: {_reason(e)}"
    for w, g in zip(want, got, strict=True):
        if (w.dtype, w.shape) != (g.dtype, g.shape):
            return f"gives {g.dtype} {list(g.shape)} for {w.dtype} {list(w.shape)}"
        scale = float(w.double().nan_to_num(0, 0, 0).abs().max()) if w.numel() else 0.0
        if not torch.allclose(w.double(), g.double(), rtol=1e-3, atol=1e-3 * scale + 1e-6, equal_nan=True):
            return "gives other numbers"
    return None


def _sample(t: TensorType, generator: torch.Generator) -> torch.Tensor:
    shape: Any = t.shape
    if t.dtype.is_float:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(t.dtype.torch)
    if t.dtype is DType.BOOL:
        return torch.rand(shape, generator=generator) < 0.5
    return torch.zeros(shape, dtype=t.dtype.torch)  # an index that every axis has


def _example(t: TensorType) -> torch.Tensor:
    shape: Any = t.shape
    return torch.zeros(shape, dtype=t.dtype.torch)


def _reason(error: Exception) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    loggers = [
        logging.getLogger(n) for n in logging.root.manager.loggerDict if n.split(".")[0] in ("torch", "onnxscript")
    ]
    before = [(log, log.disabled) for log in loggers]
    for log in loggers:
        log.disabled = True
    parent = logging.getLogger("torch.onnx")  # loggers made at the exporter's first use take its level
    level = parent.level
    parent.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        parent.setLevel(level)
        for log, disabled in before:
            log.disabled = disabled


def _check(node: Node) -> str | None:
    data, reason = translate(Call.of(node))
    return None if data is not None else reason


@backend.lowers(*_OPS, check=_check)
def extern_aten(e: Emitter, node: Node) -> tuple[onnx.Value, ...]:
    data, reason = translate(Call.of(node))
    if data is None:
        raise e.refuse(node, reason)
    model = onnx.from_proto(onnx_proto(data))
    values: dict[onnx.Value, onnx.Value] = {}
    given = [v for v in e.operands(node) if v is not None]
    for inner, outer in zip(model.graph.inputs, given, strict=True):
        values[inner] = outer
    return splice(e, model.graph, values)


def onnx_proto(data: bytes) -> Any:
    import onnx as onnx_package

    return onnx_package.load_model_from_string(data)


def splice(e: Emitter, graph: onnx.Graph, values: dict[onnx.Value, onnx.Value]) -> tuple[onnx.Value, ...]:
    """Append the nodes of an ONNX graph, whose inputs `values` maps to ours; the values of its outputs."""
    for initializer in graph.initializers.values():
        assert initializer.const_value is not None
        values[initializer] = e.constant(initializer.const_value.numpy())
    nodes = list(graph)
    graph.remove(nodes)
    for node in nodes:
        _adopt(e, node, values)
        e.nodes.append(node)
    return tuple(_alias(e, values.get(v, v), v in graph.inputs) for v in graph.outputs)


def _alias(e: Emitter, value: onnx.Value, passed: bool) -> onnx.Value:
    return e.op("Identity", value) if passed else value


def _adopt(e: Emitter, node: onnx.Node, values: Mapping[onnx.Value, onnx.Value]) -> None:
    """Give a node of another graph unique names and our values, in its subgraphs too."""
    for i, v in enumerate(node.inputs):
        if v is not None and v in values:
            node.replace_input_with(i, values[v])
    node.name = e.unique(f"{e.scope_name}:{node.op_type}")
    for i, out in enumerate(node.outputs):
        out.name = node.name if len(node.outputs) == 1 else f"{node.name}.{i}"
    for attribute in node.attributes.values():
        if attribute.type == onnx.AttributeType.GRAPH:
            inner = attribute.as_graph()
            for v in inner.inputs:
                v.name = e.unique(f"{e.scope_name}:{v.name}")
            for v in list(inner.initializers.values()):
                v.name = e.unique(f"{e.scope_name}:{v.name}")
            for inner_node in inner:
                _adopt(e, inner_node, values)
