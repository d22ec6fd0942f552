"""Which opset a model is written in: one in which every operator means what it was made for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import onnx_ir as onnx
from onnx import defs

from moec.ir import CompileError
from moec.ir.ops.extern import schema_at, table

OPSET = 23  # the first with RMSNormalization, RotaryEmbedding and Attention
# what our lowerings emit of these means the same in all opsets from the number on
_STABLE = {"Identity": 1, "Transpose": 1, "Cast": 9, "Reshape": 5, "Concat": 4, "Squeeze": 13, "Unsqueeze": 13}
EARLIEST = 7  # ONNX Runtime has no kernels of opsets before
Range = tuple[int, int]


@dataclass(frozen=True)
class Requirement:
    """An operator with the opset that it was made for, and the operators of its bodies."""

    domain: str
    op_type: str
    version: int
    bodies: tuple[tuple[str, str], ...] = ()

    def range(self) -> Range:
        """The opsets in which it is the same operator."""
        ranges = [span(self.domain, self.op_type, self.version)]
        if not self.domain:
            ranges += [span(d, o, self.version) for d, o in self.bodies if d in ("", "ai.onnx")]
        return intersection(ranges)


def latest() -> int:
    return defs.onnx_opset_version()


def span(domain: str, op_type: str, version: int) -> Range:
    """First and last opset in which the operator has the schema that it has in `version`."""
    since = schema_at(domain, op_type, version).since_version
    later = [s.since_version for s in table()["" if domain == "ai.onnx" else domain, op_type]]
    after = [v for v in later if v > since]
    return since, min(after) - 1 if after else latest()


def intersection(ranges: Iterable[Range]) -> Range:
    low, high = EARLIEST, latest()
    for first, last in ranges:
        low, high = max(low, first), min(high, last)
    return low, high


def native_range(nodes: Iterable[Any]) -> Range:
    """Opsets for what our own lowerings emit: written for `OPSET`, and versions after it only add to it."""
    low = 1
    for n in nodes:
        if n.domain or not defs.has(n.op_type):
            continue
        if not defs.has(n.op_type, OPSET):
            low = max(low, defs.get_schema(n.op_type).since_version)
            continue
        if any(a.type == onnx.AttributeType.GRAPH for a in n.attributes.values()):
            low = max(low, OPSET)
        stable = n.op_type in _STABLE and "saturate" not in n.attributes and "allowzero" not in n.attributes
        low = max(low, _STABLE[n.op_type] if stable else defs.get_schema(n.op_type, OPSET).since_version)
    return low, latest()


def nearest(low: int, high: int) -> int:
    return min(max(OPSET, low), high)


def choose(native: Iterable[Any], foreign: Iterable[Requirement]) -> tuple[int, bool]:
    """(opset, whether all operators are what they were made for in it)."""
    ranges = [native_range(native), *(r.range() for r in foreign if not r.domain)]
    low, high = intersection(ranges)
    if low <= high:
        return nearest(low, high), True
    return max(OPSET, low), False


def domain_versions(foreign: Iterable[Requirement]) -> dict[str, int]:
    """The version of every other domain. Raises CompileError where two operators want different ones."""
    found: dict[str, list[Requirement]] = {}
    for r in foreign:
        if r.domain:
            found.setdefault(r.domain, []).append(r)
    versions = {}
    for domain, wanted in found.items():
        low, high = intersection(r.range() for r in wanted)
        if low > high:
            raise CompileError(
                f"no version of {domain} has {', '.join(sorted(f'{r.op_type} of {r.version}' for r in wanted))}",
                code="onnxruntime",
            )
        versions[domain] = min(max(r.version for r in wanted), high)
    return versions


def converted(proto: Any, inputs: list[Any], outputs: list[Any], source: int, target: int) -> list[Any]:
    """A node in another opset, by ONNX's version converter: one node or several. Raises CompileError where it has no
    way there."""
    from onnx import helper, version_converter

    graph = helper.make_graph([proto], "one", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", source)])
    try:
        new = version_converter.convert_version(model, target)
    except Exception as error:  # the converter's errors have no common base
        raise CompileError(
            f"{proto.op_type} of opset {source} cannot be written in opset {target}, which the rest of the graph needs"
            f": {error}",
            code="onnxruntime",
        ) from None
    if new.graph.initializer:
        raise CompileError(f"{proto.op_type} of opset {source} turns into constants in {target}", code="onnxruntime")
    return list(new.graph.node)


def body_operators(graph: Any) -> list[tuple[str, str]]:
    """(domain, operator) of every node of a body (GraphProto), bodies inside included."""
    found = []
    for n in graph.node:
        found.append((n.domain, n.op_type))
        for a in n.attribute:
            if a.HasField("g"):
                found += body_operators(a.g)
    return found


def attach(graph: onnx.Graph, outside: dict[str, onnx.Value]) -> None:
    """Connect what a body reads from outside, by name, to the values themselves."""
    for node in graph.all_nodes():
        for i, x in enumerate(node.inputs):
            if x is not None and x.producer() is None and x.name in outside and not x.is_initializer():
                node.replace_input_with(i, outside[x.name])


def rename_values(graph: onnx.Graph, prefix: str) -> None:
    """Give everything that a body defines a name that nothing else in the model has."""
    for value in [*graph.inputs, *graph.initializers.values(), *(o for n in graph for o in n.outputs)]:
        if value.name:
            value.name = f"{prefix}/{value.name}"
    for node in graph:
        if node.name:
            node.name = f"{prefix}/{node.name}"
        for attribute in node.attributes.values():
            if attribute.type == onnx.AttributeType.GRAPH:
                rename_values(attribute.as_graph(), prefix)
