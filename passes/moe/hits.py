"""Which tokens chose an expert, as a loop over experts finds them: `tok, slot = where(experts == e)`, and the weights
that it reads for them."""

from __future__ import annotations

from moec.ir import Value
from moec.passes.moe.combine import Column, combine_column, distinct, equals, orders
from moec.passes.moe.structure import counts_up, is_filled, producer, through
from moec.passes.rewriting.match_values import scalar_constant


def hits(v: Value | None) -> tuple[Value, int] | None:
    """(mask, axis) where v [n] are the indices along one axis of a mask's true elements, in order."""
    v = through(v, "tensor.reshape")
    split, cut = producer(v, "tensor.split"), producer(v, "tensor.slice")
    axis = 0
    if v is not None and split is not None and split.attrs["axis"] == -1 and set(split.attrs["sizes"]) == {1}:
        v, axis = split.operands[0], v.index
    elif cut is not None and cut.attrs["axis"] == -1 and cut.attrs["end"] == cut.attrs["start"] + 1:
        v, axis = cut.operands[0], cut.attrs["start"]
    found = producer(v, "tensor.nonzero")
    if found is None or (split is None and cut is None and found.operands[0].type.rank != 1):
        return None
    return found.operands[0], axis


def weighed(tokens: Value, factor: Value) -> Column | None:
    """(weights, experts, e) where `tokens` are those that chose expert e, and `factor` [n, 1] is its weight for them.
    Experts are [T, k], or [T] where there is one choice; weights are as many, in any
    shape."""
    found = hits(tokens)
    if found is None:
        return None
    mask, axis = found
    chosen = _chosen(mask)
    if chosen is None or chosen[2] != axis:
        return None
    experts, e, _ = chosen
    read = producer(through(factor, "tensor.reshape", "math.cast"), "tensor.gather")
    if read is None or read.attrs["axis"] != 0 or factor.shape != (tokens.shape[0], 1):
        return None
    table, index = read.operands
    if index is tokens:
        return _per_token(table, experts, e, mask)
    weights = through(table, "tensor.reshape", "math.cast")
    if weights is None or mask.type.rank != 2 or not weights.type.numel == table.shape[0] == experts.type.numel:
        return None
    return (weights, experts, e) if _flat_index(index, mask, axis, experts.shape[1]) else None


def _per_token(table: Value, experts: Value, e: int, mask: Value) -> Column | None:
    """Weights that are read by the token alone: those of the only choice, or expert e's column."""
    if experts.type.rank == 1 or experts.shape[1] == 1:
        weights = through(table, "tensor.reshape", "math.cast")
        if weights is not None and weights.type.numel == experts.type.numel:
            return weights, experts, e
    column = combine_column(table)
    same = through(experts, "tensor.reshape")
    if column is None or through(column[1], "tensor.reshape") is not same or column[2] != e:
        return None
    # a token that chose the expert twice would be there twice
    return column if mask.type.rank == 1 or distinct(experts) else None


def _chosen(mask: Value) -> tuple[Value, int, int] | None:
    """(experts, e, axis of the tokens) where a mask holds where experts is e: [T, k], [k, T], or [T] for any choice."""
    reduced = producer(mask, "math.any")
    if reduced is not None:
        inner = _chosen(reduced.operands[0]) if reduced.attrs["axes"] == (-1,) and mask.type.rank == 1 else None
        return inner if inner is not None and inner[2] == 0 else None
    plain = equals(mask)
    if plain is not None:
        experts, e = plain
        flipped = producer(experts, "tensor.transpose")
        if flipped is not None and flipped.attrs["perm"] == (1, 0):
            return flipped.operands[0], e, 1
        return (experts, e, 0) if experts.type.rank in (1, 2) else None
    return _of_one_hot(mask)


def _of_one_hot(mask: Value) -> tuple[Value, int, int] | None:
    """The same, where the mask is a part of one_hot(experts) [T, k, E] that is not 0, with axes in any order."""
    unequal = producer(mask, "math.ne")
    source: Value | None = mask
    if unequal is not None:
        a, b = unequal.operands
        source = a if is_filled(b, 0) or scalar_constant(b) == 0 else None
    part = _one_of(through(source, "tensor.reshape", "math.cast"))
    if part is None or mask.type.rank != 2:
        return None
    whole, axis, e = part
    order = [0, 1, 2]
    moved = producer(whole, "tensor.transpose")
    if moved is not None:
        order, whole = list(moved.attrs["perm"]), through(moved.operands[0], "math.cast")
    experts = hot_ids(whole)
    if experts is None or len(order) != 3 or order.pop(axis) != 2:
        return None
    kept = [experts.shape[a] for a in order]
    return (experts, e, order.index(0)) if tuple(kept) == mask.shape else None


def _one_of(v: Value | None) -> tuple[Value | None, int, int] | None:
    """(whole, axis, number) where v is one of the parts of a value, sliced or gathered."""
    cut, taken = producer(v, "tensor.slice"), producer(v, "tensor.gather")
    if cut is not None:
        start, end = cut.attrs["start"], cut.attrs["end"]
        return (through(cut.operands[0], "math.cast"), cut.attrs["axis"], start) if end == start + 1 else None
    number = scalar_constant(taken.operands[1]) if taken is not None else None
    if not isinstance(number, int) or number < 0:
        return None
    return through(taken.operands[0], "math.cast"), taken.attrs["axis"], number


def hot_ids(v: Value | None) -> Value | None:
    """The ids [...] of which v [..., n] is the one_hot, or what exporters write for it: ids = 0, 1, 2, …"""
    one_hot = producer(v, "tensor.one_hot")
    if one_hot is not None:
        return one_hot.operands[0]
    for column, numbers in orders(producer(v, "math.eq")):
        spread = producer(column, "tensor.reshape")
        ids = spread.operands[0] if spread is not None else None
        if ids is not None and column.shape == (*ids.shape, 1) and numbers.type.rank == 1 and counts_up(numbers):
            return ids
    return None


def _flat_index(index: Value, mask: Value, axis: int, k: object) -> bool:
    """Whether an index is token · k + choice of the mask's true elements."""
    total = producer(index, "math.add")
    if total is None:
        return False
    for row, slot in (total.operands, total.operands[::-1]):
        if hits(slot) != (mask, 1 - axis):
            continue
        scaled = producer(row, "math.mul")
        if scaled is None:
            return k == 1 and hits(row) == (mask, axis)
        for token, factor in (scaled.operands, scaled.operands[::-1]):
            if hits(token) == (mask, axis) and scalar_constant(factor) == k:
                return True
    return False
