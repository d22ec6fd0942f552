"""Between which numbers the elements of a float tensor lie, as far as that is known without running it."""

from __future__ import annotations

from math import inf, isfinite

from moec.ir import Value
from moec.passes.moe.structure import producer, through
from moec.passes.rewriting.match_values import scalar_constant

Bounds = tuple[float, float]
_UNKNOWN = (-inf, inf)
# (op, result) whose elements are some of those of the first operand
_SOME = {
    ("math.topk", 0), ("math.sort", 0), ("tensor.gather_elements", 0), ("tensor.reshape", 0), ("tensor.expand", 0),
    ("tensor.slice", 0), ("math.amax", 0),
}  # fmt: skip


def is_finite(v: Value) -> bool:
    """Whether no element is infinite."""
    return all(map(isfinite, bounds(v)))


def is_positive(v: Value) -> bool:
    """Whether every element is more than 0 and not infinite."""
    return is_finite(v) and bounds(v)[0] > 0


def bounds(v: Value, depth: int = 16) -> Bounds:
    """(least, greatest) of the elements that are not NaN."""
    number, node = scalar_constant(v), v.producer
    if isinstance(number, int | float):
        return (float(number), float(number))
    if node is None or depth == 0:
        return _UNKNOWN
    known = [bounds(o, depth - 1) for o in node.operands if o is not None and o.dtype.is_float]
    if node.op in ("math.softmax", "math.sigmoid"):
        return (0.0, 1.0)
    if (node.op, v.index) == ("moe.route", 0):
        scale = node.attrs["scale"]
        return (0.0, scale) if node.attrs["scoring"] != "sqrt_softplus" and 0 <= scale < inf else _UNKNOWN
    if node.op == "tensor.full" and isinstance(node.attrs["value"], int | float):
        return (float(node.attrs["value"]),) * 2
    if not known:
        return _UNKNOWN
    if (node.op, v.index) in _SOME or (node.op == "math.cast" and v.dtype.bits >= 16):
        return known[0]
    if node.op == "math.add" and len(known) == 2:
        return known[0][0] + known[1][0], known[0][1] + known[1][1]
    if node.op == "math.clamp":
        low, high = (node.attrs[end] for end in ("low", "high"))
        ends = (-inf if low is None else low, inf if high is None else high)
        return max(known[0][0], ends[0]), min(known[0][1], ends[1])
    if node.op == "math.sum":
        return _sum(node.operands[0], node.attrs["axes"], known[0])
    return _UNKNOWN


def _sum(x: Value | None, axes: tuple[int, ...], each: Bounds) -> Bounds:
    count = x.shape[axes[0]] if x is not None and len(axes) == 1 else None
    if not isinstance(count, int) or count == 0:
        return _UNKNOWN
    # the best of a softmax is at least one of its equals
    share = _best_of(x) if axes == (-1,) and each[0] >= 0 else None
    return max(count * each[0], share or 0.0) if each[0] >= 0 else count * each[0], count * each[1]


def _best_of(v: Value | None) -> float | None:
    """How large the largest of v's elements along its last axis is at least, where v holds the best of each softmax
    along that axis."""
    v = through(v, "math.cast")
    chosen, route, taken = producer(v, "math.topk"), producer(v, "moe.route"), producer(v, "tensor.gather_elements")
    if route is not None:
        logits, bias = route.operands
        plain = route.attrs["scoring"] in ("softmax", "topk_softmax") and bias is None and route.attrs["n_group"] == 1
        plain = plain and route.attrs["normalize_eps"] == route.attrs["normalize_min"] == 0
        return route.attrs["scale"] / logits.shape[-1] if plain else None
    if taken is not None:
        source, index = taken.operands
        chosen = producer(index, "math.topk")
        softmax = producer(source, "math.softmax")
        if chosen is None or softmax is None or chosen.operands[0] not in (source, softmax.operands[0]):
            return None
    elif chosen is not None:
        source = chosen.operands[0]
        softmax = producer(source, "math.softmax")
    else:
        return None
    last = (-1, source.type.rank - 1)
    if softmax is None or chosen.attrs["axis"] not in last or softmax.attrs["axis"] not in last:
        return None
    size = source.shape[-1]
    return 1 / size if chosen.attrs["largest"] and chosen.attrs["k"] > 0 and isinstance(size, int) and size else None
