"""The verifier: structure, use lists, and types by re-inference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from moec.ir.compare import same_attrs
from moec.ir.errors import CompileError
from moec.ir.graph import Graph, Node, Value
from moec.ir.opdef import infer_types, shown_value
from moec.ir.printer import SURROGATE, excerpt
from moec.ir.runtime_sizes import check_symbols, introduces
from moec.ir.types import DType


def verify(graph: Graph, functions: Mapping[str, Graph] | None = None) -> None:
    """Raise CompileError at the first violation, with the node's location and neighbourhood."""
    top = functions is None
    functions = graph.functions if functions is None else functions
    _check_names(graph)
    if top:
        _check_calls(graph)
    known = set(graph.symbols | _weight_symbols(graph))
    defined: set[Value] = set(graph.inputs) | set(graph.weights.values())
    for node in graph.nodes:
        try:
            _check_node(node, graph, defined, known, functions)
        except CompileError as e:
            raise e.located(node.location, excerpt(node)) from None
        defined.update(node.results)
        known.update(introduces(node))
    if len(graph.outputs) != len(graph.output_names):
        raise CompileError(
            f"the graph has {len(graph.outputs)} outputs and {len(graph.output_names)} names for them",
            code="structure",
            hint="change an output with graph.set_output(slot, value), add one with graph.add_output(value, name)",
        )
    for slot, v in enumerate(graph.outputs):
        if v not in defined or slot not in v.output_slots:
            raise CompileError(f"output {graph.output_names[slot]!r} is not a value of the graph", code="structure")
    for fn in graph.functions.values() if top else ():
        verify(fn, functions)


def _weight_symbols(graph: Graph) -> frozenset[str]:
    for name, v in graph.weights.items():
        if v.weight is None or v.weight.name != name:
            found = None if v.weight is None else v.weight.name
            raise CompileError(f"under the name {name!r} is the weight {found!r}", code="structure")
        if not v.type.is_static:
            raise CompileError(f"weight {name!r} has a symbolic shape {v.type}", code="structure")
    return frozenset()


def _check_names(graph: Graph) -> None:
    for what, names in (("input", [v.name for v in graph.inputs]), ("output", graph.output_names)):
        if len(set(names)) != len(names):
            twice = [n for n, count in Counter(names).items() if count > 1]
            raise CompileError(f"duplicate {what} names: {twice[:8]}", code="structure")
    for what, names in (
        ("graph", [graph.name]),
        ("input", [v.name for v in graph.inputs]),
        ("output", graph.output_names),
        ("weight", list(graph.weights)),
    ):
        for name in names:
            if not isinstance(name, str) or SURROGATE.search(name):
                raise CompileError(f"{what} name {name!r} is no Unicode text", code="structure")
    reserved = {d.value for d in DType} | {"none", "true", "false", "inf", "nan"}
    bad = sorted(graph.symbols & reserved)
    if bad:
        raise CompileError(f"dimension names {bad} are reserved words of the text format", code="structure")


DEEPEST_CALLS = 64
MOST_NODES = 2_000_000  # of a graph with every call written out


def _check_calls(graph: Graph) -> None:
    """That no function calls itself, and that depth and number of calls are such that running ends."""
    for name, fn in graph.functions.items():
        if fn.name != name:
            raise CompileError(f"function {fn.name!r} is stored under the name {name!r}", code="structure")
        if fn.functions:
            raise CompileError(
                f"function {name!r} holds functions of its own: {sorted(fn.functions)}", code="structure"
            )
    calls = {
        name: [n for n in g.nodes if n.op == "call.graph" and n.attrs["callee"] in graph.functions]
        for name, g in [("", graph), *graph.functions.items()]
    }
    graphs = {"": graph, **graph.functions}
    extent: dict[str, tuple[int, int]] = {}  # depth and nodes of a finished graph
    path: dict[str, list[Node]] = {"": list(calls[""])}  # graphs being walked → their calls that are left
    while path:
        name = next(reversed(path))
        if path[name]:
            node = path[name].pop()
            callee = node.attrs["callee"]
            if callee in path:
                names = [*path, callee]
                cycle = names[names.index(callee) :]
                raise CompileError(
                    f"recursive call: {' -> '.join(cycle[:8])}{' …' if len(cycle) > 8 else ''}",
                    code="structure",
                    location=node.location,
                )
            if callee not in extent:
                path[callee] = list(calls[callee])
            continue
        del path[name]
        inner = [extent[n.attrs["callee"]] for n in calls[name]]
        depth = 1 + max((d for d, _ in inner), default=-1)
        nodes = len(graphs[name]) + sum(n for _, n in inner)
        if depth > DEEPEST_CALLS:
            raise CompileError(f"calls nest more than {DEEPEST_CALLS} deep", code="structure")
        if nodes > MOST_NODES:
            raise CompileError(f"the graph has more than {MOST_NODES:,} nodes with its calls written out", code="size")
        extent[name] = depth, nodes


def _check_node(node: Node, graph: Graph, defined: set[Value], known: set[str], functions: Mapping[str, Graph]) -> None:
    if node.graph is not graph:
        raise CompileError(f"{node.op} belongs to another graph", code="structure")
    for i, v in enumerate(node.operands):
        if v is None:
            continue
        if v not in defined:
            raise CompileError(f"operand {i} of {node.op} is not defined before it", code="structure")
        if (node, i) not in v.uses:
            raise CompileError(f"operand {i} of {node.op} misses its use record", code="structure")
    node.opdef.pad_operands(node.operands)
    _check_attrs(node)
    expected = infer_types(node.opdef, node.operands, node.attrs, functions)
    actual = tuple(r.type for r in node.results)
    if expected != actual:
        want, got = ", ".join(map(str, expected)), ", ".join(map(str, actual))
        raise CompileError(f"{node.op} has type ({got}), its rule gives ({want})", code="type")
    check_symbols(node, known)


def _check_attrs(node: Node) -> None:
    """That the attributes are as `Graph.create` would have stored them: all are there, with values of their types."""
    for name, value in node.opdef.complete_attrs(node.attrs).items():
        if name not in node.attrs:
            raise CompileError(f"{node.op}: attribute {name!r} is missing", code="attribute")
        given = node.attrs[name]
        if not same_attrs({name: value}, {name: given}):
            raise CompileError(
                f"{node.op}: attribute {name!r} must be {type(value).__name__}, got {shown_value(given)}",
                code="attribute",
                hint=f"node.attrs takes a value as it is, here {shown_value(value)}; graph.create and builders convert",
            )
