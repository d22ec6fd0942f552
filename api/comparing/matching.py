"""Which values of two graphs are the same: by the ids of the traced values that they equal."""

from __future__ import annotations

from moec.ir import Graph, Value


def corresponding(a: Graph, b: Graph) -> dict[Value, Value]:
    """For node results of `a`, the value of `b` of the same shape that shares an origin; where a node of one op
    exists once per location in both graphs, its results correspond too, in order."""
    by_origin: dict[tuple[str, tuple], Value] = {}
    for node in b.nodes:
        for r in node.results:
            for origin in r.origins:
                by_origin.setdefault((origin, r.shape), r)
    pairs: dict[Value, Value] = {}
    theirs = _by_place(b)
    for place, nodes in _by_place(a).items():
        twins = theirs.get(place, [])
        for node in nodes:
            for r in node.results:
                found = next((by_origin[o, r.shape] for o in sorted(r.origins) if (o, r.shape) in by_origin), None)
                if found is None and len(nodes) == len(twins) == 1:
                    twin = twins[0].results
                    found = twin[r.index] if len(twin) > r.index and twin[r.index].shape == r.shape else None
                if found is not None and found.dtype.is_float == r.dtype.is_float:
                    pairs[r] = found
    return pairs


def _by_place(graph: Graph) -> dict[tuple, list]:
    places: dict[tuple, list] = {}
    for node in graph.nodes:
        places.setdefault((node.op, node.location), []).append(node)
    return places
