"""Grouped products as exporters write them: `torch.histc` of expert ids as a scatter into bins, `grouped_mm` as one
product for each group's rows, which a Range counts up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moec.frontend.onnx.context import ImportContext
from moec.frontend.onnx.ranges import uniform, within
from moec.ir import DType, Node, Value
from moec.ir.dims import product

_STEPS = ("math.clamp", "math.cast", "math.div", "tensor.reshape")


def _made(v: Value | None, op: str) -> Node | None:
    return v.producer if v is not None and v.producer is not None and v.producer.op == op else None


def _below(v: Value | None, *ops: str) -> Value | None:
    while v is not None and v.producer is not None and v.producer.op in ops:
        v = v.producer.operands[0]
    return v


def counts(c: ImportContext, x: Value, index: Value, source: Value, axis: int) -> Value | None:
    """How often each of 0 … E − 1 occurs, where a ScatterElements adds ones to zeros [E] at the bins of integers from
    that range: index = clip(⌊id · E / (E − 1)⌋, 0, E − 1), or the integers themselves."""
    bins = x.shape[0] if x.type.rank == 1 else None
    if not isinstance(bins, int) or index.type.rank != 1 or axis:
        return None
    ones = _below(source, "tensor.expand", "tensor.reshape", "math.cast")
    if uniform(c, x) != 0 or uniform(c, ones) != 1 or index.shape != source.shape:
        return None
    ids = _binned(c, index, bins)
    return None if ids is None else c.cast(c.b.histc(ids, bins=bins), x.dtype)


def _binned(c: ImportContext, index: Value, bins: int) -> Value | None:
    """The integers whose bins `index` are, if each is its own bin."""
    if within(c, index, bins):
        return index
    steps: list[tuple[str, float]] = []
    v: Value | None = index
    while v is not None and (node := v.producer) is not None and node.op in _STEPS:
        if node.op == "math.clamp":
            steps += [(end, node.attrs[end]) for end in ("low", "high") if node.attrs[end] is not None]
        elif node.op == "math.cast":
            steps.append(("cast", v.dtype.is_integer))
        elif node.op == "math.div":
            divisor = uniform(c, node.operands[1])
            if divisor is None:
                return None
            steps.append(("div", divisor))
        v = node.operands[0]
    if v is None or not within(c, v, bins):
        return None
    found: np.ndarray = np.arange(bins)
    for kind, number in reversed(steps):
        if kind == "cast":
            found = np.trunc(found).astype(np.int64) if number else found.astype(np.float32)
        elif kind == "div":
            found = found / np.float32(number)
        else:
            found = np.maximum(found, number) if kind == "low" else np.minimum(found, number)
    return v if np.array_equal(found, np.arange(bins)) else None


def joined_products(c: ImportContext, xs: Sequence[Value], axis: int) -> Value | None:
    """concat(x[0 : ends[0]] · w[0], x[ends[0] : ends[1]] · w[1], …) as one grouped product, where the ends are running
    sums of how often each expert occurs among as many ids as x has rows."""
    products = [_made(v, "linear.matmul") for v in xs]
    gathers = [None if p is None else _made(p.operands[0], "tensor.gather") for p in products]
    if axis or len(xs) < 2 or None in gathers:
        return None
    ranges = [_made(g.operands[1], "extern.Range") for g in gathers if g is not None]
    rows = {g.operands[0] for g in gathers if g is not None and g.attrs["axis"] == 0}
    if None in ranges or len(rows) != 1:
        return None
    (x,) = rows
    limits = [r.operands for r in ranges if r is not None]
    starts, ends = [o[0] for o in limits], [o[1] for o in limits]
    if uniform(c, starts[0]) != 0 or starts[1:] != ends[:-1] or any(uniform(c, o[2]) != 1 for o in limits):
        return None
    offsets = _pieces(ends)
    weights = _pieces([p.operands[1] for p in products if p is not None])
    if x is None or offsets is None or weights is None or weights.type.rank != 3 or offsets.type.rank != 1:
        return None
    if not _count_rows(offsets, x, len(xs)):
        return None
    return c.b.grouped_matmul(x, weights, c.cast(offsets, DType.I32))


def _pieces(values: Sequence[Value | None]) -> Value | None:
    """The value that was split into these, in order and one by one along its first axis."""
    splits = [_made(_below(v, "tensor.reshape"), "tensor.split") for v in values]
    order = [v.index for v in (_below(v, "tensor.reshape") for v in values) if v is not None]
    if None in splits or len(set(splits)) != 1 or order != list(range(len(values))):
        return None
    (split,) = set(splits)
    whole = split.operands[0] if split is not None else None
    if split is None or whole is None or split.attrs["sizes"] != (1,) * len(values):
        return None
    return whole if split.attrs["axis"] % whole.type.rank == 0 else None


def _count_rows(offsets: Value, x: Value, groups: int) -> bool:
    """Whether offsets are running sums of counts that are as many as x has rows."""
    scan = _made(_below(offsets, "math.cast"), "math.cumsum")
    count = None if scan is None else _made(_below(scan.operands[0], "math.cast"), "tensor.histc")
    if count is None or count.attrs["bins"] != groups or count.operands[0] is None:
        return False
    return product(count.operands[0].shape) == x.shape[0]
