"""Grouped products as exporters write them: `torch.histc` of expert ids as a scatter into bins, grouped
products as one product for each group's rows, which a Range counts up or a Split by counts gives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

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
    """concat(x[0 : n₀] · w[0], x[n₀ : n₀ + n₁] · w[1], …) as one grouped product, where n counts how often each expert
    occurs among as many ids as x has rows."""
    products = [p for v in xs if (p := _made(v, "linear.matmul")) is not None]
    if axis or len(xs) < 2 or len(products) < len(xs):
        return None
    rows = [p.operands[0] for p in products]
    found = _split_rows(c, rows) or _ranged_rows(c, rows)
    weights = _stacked(c, [p.operands[1] for p in products])
    if found is None or weights is None or weights.type.rank != 3:
        return None
    return c.b.grouped_matmul(found[0], weights, c.cast(found[1], DType.I32))


def _split_rows(c: ImportContext, rows: Sequence[Value | None]) -> tuple[Value, Value] | None:
    """(x, ends of the groups) of rows that a Split by counts gives."""
    splits = {_made(v, "extern.Split") for v in rows}
    split = splits.pop()
    if splits or split is None or [v.index for v in rows if v is not None] != list(range(len(split.results))):
        return None
    x, counts = split.operands
    if x is None or counts is None or (split.attrs["axis"] or 0) % x.type.rank:
        return None
    return (x, c.b.cumsum(counts, axis=0)) if _count_rows(counts, x, len(rows)) else None


def _ranged_rows(c: ImportContext, rows: Sequence[Value | None]) -> tuple[Value, Value] | None:
    """(x, ends of the groups) of rows that are gathered by a Range for each group."""
    gathers = [g for v in rows if (g := _made(v, "tensor.gather")) is not None and g.attrs["axis"] == 0]
    limits = [r.operands for g in gathers if (r := _made(g.operands[1], "extern.Range")) is not None]
    sources = {g.operands[0] for g in gathers}
    if len(limits) < len(rows) or len(sources) != 1:
        return None
    (x,) = sources
    starts, ends = [o[0] for o in limits], [o[1] for o in limits]
    if uniform(c, starts[0]) != 0 or starts[1:] != ends[:-1] or any(uniform(c, o[2]) != 1 for o in limits):
        return None
    offsets = _pieces(ends)
    scan = None if offsets is None else _made(_below(offsets, "math.cast"), "math.cumsum")
    if x is None or scan is None or offsets is None or offsets.type.rank != 1:
        return None
    return (x, offsets) if _count_rows(scan.operands[0], x, len(rows)) else None


def _stacked(c: ImportContext, matrices: Sequence[Value | None]) -> Value | None:
    """[E, K, N] that was split into these, or that they are stacked to when first read."""
    whole = _pieces(matrices)
    weights = [v.weight for v in matrices if v is not None and v.weight is not None]
    if whole is not None or len(weights) < len(matrices) or len({w.type for w in weights}) != 1:
        return whole
    type = weights[0].type

    def compute() -> torch.Tensor:
        return torch.stack([w.load() for w in weights])

    return c.b.weight(f"{weights[0].name}.stacked", compute, type.with_shape((len(weights), *type.shape)))


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


def _count_rows(counts: Value | None, x: Value, groups: int) -> bool:
    """Whether counts of each id add up to as many as x has rows."""
    count = _made(_below(counts, "math.cast"), "tensor.histc")
    if count is None or count.attrs["bins"] != groups or count.operands[0] is None:
        return False
    return product(count.operands[0].shape) == x.shape[0]
