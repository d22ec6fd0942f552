"""Named axes: which axes of tensors that were named stand where in what is computed from them.

An einsum is lowered to transposes, reshapes and one batched product, written by hand it is any other mix of them. Names
of axes survive all that: where the operands of a product contract the same name, it is that einsum. An axis may hold
several names, outermost first, or a part of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moec.ir import Node, Value
from moec.passes.rewriting.match_values import scalar_constant

Size = Any  # int | Dim
REPEATED = "*"


@dataclass(frozen=True)
class Piece:
    """`size` positions of the axis called `name`, `stride` apart. What a broadcast repeats is called REPEATED."""

    name: str
    size: Size
    stride: Size = 1


Axis = tuple[Piece, ...]  # () for an axis of one element
Axes = tuple[Axis, ...]


def named(*names: str, sizes: Sequence[Size]) -> Axes:
    """Axes that hold one name each."""
    return tuple(() if s == 1 else (Piece(n, s),) for n, s in zip(names, sizes, strict=True))


def flattened(axes: Axes) -> Axis:
    """All pieces in order, neighbours that are one again joined."""
    joined: list[Piece] = []
    for piece in (p for axis in axes for p in axis):
        last = joined[-1] if joined else None
        if last is not None and last.name == piece.name and (
            piece.name == REPEATED or last.stride == piece.size * piece.stride
        ):  # fmt: skip
            joined[-1] = Piece(last.name, last.size * piece.size, piece.stride)
        else:
            joined.append(piece)
    return tuple(joined)


def regrouped(axes: Axes, shape: Sequence[Size]) -> Axes | None:
    """The axes after a reshape to `shape`; None where a size cuts a name at no whole number."""
    left = list(flattened(axes))
    result: list[Axis] = []
    for want in shape:
        taken: list[Piece] = []
        while want != 1:
            if not left:
                return None
            piece = left.pop(0)
            rest = _quotient(want, piece.size)
            if rest is not None:
                taken.append(piece)
                want = rest
                continue
            inner = _quotient(piece.size, want)
            if inner is None:
                return None
            taken.append(Piece(piece.name, want, piece.stride * inner))
            left.insert(0, Piece(piece.name, inner, piece.stride))
            want = 1
        result.append(flattened((tuple(taken),)))
    return tuple(result) if not left else None


def _quotient(a: Size, b: Size) -> Size | None:
    if b == 0:
        return None
    q = a // b
    return q if q * b == a else None


def unified(a: Axis, b: Axis) -> Axis | None:
    """What two axes of elementwise operands are together; None where they have different names."""
    if not a or not b or a == b:
        return a or b
    for one, other in ((a, b), (b, a)):
        if all(p.name == REPEATED for p in one):
            return other
    return None


@dataclass
class Named:
    """Axes of values, from those of `known` on. `axes(v)` is None where a name gets lost."""

    known: dict[Value, Axes | None] = field(default_factory=dict)

    def name(self, v: Value, tokens: Axis, last: str, size: Size) -> bool:
        """Names v, which holds [tokens, last] in any shape; False where the shape cuts through a name."""
        self.known[v] = regrouped((tokens, *named(last, sizes=[size])), v.shape)
        return self.known[v] is not None

    def axes(self, v: Value | None) -> Axes | None:
        if v is None:
            return None
        if v not in self.known:
            node = v.producer
            rule = _RULES.get(node.op) if node is not None else None
            if node is not None and node.opdef.elementwise:
                rule = _elementwise
            self.known[v] = rule(self, node, v) if rule is not None and node is not None else None
        return self.known[v]


def _reshape(names: Named, node: Node, v: Value) -> Axes | None:
    axes = names.axes(node.operands[0])
    return regrouped(axes, v.shape) if axes is not None else None


def _transpose(names: Named, node: Node, v: Value) -> Axes | None:
    axes = names.axes(node.operands[0])
    return tuple(axes[i] for i in node.attrs["perm"]) if axes is not None else None


def _expand(names: Named, node: Node, v: Value) -> Axes | None:
    axes = names.axes(node.operands[0])
    if axes is None:
        return None
    axes = (((),) * (v.type.rank - len(axes))) + axes
    return tuple(a if a or s == 1 else (Piece(REPEATED, s),) for a, s in zip(axes, v.shape, strict=True))


def _elementwise(names: Named, node: Node, v: Value) -> Axes | None:
    total: Axes = ((),) * v.type.rank
    for operand in node.operands:
        if operand is None or (operand.producer is not None and is_number(operand)):
            continue
        axes = names.axes(operand)
        if axes is None:
            return None
        axes = (((),) * (v.type.rank - len(axes))) + axes
        together = [unified(a, b) for a, b in zip(total, axes, strict=True)]
        if None in together:
            return None
        total = tuple(a for a in together if a is not None)
    return total


def is_number(v: Value) -> bool:
    """Whether v is one number, perhaps in a tensor full of it."""
    return scalar_constant(v) is not None or (v.producer is not None and v.producer.op == "tensor.full")


def _matmul(names: Named, node: Node, v: Value) -> Axes | None:
    a, b = (names.axes(o) for o in node.operands)
    if a is None or b is None or a[-1] != b[-2] or any(p.name == REPEATED for p in a[-1]):
        return None
    width = max(len(a), len(b))
    pairs = zip((((),) * (width - len(a))) + a[:-2], (((),) * (width - len(b))) + b[:-2], strict=True)
    batch = [unified(x, y) for x, y in pairs]
    return (*(x for x in batch if x is not None), a[-2], b[-1]) if None not in batch else None


def _linear(names: Named, node: Node, v: Value) -> Axes | None:
    x, weight = (names.axes(o) for o in node.operands[:2])
    if x is None or weight is None or x[-1] != weight[-1] or node.operands[2] is not None:
        return None
    return (*x[:-1], weight[0]) if all(p.name != REPEATED for p in x[-1]) else None


def _sum(names: Named, node: Node, v: Value) -> Axes | None:
    axes = names.axes(node.operands[0])
    if axes is None:
        return None
    over = {a % len(axes) for a in node.attrs["axes"]}
    if any(p.name == REPEATED for i in over for p in axes[i]):
        return None
    kept = [() if i in over else a for i, a in enumerate(axes)]
    return tuple(a for i, a in enumerate(kept) if node.attrs["keepdim"] or i not in over)


def _halves(names: Named, node: Node, v: Value) -> Axes | None:
    """Halves, or the even or odd positions, of a last axis called "gate_up" are "hidden"."""
    axes = names.axes(node.operands[0])
    if axes is None or node.attrs["axis"] not in (-1, len(axes) - 1) or axes[-1] == ():
        return None
    whole = axes[-1]
    if len(whole) != 1 or whole[0].name != "gate_up" or whole[0].stride != 1 or whole[0].size != 2 * v.shape[-1]:
        return None
    return (*axes[:-1], () if v.shape[-1] == 1 else (Piece("hidden", v.shape[-1]),))


def _gather(names: Named, node: Node, v: Value) -> Axes | None:
    """Experts of a table by ids whose axes have names."""
    table, index = (names.axes(o) for o in node.operands)
    if table is None or index is None or node.attrs["axis"] != 0:
        return None
    if table[0] != () and [p.name for p in table[0]] != ["expert"]:
        return None
    return (*index, *table[1:])


_RULES: dict[str, Callable[[Named, Node, Value], Axes | None]] = {
    "tensor.reshape": _reshape,
    "tensor.transpose": _transpose,
    "tensor.expand": _expand,
    "tensor.split": _halves,
    "tensor.slice": _halves,
    "tensor.gather": _gather,
    "linear.linear": _linear,
    "linear.matmul": _matmul,
    "math.glu": _elementwise,
    "math.sum": _sum,
}
