"""Parts of a graph as graphs of their own, and graphs at other sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moec.ir import Dim, Graph, Node, TensorType, Value, Weight
from moec.ir.dims import size
from moec.ir.graph import copy_node

Resize = Callable[["int | Dim"], "int | Dim"]


def extract(graph: Graph, nodes: Iterable[Node], outputs: Iterable[Value] | None = None) -> tuple[Graph, dict]:
    """Some nodes of a graph as a graph, and what the values of the original became in it.

    Constants that the nodes use come along, weights stay weights, every other value from outside becomes an
    input. `outputs`: results to return; None for those that something outside uses, or nothing at all.
    """
    chosen = set(nodes)
    needed = {v.producer for n in chosen for v in n.operands if v is not None and v.producer is not None}
    chosen |= {n for n in needed if not n.operands}
    part = Graph()
    mapping: dict[Value, Value] = {}
    ordered = sorted(chosen, key=lambda n: n._order)
    for v in (v for n in ordered for v in n.operands if v is not None):
        if v in mapping or v.producer in chosen:
            continue
        if v.weight is not None:
            mapping[v] = part.add_weight(v.weight)
        else:
            mapping[v] = part.add_input(v.name if v.producer is None and v.name else f"x{len(part.inputs)}", v.type)
    functions = dict(graph.functions)
    _take_functions(ordered, functions, part)
    for node in ordered:
        copy_node(node, part, mapping)
    if outputs is None:
        results = [r for n in ordered if n.operands for r in n.results]
        outputs = [r for r in results if r.is_output or not r.uses or any(u not in chosen for u in r.users)]
    for v in outputs:
        part.add_output(mapping[v])
    return part, mapping


def _take_functions(nodes: Iterable[Node], functions: Mapping[str, Graph], part: Graph) -> None:
    for node in nodes:
        callee = node.attrs["callee"] if node.op == "call.graph" else None
        if callee is not None and callee not in part.functions:
            part.functions[callee] = functions[callee].clone()
            _take_functions(functions[callee].nodes, functions, part)


def without_data(graph: Graph) -> Graph:
    """A copy whose weights have no data, as text has none."""
    copy = graph.clone()
    for g in (copy, *copy.functions.values()):
        for name, v in g.weights.items():
            v.weight = Weight(name, v.type)
    return copy


def resize(graph: Graph, change: Resize, *, attributes: bool = True) -> Graph:
    """A copy at other sizes: those in the types of inputs and weights (then without data) and in attributes go through
    `change`, results are inferred anew. Raises CompileError where the new sizes do not fit together."""

    def changed(type: TensorType) -> TensorType:
        return type.with_shape([change(s) for s in type.shape])

    def attribute(x: Any) -> Any:
        match x:
            case bool():
                return x
            case int() | Dim():
                return change(x)
            case TensorType():
                return changed(x)
            case tuple():
                return tuple(attribute(y) for y in x)
        return x

    new = Graph(graph.name)
    new.functions = {name: fn.clone() for name, fn in graph.functions.items()}
    mapping: dict[Value, Value] = {}
    for v in graph.inputs:
        mapping[v] = new.add_input(v.name or "", changed(v.type))
    for name, v in graph.weights.items():
        same = changed(v.type) == v.type and v.weight is not None
        mapping[v] = new.add_weight(v.weight if same and v.weight else Weight(name, changed(v.type)))
    for node in graph.nodes:
        operands = [None if v is None else mapping[v] for v in node.operands]
        # the elements of a constant are no sizes
        attrs = {k: attribute(a) if attributes and k != "value" else a for k, a in node.attrs.items()}
        copy = new.create(node.opdef, operands, attrs, location=node.location)
        for old, result in zip(node.results, copy.results, strict=True):
            result.origins = old.origins
            mapping[old] = result
    for v, name in zip(graph.outputs, graph.output_names, strict=True):
        new.add_output(mapping[v], name)
    return new


def at_binding(graph: Graph, binding: Mapping[str, int]) -> Graph:
    """A copy with every dimension symbol replaced by its number."""
    return resize(graph, lambda s: s.substitute(dict(binding)) if isinstance(s, Dim) else s)


def solvable(graph: Graph) -> Graph:
    """The graph, or a copy in which a product of symbols that no input has by themselves (`B*S`) is one new symbol
    wherever it occurs, so that the inputs of a part determine its sizes. What stays unsolvable is left to
    `at_binding`."""
    plain = {str(s) for v in graph.inputs for s in v.shape if isinstance(s, Dim) and s.is_symbol}
    for v in graph.inputs:
        for s in v.shape:
            if not isinstance(s, Dim) or s.is_symbol or s.symbols & plain:
                continue
            name = next(n for n in ("T", "N", "M", *(f"T{i}" for i in range(99))) if n not in graph.symbols)
            return solvable(resize(graph, _replacing(s, Dim(name))))
    return graph


def _replacing(old: Dim, new: Dim) -> Resize:
    return lambda s: size(s.expr.subs(old.expr, new.expr)) if isinstance(s, Dim) else s


def is_solvable(graph: Graph) -> bool:
    """Whether sizes of the inputs give every symbol that the graph uses."""
    plain = {str(s) for v in graph.inputs for s in v.shape if isinstance(s, Dim) and s.is_symbol}
    used = {n for node in graph.nodes for r in node.results for n in r.type.symbols}
    return graph.symbols | used <= plain
