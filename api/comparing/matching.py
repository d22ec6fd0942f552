"""Which values of two graphs are the same: by the ids of the traced values that they equal."""

from __future__ import annotations

from moec.ir import Graph, Value


def corresponding(a: Graph, b: Graph, *, foreign: bool = False, by_place: bool = True) -> dict[Value, Value]:
    """For node results of `a`, the value of `b` of the same shape that shares an origin; where a node of one op
    exists once per location in both graphs, its results correspond too, in order, unless both have origins.

    foreign: the graphs are of two sources, where an origin may name one value here and another there, so that only the
    second holds, for any shape of the same rank (symbols differ). by_place: whether the second holds; it does not
    where a backend's tuning has other axes or rows in the value of the same node."""

    def fits(mine: Value, yours: Value) -> bool:
        if foreign:
            return len(mine.shape) == len(yours.shape)
        return mine.shape == yours.shape and not (mine.origins and yours.origins)

    by_origin: dict[tuple[str, tuple], Value] = {}
    for node in () if foreign else b.nodes:
        for r in node.results:
            for origin in r.origins:
                by_origin.setdefault((origin, r.shape), r)
    pairs: dict[Value, Value] = {}
    theirs = _by_place(b) if by_place else {}
    for place, nodes in _by_place(a).items():
        twins = theirs.get(place, [])
        for node in nodes:
            for r in node.results:
                found = next((by_origin[o, r.shape] for o in sorted(r.origins) if (o, r.shape) in by_origin), None)
                if found is None and len(nodes) == len(twins) == 1:
                    twin = twins[0].results
                    found = twin[r.index] if len(twin) > r.index and fits(r, twin[r.index]) else None
                if found is not None and found.dtype.is_float == r.dtype.is_float:
                    pairs[r] = found
    return pairs


def _by_place(graph: Graph) -> dict[tuple, list]:
    places: dict[tuple, list] = {}
    for node in graph.nodes:
        places.setdefault((node.op, node.location), []).append(node)
    return places
