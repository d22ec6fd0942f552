"""Which axis of a value counts the rows of a buffer, and what may be done with rows that are not filled yet.

A buffer's free rows hold anything. Each op here keeps them apart: what a row of its result holds comes from the same
row of its operands (or from rows before, which are filled), so that what attention masks are the free ones. Everything
else, a sum or a sort over rows, say, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moec.ir import Dim, Node, Value
from moec.ir.dims import product
from moec.ir.ops.reduction import normal_axis

# row-wise in their first operands; the others have no rows
_PER_ROW = {"linear.linear": 1, "norm.rms": 1, "norm.layer": 1, "norm.add_rms": 2, "quant.scaled_linear": 2,
            "quant.quantize": 1}  # fmt: skip


class MixesRows(Exception):
    """An op does something with rows that cannot be said of a buffer."""


class Rows:
    """`axis[v]`: the axis of a value that has `capacity` rows. `zero`: values that are 0 (or false) in free rows."""

    def __init__(self, capacity: Dim):
        self.capacity = capacity
        self.axis: dict[Value, int] = {}
        self.zero: set[Value] = set()

    def add(self, v: Value, axis: int, *, zero: bool = False) -> None:
        self.axis[v] = axis
        if zero:
            self.zero.add(v)

    def follow(self, node: Node) -> None:
        """Where the rows of a new node's operands are in its results. Raises MixesRows."""
        tracked = [v for v in node.operands if v is not None and v in self.axis]
        if tracked:
            every = _aligned if node.opdef.elementwise else _per_row if node.op in _PER_ROW else None
            rule = _RULES.get(node.op, every)
            if rule is None:
                raise MixesRows
            axes = rule(self, node)
        else:
            axes = [self._made(r) for r in node.results]
        for r, axis in zip(node.results, axes, strict=True):
            self._check(r, axis)
            if axis is not None:
                self.add(r, axis, zero=self._stays_zero(node, tracked))

    def _made(self, v: Value) -> int | None:
        """The axis of a value that is made with rows from nothing that has some: the same in each."""
        return v.shape.index(self.capacity) if self.capacity in v.shape else None

    def _check(self, v: Value, axis: int | None) -> None:
        for i, n in enumerate(v.shape):
            here = isinstance(n, Dim) and bool(n.symbols & self.capacity.symbols)
            if here != (i == axis) or (here and n != self.capacity):
                raise MixesRows

    def _stays_zero(self, node: Node, tracked: Sequence[Value]) -> bool:
        if node.op in ("math.mul", "math.and"):
            return any(v in self.zero for v in tracked)
        same = ("math.cast", "tensor.reshape", "tensor.expand", "tensor.transpose")
        return node.op in same and all(v in self.zero for v in tracked)

    def from_right(self, v: Value) -> int:
        return v.type.rank - self.axis[v]


Rule = Callable[[Rows, Node], list[int | None]]


def _aligned(rows: Rows, node: Node) -> list[int | None]:
    """NumPy's broadcasting: rows of all operands are one axis, counted from the right."""
    found = {rows.from_right(v) for v in node.operands if v is not None and v in rows.axis}
    if len(found) > 1:
        raise MixesRows
    return [r.type.rank - min(found) for r in node.results]


def _per_row(rows: Rows, node: Node) -> list[int | None]:
    first = node.operands[: _PER_ROW[node.op]]
    if any(v is not None and v in rows.axis for v in node.operands[_PER_ROW[node.op] :]):
        raise MixesRows
    if any(v is not None and v in rows.axis and rows.from_right(v) == 1 for v in first):
        raise MixesRows
    return _aligned(rows, node)


def _transpose(rows: Rows, node: Node) -> list[int | None]:
    (x,) = node.operands
    assert x is not None
    return [list(node.attrs["perm"]).index(rows.axis[x])]


def _reshape(rows: Rows, node: Node) -> list[int | None]:
    """Rows stay an axis of their own: as many elements before them as before."""
    (x,), y = node.operands, node.result
    assert x is not None
    before = product(x.shape[: rows.axis[x]])
    places = [i for i, n in enumerate(y.shape) if n == rows.capacity and product(y.shape[:i]) == before]
    if not places:
        raise MixesRows
    return [places[0]]


