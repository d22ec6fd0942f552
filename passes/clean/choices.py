"""Choices: values of two numbers, one where a condition on positions holds and one elsewhere.

Masks are written as truth values, as 0 and −∞, or as 1 and 0 that are compared, scaled and taken from 1 later. All of
them are one condition and what stands on either side of it. `choice_form` finds both from the structure, and reads the
condition of a small stored mask from its elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moec.ir import Node, Value
from moec.passes.clean.index_forms import ALWAYS, Affine, Holds, index_form, moved_by, negation

Number = float | int | bool

# elementwise ops that are evaluated on both sides of a condition
_POINTWISE = (
    "math.add", "math.sub", "math.mul", "math.div", "math.neg", "math.abs", "math.cast", "math.eq", "math.ne",
    "math.lt", "math.le", "math.gt", "math.ge", "math.min", "math.max", "math.clamp", "math.not", "math.and",
    "math.or", "math.where",
)  # fmt: skip
# a stored mask larger than this is not read
_READ_LIMIT = 1 << 24


@dataclass(frozen=True)
class Choice:
    """`yes` where `holds`, `no` elsewhere."""

    holds: Holds
    yes: Number
    no: Number

    @property
    def constant(self) -> bool:
        return self.holds.always or self.yes == self.no

    def where(self, wanted: Number) -> Holds | None:
        """Where it is `wanted`; None where that is the negation of several conditions."""
        if self.constant:
            return ALWAYS if self.yes == wanted else Holds(never=True)
        if self.yes == wanted:
            return self.holds
        return negation(self.holds) if self.no == wanted else Holds(never=True)


def _choice(holds: Holds, yes: Number, no: Number) -> Choice:
    return Choice(ALWAYS, no, no) if holds.never else Choice(holds, yes, no)


def choice_form(v: Value, known: dict[Value, Choice | None] | None = None) -> Choice | None:
    """What `v` holds as a choice between two numbers; None where that is not known."""
    known = {} if known is None else known
    stack = [v]
    while stack:
        top = stack[-1]
        if top in known:
            stack.pop()
            continue
        missing = [o for o in _sources(top) if o not in known]
        if missing:
            stack += missing
        else:
            known[top] = _form(top, known)
    return known[v]


def truth(v: Value) -> Holds | None:
    """Where a truth value is true, as conditions on positions; None where that is not known."""
    form = choice_form(v) if v.dtype == "bool" else None
    return form.where(True) if form is not None else None


def undecided(v: Value) -> Value:
    """The first value below `v`, which has no form, that positions do not decide: an input, a computed number."""
    known: dict[Value, Choice | None] = {}
    while choice_form(v, known) is None:
        # positions themselves are no choice between two numbers; a comparison of them is
        below = [o for o in _sources(v) if known[o] is None and not isinstance(index_form(o), Affine)]
        if not below:
            return v
        v = below[0]
    return v


def _sources(v: Value) -> list[Value]:
    if v.producer is None or (v.dtype == "bool" and isinstance(index_form(v), Holds)):
        return []
    return [o for o in v.producer.operands if o is not None]


def _form(v: Value, known: dict[Value, Choice | None]) -> Choice | None:
    if v.dtype == "bool":
        holds = index_form(v)
        if isinstance(holds, Holds):
            return _choice(holds, True, False)
    node = v.producer
    if node is None:
        return _stored(v)
    if node.op in ("tensor.full", "tensor.constant"):
        value = node.attrs["value"]
        numbers = set(value) if isinstance(value, tuple) else {value}
        (number,) = numbers if len(numbers) == 1 else (None,)
        return Choice(ALWAYS, number, number) if number is not None else None
    forms = [known[o] for o in node.operands if o is not None]
    if node.op in _POINTWISE:
        return _pointwise(node, forms)
    if len(forms) == 1 and forms[0] is not None:
        moved = moved_by(node, forms[0].holds)
        return _choice(moved, forms[0].yes, forms[0].no) if moved is not None else None
    return None


def _pointwise(node: Node, forms: list[Choice | None]) -> Choice | None:
    given = [f for f in forms if f is not None]
    if len(given) < len(forms) or not all(isinstance(o, Value) for o in node.operands):
        return None
    conditions = {f.holds for f in given if not f.constant}
    if len(conditions) > 1:
        return _several(node, given)
    holds = conditions.pop() if conditions else ALWAYS
    yes = _evaluated(node, [f.yes for f in given])
    no = _evaluated(node, [f.yes if f.constant else f.no for f in given])
    return _choice(holds, yes, no)


def _evaluated(node: Node, numbers: list[Number]) -> Number:
    operands = [torch.tensor(x, dtype=o.dtype.torch) for x, o in zip(numbers, node.operands, strict=True) if o]
    number: Number = node.opdef.instance(operands, node.attrs).reference().item()
    return number


def _several(node: Node, forms: list[Choice]) -> Choice | None:
    """Conjunctions of different conditions: and, not (or), and a choice inside of one."""
    if node.op in ("math.and", "math.or"):
        # a or b is not (not a and not b)
        wanted = node.op == "math.and"
        parts = [f.where(wanted) for f in forms]
        both = _both(parts)
        return _choice(both, wanted, not wanted) if both is not None else None
    if node.op == "math.where":
        condition, a, b = forms
        for wanted, chosen, other in ((True, a, b), (False, b, a)):
            if other.constant and not chosen.constant and other.yes in (chosen.yes, chosen.no):
                number = chosen.no if other.yes == chosen.yes else chosen.yes
                both = _both([condition.where(wanted), chosen.where(number)])
                return _choice(both, number, other.yes) if both is not None else None
    return None


def _both(parts: list[Holds | None]) -> Holds | None:
    known = [h for h in parts if h is not None]
    if any(h.never for h in known):
        return Holds(never=True)
    if len(known) < len(parts):
        return None
    return Holds(frozenset().union(*(h.conditions for h in known)))


def _stored(v: Value) -> Choice | None:
    """A stored mask [1, …, S, T] whose elements are one number up to a diagonal, and another one past it."""
    weight = v.weight
    if weight is None or weight.source is None or v.type.rank < 2:
        return None
    size = v.type.numel
    if not isinstance(size, int) or not 0 < size <= _READ_LIMIT:
        return None
    if any(s != 1 for s in v.shape[:-2]) or 1 in v.shape[-2:]:
        return None
    table = weight.load().reshape(v.shape[-2:])
    yes, no = table[-1, 0], table[0, -1]
    if bool((table == yes).all()):
        return Choice(ALWAYS, yes.item(), yes.item())
    lower = table == yes
    first = int(lower.any(1).int().argmax())  # the first row with an element that is `yes`
    diagonal = int(lower[first].sum()) - 1 - first
    if not torch.equal(lower, torch.ones_like(lower).tril(diagonal)) or not bool((table[~lower] == no).all()):
        return None
    return Choice(Holds(frozenset({Affine.of(diagonal, {-2: 1, -1: -1})})), yes.item(), no.item())
