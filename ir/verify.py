"""The verifier: structure, use lists, and types by re-inference."""

from __future__ import annotations

from collections.abc import Mapping

from moec.ir.errors import CompileError
from moec.ir.graph import Graph, Node, Value
from moec.ir.opdef import infer_types
from moec.ir.printer import excerpt
from moec.ir.runtime_sizes import check_symbols, introduces
from moec.ir.types import DType


def verify(graph: Graph, functions: Mapping[str, Graph] | None = None) -> None:
    """Raise CompileError at the first violation, with the node's location and neighbourhood."""
    top = functions is None
    functions = graph.functions if functions is None else functions
    _check_names(graph)
    if top:
        _check_recursion(graph)
    known = set(graph.symbols | _weight_symbols(graph))
    defined: set[Value] = set(graph.inputs) | set(graph.weights.values())
    for node in graph.nodes:
        try:
            _check_node(node, graph, defined, known, functions)
        except CompileError as e:
            raise e.located(node.location, excerpt(node)) from None
        defined.update(node.results)
        known.update(introduces(node))
    for slot, v in enumerate(graph.outputs):
        if v not in defined or slot not in v.output_slots:
            raise CompileError(f"output {graph.output_names[slot]!r} is not a value of the graph", code="structure")
    for fn in graph.functions.values() if top else ():
        verify(fn, functions)


def _weight_symbols(graph: Graph) -> frozenset[str]:
    for name, v in graph.weights.items():
        if not v.type.is_static:
            raise CompileError(f"weight {name!r} has a symbolic shape {v.type}", code="structure")
    return frozenset()


def _check_names(graph: Graph) -> None:
    for what, names in (("input", [v.name for v in graph.inputs]), ("output", graph.output_names)):
        if len(set(names)) != len(names):
            raise CompileError(f"duplicate {what} names: {names}", code="structure")
    reserved = {d.value for d in DType} | {"none", "true", "false", "inf", "nan"}
    bad = sorted(graph.symbols & reserved)
    if bad:
        raise CompileError(f"dimension names {bad} are reserved words of the text format", code="structure")


def _check_recursion(graph: Graph) -> None:
    done: set[str] = set()

    def visit(g: Graph, path: tuple[str, ...]) -> None:
        for node in g.nodes:
            if node.op != "call.graph":
                continue
            callee = node.attrs["callee"]
            if callee in path:
                raise CompileError(
                    f"recursive call: {' -> '.join((*path, callee))}", code="structure", location=node.location
                )
            if callee in graph.functions and callee not in done:
                visit(graph.functions[callee], (*path, callee))
                done.add(callee)

    visit(graph, ())


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
    if node.opdef.complete_attrs(node.attrs) != node.attrs and not _has_nan(node.attrs):
        raise CompileError(f"attributes of {node.op} are not normalised: {node.attrs}", code="structure")
    expected = infer_types(node.opdef, node.operands, node.attrs, functions)
    actual = tuple(r.type for r in node.results)
    if expected != actual:
        want, got = ", ".join(map(str, expected)), ", ".join(map(str, actual))
        raise CompileError(f"{node.op} has type ({got}), its rule gives ({want})", code="type")
    check_symbols(node, known)


def _has_nan(attrs: Mapping[str, object]) -> bool:
    flat = [x for v in attrs.values() for x in (v if isinstance(v, tuple) else (v,))]
    return any(isinstance(x, float) and x != x for x in flat)
