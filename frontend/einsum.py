"""Einstein summation in the IR's ops: transposes, batched products and sums. torch's and ONNX's operators end here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moec.frontend.context import Context, Size
from moec.ir import DType, Value
from moec.ir.dims import product

Axis = str | int  # a letter; the axes of an ellipsis are −1, −2, … from the right, as they broadcast


class _Term(NamedTuple):
    """A value with the names of its axes, none of them twice."""

    value: Value
    axes: tuple[Axis, ...]

    def size(self, axis: Axis) -> Size:
        return self.value.shape[self.axes.index(axis)]


def einsum(
    c: Context, equation: str, operands: Sequence[Value], path: Sequence[int] = (), *, wide_sums: bool = False
) -> Value:
    """numpy.einsum: products of any number of operands, ellipses, axes of size 1 that broadcast, diagonals of repeated
    letters, a result that is left out. Two operands at a time are contracted, from left to right or in the order of
    `path` (pairs of places, each product goes to the end); where that is no matrix product, they may be of two dtypes.
    `wide_sums`: integers and bools are added up in i64 where nothing is multiplied, as torch does. Raises CompileError
    for equations that do not fit the operands."""
    inputs, result = _parsed(c, equation, operands)
    terms = [_diagonal(c, _Term(v, axes)) for v, axes in zip(operands, inputs, strict=True)]
    at = 0
    while len(terms) > 1:
        i, j = sorted(path[at : at + 2]) if path else (0, 1)
        at += 2
        right, left = terms.pop(j), terms.pop(i)
        kept = {a for t in terms for a in t.axes}.union(result)
        terms.insert(len(terms) if path else 0, _contract(c, left, right, kept, wide_sums))
    last = _summed(c, terms[0], set(result), wide_sums)
    return c.transpose(last.value, [last.axes.index(a) for a in result])


def _parsed(c: Context, equation: str, operands: Sequence[Value]) -> tuple[list[tuple[Axis, ...]], tuple[Axis, ...]]:
    """The axes of each operand and of the result."""
    text, arrow, result = equation.replace(" ", "").partition("->")
    words = text.split(",")
    if len(words) != len(operands):
        raise c.refuse(f"equation {equation!r} of {len(operands)} operands", code="type")
    inputs: list[tuple[Axis, ...]] = []
    for word, v in zip(words, operands, strict=True):
        open_axes = v.type.rank - len(word.replace("...", ""))
        if open_axes < 0 or (open_axes and "..." not in word):
            raise c.refuse(f"equation {equation!r} of {', '.join(str(o.type) for o in operands)}", code="type")
        inputs.append(_axes(word, open_axes))
    broadcast = tuple(range(min((a for axes in inputs for a in axes if isinstance(a, int)), default=0), 0))
    if not arrow:
        once = sorted(x for x in set(text) - set(",.") if text.count(x) == 1)
        return inputs, (*broadcast, *once)
    axes = _axes(result, len(broadcast))
    if len(set(axes)) < len(axes) or not {a for a in axes if isinstance(a, str)} <= set(text):
        raise c.refuse(f"equation {equation!r}", code="type")
    return inputs, axes


def _axes(word: str, open_axes: int) -> tuple[Axis, ...]:
    before, ellipsis, after = word.partition("...")
    return (*before, *(range(-open_axes, 0) if ellipsis else ()), *after)


def _diagonal(c: Context, term: _Term) -> _Term:
    """Of every letter that stands twice only the elements where both indices are the same."""
    value, axes = term
    while len(set(axes)) < len(axes):
        i = next(i for i, a in enumerate(axes) if a in axes[i + 1 :])
        j = axes.index(axes[i], i + 1)
        others = [k for k in range(len(axes)) if k not in (i, j)]
        x = c.transpose(value, [*others, i, j])
        rows, columns = x.shape[-2:]
        if rows != columns:
            raise c.refuse(f"axis {axes[i]!r} is of {rows} and of {columns} elements", code="type")
        flat = c.reshape(x, (*x.shape[:-2], product([rows, columns])))
        places = c.b.mul(c.b.arange(end=rows), c.b.add(c.value(rows, DType.I64), c.value(1, DType.I64)))
        value, axes = c.b.gather(flat, places, axis=len(others)), (*(axes[k] for k in others), axes[i])
    return _Term(value, axes)


def _summed(c: Context, term: _Term, kept: set[Axis], wide: bool) -> _Term:
    """Without the axes that are not kept."""
    gone = tuple(i for i, a in enumerate(term.axes) if a not in kept)
    if not gone:
        return term
    x = c.cast(term.value, DType.I64) if wide and not term.value.dtype.is_float else term.value
    return _Term(c.b.sum(x, axes=gone, keepdim=False), tuple(a for a in term.axes if a in kept))


def _narrowed(c: Context, term: _Term, other: _Term) -> _Term:
    """Without the axes of size 1 that the other's broadcast."""
    wide = {a for a in term.axes if a in other.axes and term.size(a) == 1 and other.size(a) != 1}
    axes = tuple(a for a in term.axes if a not in wide)
    return _Term(c.reshape(term.value, [term.size(a) for a in axes]), axes)


def _contract(c: Context, left: _Term, right: _Term, kept: set[Axis], wide: bool) -> _Term:
    """Σ of the product over every axis that is not kept: a batched matrix product over those that both have."""
    left, right = _narrowed(c, left, right), _narrowed(c, right, left)
    left, right = _summed(c, left, kept.union(right.axes), wide), _summed(c, right, kept.union(left.axes), wide)
    both = [a for a in left.axes if a in right.axes]
    for a in both:
        if left.size(a) != right.size(a):
            raise c.refuse(f"axis {a!r} is of {left.size(a)} and of {right.size(a)} elements", code="type")
    batch, contracted = [a for a in both if a in kept], [a for a in both if a not in kept]
    rows, columns = ([a for a in t.axes if a not in both] for t in (left, right))
    sizes = {a: t.size(a) for t in (left, right) for a in t.axes}
    axes = (*batch, *rows, *columns)
    if not contracted or not left.value.dtype.is_float:
        every = (*axes, *contracted)
        x, y = (_placed(c, t, every) for t in (left, right))
        both_bool = c.promote(x, y) is DType.BOOL
        return _summed(c, _Term(c.b.and_(x, y) if both_bool else c.binary("mul", x, y), every), kept, False)

    def arranged(term: _Term, *groups: list[Axis]) -> Value:
        x = c.transpose(term.value, [term.axes.index(a) for g in groups for a in g])
        return c.reshape(x, [product([sizes[a] for a in g]) for g in groups if g or g is not batch])

    y = c.b.matmul(arranged(left, batch, rows, contracted), arranged(right, batch, contracted, columns))
    return _Term(c.reshape(y, [sizes[a] for a in axes]), axes)


def _placed(c: Context, term: _Term, axes: Sequence[Axis]) -> Value:
    """With an axis of size 1 for every one that it lacks."""
    order = [term.axes.index(a) for a in axes if a in term.axes]
    return c.reshape(c.transpose(term.value, order), [term.size(a) if a in term.axes else 1 for a in axes])
