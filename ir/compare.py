"""Structural equality of graphs."""

from __future__ import annotations

from moec.ir.graph import Graph, Node, Value


def same_graph(a: Graph, b: Graph) -> bool:
    """Structure, types, attributes, locations, origins, names of inputs and outputs, and weights by
    name, type and (where both have one) digest; the order of nodes counts, value numbers do not."""
    return difference(a, b) is None


def difference(a: Graph, b: Graph) -> str | None:
    """The first difference in words, or None where the graphs are equal."""
    mapping: dict[Value, Value] = {}
    if a.name != b.name:
        return f"name {a.name!r} against {b.name!r}"
    if [(v.name, v.type, v.origins) for v in a.inputs] != [(v.name, v.type, v.origins) for v in b.inputs]:
        return "inputs differ"
    mapping.update(zip(a.inputs, b.inputs, strict=True))
    if a.weights.keys() != b.weights.keys():
        return f"weights differ: {sorted(a.weights.keys() ^ b.weights.keys())[:5]}"
    for name, v in a.weights.items():
        if v.weight != b.weights[name].weight or v.origins != b.weights[name].origins:
            return f"weight {name!r} differs"
        mapping[v] = b.weights[name]
    if len(a) != len(b):
        return f"{len(a)} nodes against {len(b)}"
    for i, (x, y) in enumerate(zip(a.nodes, b.nodes, strict=True)):
        reason = _node_difference(x, y, mapping)
        if reason:
            return f"node {i} ({x.op}): {reason}"
    if a.output_names != b.output_names or [mapping.get(v) for v in a.outputs] != b.outputs:
        return "outputs differ"
    if a.functions.keys() != b.functions.keys():
        return "functions differ"
    for name in a.functions:
        reason = difference(a.functions[name], b.functions[name])
        if reason:
            return f"function {name!r}: {reason}"
    return None


def interface_difference(before: Graph, after: Graph) -> str | None:
    """How the inputs or outputs of `after` have other names or types, in words, or None."""
    want, got = ([f"{v.name}: {v.type}" for v in g.inputs] for g in (before, after))
    if want != got:
        return f"inputs are ({', '.join(got)}), expected ({', '.join(want)})"
    want, got = ([f"{n}: {v.type}" for n, v in zip(g.output_names, g.outputs, strict=True)] for g in (before, after))
    return f"outputs are ({', '.join(got)}), expected ({', '.join(want)})" if want != got else None


def _node_difference(x: Node, y: Node, mapping: dict[Value, Value]) -> str | None:
    if x.op != y.op:
        return f"op {x.op} against {y.op}"
    if not same_attrs(x.attrs, y.attrs):
        return f"attributes {x.attrs} against {y.attrs}"
    if [None if v is None else mapping.get(v) for v in x.operands] != list(y.operands):
        return "operands differ"
    if x.location != y.location:
        return f"location {x.location} against {y.location}"
    if [(r.type, r.origins) for r in x.results] != [(r.type, r.origins) for r in y.results]:
        return "result types or origins differ"
    mapping.update(zip(x.results, y.results, strict=True))
    return None


def same_attrs(a: dict, b: dict) -> bool:
    """Equality that tells 1 from 1.0 and True, and takes NaN as equal to itself."""
    return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)


def _same(a: object, b: object) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return a.hex() == b.hex()  # tells -0.0 from 0.0, NaN equals NaN
    return a == b
