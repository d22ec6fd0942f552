"""What tells which expert a dense computation is weighted by: the combine matrix [T, E] and its columns.

It comes from the routing: scatter(0, experts, weights), Σ_j one_hot(experts)·weights, or per expert
Σ_j (experts = e)·weights.
"""

from __future__ import annotations

from typing import Any

from moec.ir import Node, Value
from moec.passes.moe.structure import is_filled, producer, through
from moec.passes.rewriting.match_values import scalar_constant

Routing = tuple[Value, Value]


def combine_matrix(v: Value | None) -> Routing | None:
    """(weights, experts) [T, k] where v [T, E] holds each expert's weight for each token, 0 if not chosen."""
    v = through(v, "math.cast")
    scatter = producer(v, "tensor.scatter_elements")
    if scatter is not None:
        zeros, experts, weights = scatter.operands
        writes = scatter.attrs["axis"] == -1 and scatter.attrs["reduce"] in ("none", "add")
        return (weights, experts) if writes and is_filled(zeros, 0) else None
    total = producer(v, "math.sum")
    if total is None or total.attrs["axes"] != (-2,) or total.attrs["keepdim"]:
        return None
    product = producer(through(total.operands[0], "math.cast"), "math.mul")
    for hot, factor in _orders(product):
        one_hot = producer(through(hot, "math.cast"), "tensor.one_hot")
        weights = through(factor, "tensor.reshape", "math.cast")
        if one_hot is not None and weights is not None and weights.shape == one_hot.operands[0].shape:
            return weights, one_hot.operands[0]
    return None


def combine_column(v: Value | None) -> tuple[Value, Value, int] | None:
    """(weights, experts, e) where v [T, 1] is expert e's weight for each token."""
    v = through(v, "tensor.reshape", "math.cast")
    cut = producer(v, "tensor.slice")
    if cut is not None:
        routing = combine_matrix(cut.operands[0])
        start, end = cut.attrs["start"], cut.attrs["end"]
        return (*routing, start) if routing and cut.attrs["axis"] == -1 and end == start + 1 else None
    total = producer(v, "math.sum")
    if total is None or total.attrs["axes"] != (-1,):
        return None
    for mask, weights in _orders(producer(through(total.operands[0], "math.cast"), "math.mul")):
        equal = producer(through(mask, "math.cast"), "math.eq")
        for experts, number in _orders(equal):
            e = scalar_constant(number)
            if isinstance(e, int) and experts.shape == weights.shape:
                return weights, experts, e
    return None


def combine_rows(factors: Value) -> Routing | None:
    """(weights, experts) where factors [E, T, 1] or [E·T, 1] are the combine matrix [T, E] with its axes exchanged."""
    flipped = producer(through(factors, "tensor.reshape", "math.cast"), "tensor.transpose")
    if flipped is None or flipped.attrs["perm"] != (1, 0):
        return None
    num, tokens = flipped.results[0].shape
    if factors.shape not in ((num, tokens, 1), (num * tokens, 1)):
        return None
    return combine_matrix(flipped.operands[0])


def same_rows(v: Value, tokens: Any) -> Value | None:
    """The rows [tokens, d], perhaps as [1, tokens, d], which v repeats for every expert: v is [tokens, d],
    [E, tokens, d], or [E·tokens, d] with the experts outermost; axes of size 1 may stand between. None where v is
    anything else."""
    rows = (tokens, v.shape[-1])
    if v.shape != rows and v.type.rank == 2:
        stack = producer(v, "tensor.reshape")
        if stack is None:
            return None
        v = stack.operands[0]
    while v.shape != rows:
        if not _stacks(v.shape, rows):
            return None
        if v.shape[0] == 1:
            return v
        spread, reshaped = producer(v, "tensor.expand"), producer(v, "tensor.reshape")
        inner = (spread or reshaped).operands[0] if spread or reshaped else None
        if inner is None or (spread is not None and inner.shape not in ((1, *v.shape[1:]), v.shape[1:])):
            return None
        if reshaped is not None and inner.shape[0] != v.shape[0]:
            return None
        v = inner
    return v


def _stacks(shape: tuple, rows: tuple) -> bool:
    """Whether a shape is [n, *rows] up to axes of size 1."""
    between = [s for s in shape[1:-1] if s != 1]
    return len(shape) > 2 and shape[-1] == rows[1] and between == ([] if rows[0] == 1 else [rows[0]])


def _orders(node: Node | None) -> list[tuple[Any, Any]]:
    if node is None:
        return []
    a, b = node.operands
    return [(a, b), (b, a)]
