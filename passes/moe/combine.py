"""What tells which expert a dense computation is weighted by: the combine matrix [..., E] and its columns.

It comes from the routing: scatter(0, experts, weights), Σ_j one_hot(experts)·weights, or per expert
Σ_j (experts = e)·weights. Weights and experts are [..., k], with the axes that tokens have there.
"""

from __future__ import annotations

from typing import Any

from moec.ir import DType, Node, Value
from moec.passes.moe.structure import is_filled, producer, reshaped, through
from moec.passes.rewriting.match_values import scalar_constant

Routing = tuple[Value, Value]
Column = tuple[Value, Value, int]

# ops that give indices along an axis: (op, result)
_CHOICES = {("math.topk", 1): "axis", ("math.argmax", 0): "axis", ("math.sort", 1): "axis", ("moe.route", 1): None}


def num_experts(experts: Value) -> int | None:
    """How many experts the ids can name, by the op that chose them; None where that is not known."""
    found = through(experts, "tensor.reshape", "tensor.slice", "math.cast")
    node = found.producer if found is not None else None
    if found is None or node is None or (node.op, found.index) not in _CHOICES:
        return None
    scores = node.operands[0]
    assert scores is not None
    num = scores.shape[node.attrs["axis"] if _CHOICES[node.op, found.index] else -1]
    return num if isinstance(num, int) else None


def distinct(experts: Value) -> bool:
    """Whether no token has an expert twice among its ids [..., k], by the op that chose them."""
    if experts.shape[-1:] == (1,):
        return True
    while experts.producer is not None and experts.producer.op in ("tensor.reshape", "tensor.slice", "math.cast"):
        (below,) = experts.producer.operands
        assert below is not None
        if experts.producer.op == "tensor.reshape" and below.shape[-1:] != experts.shape[-1:]:
            return False
        experts = below
    node = experts.producer
    if node is None or (node.op, experts.index) not in _CHOICES or node.op == "math.argmax":
        return False
    return node.op == "moe.route" or node.attrs["axis"] in (-1, experts.type.rank - 1)


def expert_ids(b: Any, experts: Value) -> Value:
    """Expert ids [..., k], or [T] of one choice, as i64[tokens, k], which `moe.experts` takes."""
    ids = reshaped(b, experts, (experts.shape[0], 1)) if experts.type.rank == 1 else flat(b, experts)
    return ids if ids.dtype is DType.I64 else b.cast(ids, dtype="i64")


def flat(b: Any, v: Value) -> Value:
    """Weights or experts [..., k] as [tokens, k]."""
    if v.type.rank == 2:
        return v
    tokens: Any = 1
    for s in v.shape[:-1]:
        tokens = tokens * s
    return reshaped(b, v, (tokens, v.shape[-1]))


def combine_matrix(v: Value | None) -> Routing | None:
    """(weights, experts) where v [..., E] holds each expert's weight for each token, 0 if not chosen."""
    while v is not None and v.producer is not None and v.producer.op in ("math.cast", "tensor.reshape"):
        (inner,) = v.producer.operands
        if inner is None or inner.type.rank == 0 or inner.shape[-1] != v.shape[-1]:
            return None
        v = inner
    scatter = producer(v, "tensor.scatter_elements")
    if scatter is not None:
        zeros, experts, weights = scatter.operands
        writes = scatter.attrs["axis"] == -1 and scatter.attrs["reduce"] in ("none", "add")
        same = zeros.shape[:-1] == experts.shape[:-1]
        # of two writes to one place only one stays
        once = scatter.attrs["reduce"] == "add" or distinct(experts)
        return (weights, experts) if writes and same and once and is_filled(zeros, 0) else None
    total = producer(v, "math.sum")
    if total is None or total.attrs["axes"] != (-2,) or total.attrs["keepdim"]:
        return None
    product = producer(through(total.operands[0], "math.cast"), "math.mul")
    for hot, factor in orders(product):
        one_hot = producer(through(hot, "math.cast"), "tensor.one_hot")
        weights = through(factor, "tensor.reshape", "math.cast")
        if one_hot is None or weights is None or factor.shape[-1] != 1:
            continue
        experts = one_hot.operands[0]
        if same_sizes(weights, experts) and factor.shape[:-1] == experts.shape:
            return weights, experts
    return None


def same_sizes(weights: Value, experts: Value) -> bool:
    """Whether both are [..., k] over as many tokens, which stand in the same order."""
    if weights.type.rank == 0 or experts.type.rank == 0 or weights.shape[-1] != experts.shape[-1]:
        return False
    return weights.type.numel == experts.type.numel


def combine_column(v: Value | None) -> Column | None:
    """(weights, experts, e) where v [..., 1] is expert e's weight for each token."""
    v = through(v, "tensor.reshape", "math.cast")
    cut = producer(v, "tensor.slice")
    if cut is not None:
        routing = combine_matrix(cut.operands[0])
        start, end = cut.attrs["start"], cut.attrs["end"]
        return (*routing, start) if routing and cut.attrs["axis"] == -1 and end == start + 1 else None
    total = producer(v, "math.sum")
    if total is not None and total.attrs["axes"] != (-1,):
        return None
    inner = through(total.operands[0], "math.cast") if total is not None else v
    found = _where_chosen(inner)
    # of one choice there is no sum
    return found if found is not None and (total is not None or found[1].shape[-1] == 1) else None


def _where_chosen(v: Value | None) -> Column | None:
    """(weights, experts, e) where v is weights where experts is e, and 0 elsewhere."""
    choice = producer(v, "math.where")
    pairs = orders(producer(v, "math.mul"))
    if choice is not None:
        pairs = [choice.operands[:2]] if is_filled(choice.operands[2], 0) else []
    for mask, weights in pairs:
        chosen = equals(mask)
        if chosen is not None and chosen[0].shape == weights.shape:
            return weights, *chosen
    return None


def equals(mask: Value | None) -> tuple[Value, int] | None:
    """(experts, e) where a mask holds where experts is e."""
    for experts, number in orders(producer(through(mask, "math.cast"), "math.eq")):
        e = scalar_constant(number)
        if isinstance(e, int) and not isinstance(e, bool):
            return experts, e
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


def chosen_rows(mask: Value, experts: Value) -> bool:
    """Whether a mask [E, T, 1] holds where tokens chose an expert: where ones scattered to `experts` are above 0."""
    flipped = producer(through(mask, "tensor.reshape"), "tensor.transpose")
    if flipped is None or flipped.attrs["perm"] != (1, 0) or mask.shape != (*flipped.results[0].shape, 1):
        return False
    above = producer(flipped.operands[0], "math.gt")
    if above is None or not is_filled(above.operands[1], 0):
        return False
    routing = combine_matrix(above.operands[0])
    return routing is not None and is_filled(routing[0], 1) and routing[1] is experts


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


def orders(node: Node | None) -> list[tuple[Any, Any]]:
    """The two operands of a node, either way round."""
    if node is None:
        return []
    a, b = node.operands
    return [(a, b), (b, a)]