def _expand(rows: Rows, node: Node) -> list[int | None]:
    return _aligned(rows, node)


def _elsewhere(rows: Rows, node: Node) -> list[int | None]:
    """Along another axis than the rows."""
    found = {rows.axis[v] for v in node.operands if v is not None and v in rows.axis}
    axis = normal_axis(node.attrs["axis"], node.results[0].type.rank)
    if len(found) > 1 or axis in found or any(v not in rows.axis for v in node.operands):
        raise MixesRows
    return [min(found)] * len(node.results)


def _slice(rows: Rows, node: Node) -> list[int | None]:
    x, axis = node.operands[0], normal_axis(node.attrs["axis"], node.result.type.rank)
    assert x is not None
    whole = (node.attrs["start"], node.attrs["end"], node.attrs["step"]) == (0, rows.capacity, 1)
    if axis == rows.axis[x] and not whole:
        raise MixesRows
    return [rows.axis[x]]


def _cumsum(rows: Rows, node: Node) -> list[int | None]:
    """Over rows too: of those before."""
    x = node.operands[0]
    assert x is not None
    return [rows.axis[x]]


def _gather(rows: Rows, node: Node) -> list[int | None]:
    x, index = node.operands
    assert x is not None
    assert index is not None
    axis = normal_axis(node.attrs["axis"], x.type.rank)
    if x in rows.axis:
        at = rows.axis[x]
        if index in rows.axis or axis == at:
            raise MixesRows
        return [at if at < axis else at + index.type.rank - 1]
    return [axis + rows.axis[index]]


def _matmul(rows: Rows, node: Node) -> list[int | None]:
    """Rows of one side: of the left one, or as columns of the right one; or of a batch of both."""
    a, b = node.operands
    assert a is not None
    assert b is not None
    found = set()
    for v, contracted in ((a, 1), (b, 2)):
        if v in rows.axis:
            if rows.from_right(v) == contracted:
                raise MixesRows
            found.add(rows.from_right(v))
    if len(found) != 1 or (a in rows.axis and b in rows.axis and min(found) <= 2):
        raise MixesRows
    return [node.result.type.rank - min(found)]


def _sum(rows: Rows, node: Node) -> list[int | None]:
    """Of values that are 0 in free rows; over another axis nothing is said."""
    x = node.operands[0]
    assert x is not None
    axes = [normal_axis(a, x.type.rank) for a in node.attrs["axes"]]
    at = rows.axis[x]
    if at in axes and x not in rows.zero:
        raise MixesRows
    if at in axes:
        return [None]
    return [at if node.attrs["keepdim"] else at - sum(1 for a in axes if a < at)]


def _quantize(rows: Rows, node: Node) -> list[int | None]:
    """Scales of blocks within a row."""
    if node.attrs["block"][0] != 1:
        raise MixesRows
    return _per_row(rows, node)


def _write(rows: Rows, node: Node) -> list[int | None]:
    x = node.operands[0]
    assert x is not None
    if any(v in rows.axis for v in node.operands[1:]):
        raise MixesRows
    return [rows.axis[x]]


def _attention(rows: Rows, node: Node) -> list[int | None]:
    """The caller has masked what is free."""
    q, k, v, mask, *sinks = node.operands
    assert mask is not None
    keys = all(x in rows.axis and rows.axis[x] == 2 for x in (k, v) if x is not None)
    masked = mask in rows.axis and rows.from_right(mask) == 1
    if q in rows.axis or any(s in rows.axis for s in sinks) or not keys or not masked:
        raise MixesRows
    return [None]


_RULES: dict[str, Rule] = {
    "tensor.transpose": _transpose, "tensor.reshape": _reshape, "tensor.expand": _expand, "tensor.concat": _elsewhere,
    "tensor.split": _elsewhere, "tensor.slice": _slice, "tensor.gather": _gather, "tensor.write": _write,
    "math.cumsum": _cumsum, "math.sum": _sum, "linear.matmul": _matmul, "rope.apply": _aligned,
    "quant.quantize": _quantize, "attention.sdpa": _attention,
}  # fmt: skip
