"""Whether a model is one: opsets, names, order, functions. Everything said here names what is wrong and where."""

from __future__ import annotations

from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from typing import Any

import onnx

from moec.ir import CompileError, Location

DEEPEST = 16  # bodies in bodies
MOST_NODES = 1_000_000  # with all functions expanded


def check_model(model: onnx.ModelProto) -> None:
    """Sorts nodes that are out of order. Raises CompileError."""
    if not model.HasField("graph"):
        raise CompileError("the file holds no graph: it is no ONNX model", code="file")
    check_opsets(model.opset_import, "the model")
    check_functions(model)
    check_graph(model.graph, set(), 0)


def check_opsets(imports: Iterable[Any], what: str) -> None:
    versions: dict[str, int] = {}
    for o in imports:
        domain = "" if o.domain == "ai.onnx" else o.domain
        if versions.setdefault(domain, o.version) != o.version:
            raise CompileError(f"{what} imports two opsets of {domain or 'ai.onnx'}", code="opset")
    latest = onnx.defs.onnx_opset_version()
    version = versions.get("")
    if version is not None and not 1 <= version <= latest:
        raise CompileError(f"{what} is of opset {version}; 1 to {latest} are known", code="opset")
    if not versions:
        raise CompileError(f"{what} imports no opset", code="opset")


def check_functions(model: onnx.ModelProto) -> None:
    """No two of one name, and none that calls itself."""
    functions = {}
    for f in model.functions:
        key = f.domain, f.name, f.overload
        if key in functions:
            raise CompileError(f"function {f.domain}.{f.name} is defined twice", code="name")
        functions[key] = f
    calls = {key: [c for c in _called(f.node) if c in functions] for key, f in functions.items()}
    try:
        TopologicalSorter(calls).prepare()
    except CycleError as e:
        names = " -> ".join(f"{d}.{n}" for d, n, _ in e.args[1])
        raise CompileError(f"recursive function: {names}", code="structure") from None
    sizes: dict[tuple[str, str, str], int] = {}
    for key in TopologicalSorter(calls).static_order():
        if key in functions:
            sizes[key] = sum(sizes.get(c, 1) for c in _called(functions[key].node))
    total = sum(sizes.get(c, 1) for c in _called(model.graph.node))
    if total > MOST_NODES:
        raise CompileError(f"functions expand to {total} nodes; at most {MOST_NODES} are read", code="size")
    opsets = {o.domain or "ai.onnx": o.version for o in model.opset_import}
    for f in functions.values():
        if f.opset_import:
            check_opsets(f.opset_import, f"function {f.domain}.{f.name}")
        for domain, version in ((o.domain or "ai.onnx", o.version) for o in f.opset_import):
            if opsets.get(domain, version) != version:
                raise CompileError(
                    f"function {f.domain}.{f.name} is of opset {version} of {domain}, the model of opset "
                    f"{opsets[domain]}; functions of another opset than the model's are not supported",
                    code="unsupported-model",
                    hint="onnx.inliner.inline_local_functions(model, convert_version=True) converts them",
                )
        body = onnx.GraphProto(name=f.name, node=f.node)
        _check_body(body, set(f.input), 0)


def _called(nodes: Iterable[Any]) -> list[tuple[str, str, str]]:
    found = []
    for n in nodes:
        found.append((n.domain, n.op_type, n.overload))
        for a in n.attribute:
            for g in ([a.g] if a.HasField("g") else []) + list(a.graphs):
                found += _called(g.node)
    return found


def check_graph(graph: Any, outer: set[str], depth: int) -> None:
    """Names are defined once and before they are used (nodes are sorted where that is all)."""
    inputs = [v.name for v in graph.input]
    weights = [*(t.name for t in graph.initializer), *(t.values.name for t in graph.sparse_initializer)]
    for what, names in (("input", inputs), ("initializer", weights)):
        for name in names:
            if not name:
                raise CompileError(f"an {what} has no name", code="name")
        doubled = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
        if doubled:
            raise CompileError(f"duplicate {what} names: {', '.join(doubled)}", code="name")
    _check_body(graph, {*outer, *inputs, *weights}, depth, set(inputs) | set(weights))


def _check_body(graph: Any, known: set[str], depth: int, own: set[str] | None = None) -> None:
    if depth > DEEPEST:
        raise CompileError(f"bodies are nested more than {DEEPEST} deep", code="structure")
    defined = set(own or ())
    producer: dict[str, int] = {}
    for i, node in enumerate(graph.node):
        for o in node.output:
            if o and (o in defined or o in producer):
                raise CompileError(f"{o!r} is defined twice", code="name", location=where(node, i))
            if o:
                producer[o] = i
    ordered = True
    seen = set(known)
    reads = [[*_inputs(n), *_captured(n)] for n in graph.node]
    for i, node in enumerate(graph.node):
        for name in reads[i]:
            if name not in seen:
                if name not in producer:
                    raise CompileError(
                        f"{node.op_type} reads {name!r}, which is no input, initializer or result of a node",
                        code="structure",
                        location=where(node, i),
                    )
                ordered = False
        seen.update(o for o in node.output if o)
    if not ordered:
        _sort(graph, reads, producer)
        seen = known | producer.keys()
    for node in graph.node:
        for a in node.attribute:
            for g in ([a.g] if a.HasField("g") else []) + list(a.graphs):
                check_graph(g, seen, depth + 1)
    names = [v.name for v in graph.output]
    for name in names:
        if name not in seen:
            raise CompileError(f"output {name!r} is no input, initializer or result of a node", code="structure")
    if depth == 0 and len(set(names)) < len(names):
        raise CompileError(f"duplicate output names: {', '.join(names)}", code="name")


def _inputs(node: Any) -> list[str]:
    return [i for i in node.input if i]


def _captured(node: Any) -> list[str]:
    """What the bodies of a node read from outside."""
    found = []
    for a in node.attribute:
        for g in ([a.g] if a.HasField("g") else []) + list(a.graphs):
            found += free_names(g)
    return found


def free_names(graph: Any) -> list[str]:
    """What a body reads that it does not define, in order of first use."""
    own = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    own |= {o for n in graph.node for o in n.output}
    used: dict[str, None] = {}
    for n in graph.node:
        for name in [*_inputs(n), *_captured(n)]:
            if name not in own:
                used[name] = None
    for v in graph.output:
        if v.name and v.name not in own:
            used[v.name] = None
    return list(used)


def _sort(graph: Any, reads: list[list[str]], producer: dict[str, int]) -> None:
    after = {i: sorted({producer[r] for r in names if r in producer}) for i, names in enumerate(reads)}
    try:
        order = list(TopologicalSorter(after).static_order())
    except CycleError as e:
        names = " -> ".join(graph.node[i].name or graph.node[i].op_type for i in e.args[1])
        raise CompileError(f"the graph has a cycle: {names}", code="structure") from None
    nodes = [graph.node[i] for i in order]
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def where(node: Any, index: int) -> Location:
    """The location of a node by its name, or its operator and number."""
    return Location.at(module=node.name or f"{node.op_type}_{index}")
