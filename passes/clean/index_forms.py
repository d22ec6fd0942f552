"""Index forms: what an integer or boolean value holds, as a function of the position in it.

Models build positions, offsets and masks in the graph, from arange, comparisons, gathers and running sums. What such
a value holds often follows from the structure alone: an integer is an affine function of its indices, a truth value
holds where some affine functions are not negative. `index_form` finds these functions, without running anything and
for every size of the symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moec.ir import Dim, Node, Value

Size = int | Dim


@dataclass(frozen=True)
class Affine:
    """const + Σ factor · index[axis] over axes counted from the end (so that broadcasting changes nothing)."""

    const: Size
    terms: tuple[tuple[int, Size], ...] = ()

    @staticmethod
    def of(const: Size, terms: Mapping[int, Size] | None = None) -> Affine:
        return Affine(const, tuple(sorted((a, c) for a, c in (terms or {}).items() if c != 0)))

    @property
    def factors(self) -> dict[int, Size]:
        return dict(self.terms)

    def plus(self, other: Affine, sign: int = 1) -> Affine:
        factors = self.factors
        for a, c in other.terms:
            factors[a] = factors.get(a, 0) + sign * c
        return Affine.of(self.const + sign * other.const, factors)

    def times(self, factor: Size) -> Affine:
        return Affine.of(self.const * factor, {a: c * factor for a, c in self.terms})

    def moved(self, axes: Mapping[int, int]) -> Affine:
        """With its axes renamed; axes that are not named have one element and give nothing."""
        return Affine.of(self.const, {axes[a]: c for a, c in self.terms if a in axes})

    def substitute(self, axis: int, index: Affine) -> Affine:
        """With index[axis] = `index`."""
        factors = self.factors
        factor = factors.pop(axis, 0)
        return Affine.of(self.const, factors).plus(index.times(factor))

    def never_negative(self, shape: tuple[Size, ...]) -> bool:
        """Whether it is ≥ 0 at every index of `shape`, for all sizes. False also where that is not known."""
        least = self.const
        for axis, factor in self.terms:
            if _not_negative(factor):
                continue
            if -axis > len(shape) or not _not_negative(-1 * factor):
                return False
            least = least + factor * (shape[axis] - 1)
        # an index exists only where no axis is empty
        present = {str(s): s + 1 for s in shape if isinstance(s, Dim) and s.is_symbol}
        return _not_negative(least.substitute(present) if isinstance(least, Dim) and present else least)


@dataclass(frozen=True)
class Holds:
    """True where each of `conditions` is ≥ 0: everywhere if there is none; `never`: nowhere."""

    conditions: frozenset[Affine] = frozenset()
    never: bool = False

    @property
    def always(self) -> bool:
        return not self.conditions and not self.never


ALWAYS, NEVER = Holds(), Holds(never=True)
IndexForm = Affine | Holds | None


def _not_negative(x: Size) -> bool:
    """Whether a size expression is ≥ 0 whatever its symbols are (a sum of products with factors ≥ 0)."""
    if isinstance(x, int):
        return x >= 0
    return bool(x.expr.is_polynomial()) and all(c.is_nonnegative for c in x.expr.as_coefficients_dict().values())


def index_form(v: Value, known: dict[Value, IndexForm] | None = None) -> IndexForm:
    """What `v` holds: an Affine for integers, Holds for truth values, None where neither is known.

    `known` may be shared between calls on one graph that does not change in between.
    """
    known = {} if known is None else known
    stack = [v]
    while stack:
        top = stack[-1]
        node = top.producer
        if top in known:
            stack.pop()
            continue
        rule = _RULES.get(node.op) if node is not None else None
        if node is None or rule is None or not (top.dtype.is_integer or top.dtype == "bool"):
            known[top] = None
            continue
        sources = _sources(node)
        missing = [o for o in sources if o not in known]
        if missing:
            stack += missing
            continue
        known[top] = _on_long_axes(rule(node, [known[o] for o in sources]), top.shape)
    return known[v]


def _sources(node: Node) -> list[Value]:
    """Operands; for a gather from a flattened table the table as it was before."""
    values = [o for o in node.operands if o is not None]
    return [unflattened(values[0]), values[1]] if node.op == "tensor.gather" else values


def unflattened(table: Value) -> Value:
    """What a rank-1 table was reshaped from."""
    while table.type.rank == 1 and table.producer is not None and table.producer.op == "tensor.reshape":
        (inner,) = table.producer.operands
        assert inner is not None
        table = inner
    return table


def _on_long_axes(form: IndexForm, shape: tuple[Size, ...]) -> IndexForm:
    """Without terms of axes that have one element, whose index is 0 (they may broadcast later)."""
    axes = {i - len(shape): i - len(shape) for i, s in enumerate(shape) if s != 1}
    return _moved(form, axes)


def unraveled(index: Affine, at: tuple[Size, ...], table: tuple[Size, ...]) -> list[Affine] | None:
    """The position on each axis of a table of shape `table` that the row-major number `index` stands for, at every
    index of shape `at`; None where that is not known, or the table has no axes."""
    if not table:
        return None
    strides: list[Size] = [1]
    for s in reversed(table[1:]):
        strides.insert(0, strides[0] * s)
    parts: list[dict[int, Size]] = [{} for _ in table]
    for axis, factor in index.terms:
        if factor not in strides:
            return None
        parts[strides.index(factor)][axis] = 1
    found = [Affine.of(0, p) for p in parts]
    found[-1] = found[-1].plus(Affine.of(index.const))
    for position, s in zip(found, table, strict=True):
        inside = position.times(-1).plus(Affine.of(s - 1))
        if not position.never_negative(at) or not inside.never_negative(at):
            return None
    return found


# -- one function per op: (node, forms of the operands) → form of the result ----------------------------------------


def _constant(node: Node, forms: list[IndexForm]) -> IndexForm:
    values, rank = node.attrs["value"], node.results[0].type.rank
    if all(isinstance(x, bool) for x in values):
        return ALWAYS if all(values) else NEVER if not any(values) else None
    if rank > 1 or not values or not all(isinstance(x, int) for x in values):
        return None
    step = values[1] - values[0] if len(values) > 1 else 0
    if any(x != values[0] + i * step for i, x in enumerate(values)):
        return None
    return Affine.of(values[0], {-1: step} if rank else {})


def _full(node: Node, forms: list[IndexForm]) -> IndexForm:
    value = node.attrs["value"]
    if isinstance(value, bool):
        return ALWAYS if value else NEVER
    return Affine.of(value) if isinstance(value, int) else None


def _dim(node: Node, forms: list[IndexForm]) -> IndexForm:
    return Affine.of(node.attrs["value"])


def _arange(node: Node, forms: list[IndexForm]) -> IndexForm:
    return Affine.of(node.attrs["start"], {-1: node.attrs["step"]})


def _sum(sign: int) -> Callable[[Node, list[IndexForm]], IndexForm]:
    def rule(node: Node, forms: list[IndexForm]) -> IndexForm:
        a, b = forms
        return a.plus(b, sign) if isinstance(a, Affine) and isinstance(b, Affine) else None

    return rule


def _product(node: Node, forms: list[IndexForm]) -> IndexForm:
    a, b = forms
    if not isinstance(a, Affine) or not isinstance(b, Affine):
        return None
    if b.terms:
        a, b = b, a
    return None if b.terms else a.times(b.const)


def _negative(node: Node, forms: list[IndexForm]) -> IndexForm:
    return forms[0].times(-1) if isinstance(forms[0], Affine) else None


def _cast(node: Node, forms: list[IndexForm]) -> IndexForm:
    x, dtype = forms[0], node.results[0].dtype
    if isinstance(x, Affine):
        return x if dtype.is_integer else None
    if x is None or dtype == "bool":
        return x
    return Affine.of(1) if x.always else Affine.of(0) if x.never else None


def _clamp(node: Node, forms: list[IndexForm]) -> IndexForm:
    x, low, shape = forms[0], node.attrs["low"], node.results[0].shape
    if not isinstance(x, Affine) or node.attrs["high"] is not None or not isinstance(low, int):
        return None
    return x if x.plus(Affine.of(-low)).never_negative(shape) else None


def _reshape(node: Node, forms: list[IndexForm]) -> IndexForm:
    """Axes of one element come and go; the others keep their order."""
    (x,) = node.operands
    assert x is not None
    old = [i - x.type.rank for i, s in enumerate(x.shape) if s != 1]
    shape = node.results[0].shape
    new = [i - len(shape) for i, s in enumerate(shape) if s != 1]
    same = [x.shape[a] for a in old] == [shape[a] for a in new]
    return _moved(forms[0], dict(zip(old, new, strict=True))) if same else _moved(forms[0], None)


def _moved(form: IndexForm, axes: Mapping[int, int] | None) -> IndexForm:
    """On other axes; None: only what does not depend on the index stays known."""
    if isinstance(form, Affine):
        return form.moved(axes) if axes is not None else None if form.terms else form
    if form is None or not form.conditions:
        return form
    return Holds(frozenset(c.moved(axes) for c in form.conditions)) if axes is not None else None


def _expand(node: Node, forms: list[IndexForm]) -> IndexForm:
    return forms[0]


def _transpose(node: Node, forms: list[IndexForm]) -> IndexForm:
    perm = node.attrs["perm"]
    rank = len(perm)
    return _moved(forms[0], {p - rank: i - rank for i, p in enumerate(perm)})


def _slice(node: Node, forms: list[IndexForm]) -> IndexForm:
    axis, rank = node.attrs["axis"], node.results[0].type.rank
    axis = axis % rank - rank
    form, moved = forms[0], Affine.of(node.attrs["start"], {axis: node.attrs["step"]})
    if form is None or not _not_negative(node.attrs["start"]):
        return None
    return _at(form, {a: moved if a == axis else Affine.of(0, {a: 1}) for a in range(-rank, 0)})


def _concat(node: Node, forms: list[IndexForm]) -> IndexForm:
    """Parts that continue one function, as 0, 1 | 2, 3 do."""
    rank = node.results[0].type.rank
    axis = node.attrs["axis"] % rank - rank
    whole, sizes = forms[-1], [o.shape[axis] for o in node.operands if o is not None]
    if not isinstance(whole, Affine) or not all(isinstance(f, Affine) for f in forms):
        return None
    before: Size = 0
    for s in sizes[:-1]:
        before = before + s
    # the last part's function of the whole's index; the others must be it where they are
    whole = whole.substitute(axis, Affine.of(-1 * before, {axis: 1}))
    start: Size = 0
    for form, s in zip(forms[:-1], sizes, strict=False):
        here = whole.substitute(axis, Affine.of(start, {axis: 1}))
        if isinstance(s, int) and s == 1:
            here = here.substitute(axis, Affine.of(0))
        if here != form:
            return None
        start = start + s
    return whole


def _running_sum(node: Node, forms: list[IndexForm]) -> IndexForm:
    """Of zeros; of a constant c: c · (index + 1)."""
    x, rank = forms[0], node.results[0].type.rank
    if not isinstance(x, Affine) or x.terms:
        return None
    return Affine.of(x.const, {node.attrs["axis"] % rank - rank: x.const})


def _compare(greater: int, strict: int) -> Callable[[Node, list[IndexForm]], IndexForm]:
    """a ≥ b (greater=1) or a ≤ b (−1), strictly or not, on integers."""

    def rule(node: Node, forms: list[IndexForm]) -> IndexForm:
        a, b = forms
        if not isinstance(a, Affine) or not isinstance(b, Affine):
            return None
        return _where_not_negative(a.plus(b, -1).times(greater).plus(Affine.of(-strict)), node.results[0].shape)

    return rule


def _where_not_negative(form: Affine, shape: tuple[Size, ...]) -> Holds:
    if form.never_negative(shape):
        return ALWAYS
    return NEVER if form.times(-1).plus(Affine.of(-1)).never_negative(shape) else Holds(frozenset({form}))


def _equal(node: Node, forms: list[IndexForm]) -> IndexForm:
    a, b = forms
    if isinstance(a, Affine) and isinstance(b, Affine):
        difference, shape = a.plus(b, -1), node.results[0].shape
        both = [_where_not_negative(difference.times(sign), shape) for sign in (1, -1)]
        return NEVER if any(h.never for h in both) else Holds(both[0].conditions | both[1].conditions)
    return None


def _unequal(node: Node, forms: list[IndexForm]) -> IndexForm:
    return _not(node, [_equal(node, forms)])


def _not(node: Node, forms: list[IndexForm]) -> IndexForm:
    return negation(forms[0]) if isinstance(forms[0], Holds) else None


def negation(holds: Holds) -> Holds | None:
    """Where it does not hold; None for several conditions, of which one fails."""
    if not holds.conditions:
        return ALWAYS if holds.never else NEVER
    if len(holds.conditions) > 1:
        return None
    (condition,) = holds.conditions
    return Holds(frozenset({condition.times(-1).plus(Affine.of(-1))}))


def _and(node: Node, forms: list[IndexForm]) -> IndexForm:
    if any(isinstance(f, Holds) and f.never for f in forms):
        return NEVER
    a, b = forms
    return Holds(a.conditions | b.conditions) if isinstance(a, Holds) and isinstance(b, Holds) else None


def _or(node: Node, forms: list[IndexForm]) -> IndexForm:
    if any(isinstance(f, Holds) and f.always for f in forms):
        return ALWAYS
    a, b = forms
    if isinstance(a, Holds) and isinstance(b, Holds) and (a.never or b.never):
        return b if a.never else a
    return None


def _where(node: Node, forms: list[IndexForm]) -> IndexForm:
    condition, a, b = forms
    if isinstance(condition, Holds) and not condition.conditions:
        return b if condition.never else a
    return a if a == b else None


def _gather(node: Node, forms: list[IndexForm]) -> IndexForm:
    """An element of a rank-1 table, or of one that was flattened."""
    table, indices = _sources(node)
    known, index = forms
    if (isinstance(known, Affine) and not known.terms) or (isinstance(known, Holds) and not known.conditions):
        return known
    if node.operands[0] is None or node.operands[0].type.rank != 1 or not isinstance(index, Affine) or known is None:
        return None
    positions = unraveled(index, indices.shape, table.shape)
    if positions is None:
        return None
    return _at(known, {a - table.type.rank: p for a, p in enumerate(positions)})


def _at(form: Affine | Holds, index: Mapping[int, Affine]) -> Affine | Holds:
    """The form with every index replaced at once."""
    if isinstance(form, Holds):
        return Holds(frozenset(_affine_at(c, index) for c in form.conditions), form.never)
    return _affine_at(form, index)


def _affine_at(form: Affine, index: Mapping[int, Affine]) -> Affine:
    total = Affine.of(form.const)
    for axis, factor in form.terms:
        total = total.plus(index[axis].times(factor))
    return total


def moved_by(node: Node, holds: Holds) -> Holds | None:
    """Where the result of an op that only moves elements holds, its operand being true where `holds`."""
    if node.op not in ("tensor.reshape", "tensor.expand", "tensor.transpose", "tensor.slice"):
        return None
    form = _RULES[node.op](node, [holds])
    moved = _on_long_axes(form, node.results[0].shape) if isinstance(form, Holds) else None
    return moved if isinstance(moved, Holds) else None


_RULES: dict[str, Callable[[Node, list[IndexForm]], IndexForm]] = {
    "tensor.constant": _constant,
    "tensor.full": _full,
    "tensor.dim": _dim,
    "tensor.arange": _arange,
    "tensor.reshape": _reshape,
    "tensor.expand": _expand,
    "tensor.transpose": _transpose,
    "tensor.slice": _slice,
    "tensor.concat": _concat,
    "tensor.gather": _gather,
    "math.add": _sum(1),
    "math.sub": _sum(-1),
    "math.mul": _product,
    "math.neg": _negative,
    "math.cast": _cast,
    "math.clamp": _clamp,
    "math.cumsum": _running_sum,
    "math.ge": _compare(1, 0),
    "math.gt": _compare(1, 1),
    "math.le": _compare(-1, 0),
    "math.lt": _compare(-1, 1),
    "math.eq": _equal,
    "math.ne": _unequal,
    "math.not": _not,
    "math.and": _and,
    "math.or": _or,
    "math.where": _where,
}
