"""What a model takes for granted of its sizes: a Reshape that fits one size only, an If on a size whose branches give
tensors of different ranks. Each fact is known from the start when the model is imported again, and becomes bounds of an
input's size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import sympy

from moec.ir import CompileError, Dim

T = TypeVar("T")
Bounds = dict[str, tuple[int, int | None]]
MOST_FACTS = 16
_LARGEST = 1 << 40  # a size beyond any tensor's


@dataclass(frozen=True)
class Fact:
    """`size` is `value`, or is not. The value is a size as well only where `size` is a symbol."""

    size: Dim
    value: int | Dim
    equal: bool = True

    def __str__(self) -> str:
        return f"{self.size} {'=' if self.equal else '≠'} {self.value}"

    def bounds(self) -> tuple[str, int, int | None]:
        """The symbol in the size, and the least and the greatest that it may be (None: any). Raises CompileError where
        the size does not grow with one symbol."""
        symbols = sorted(self.size.symbols)
        if len(symbols) != 1 or not _grows(self.size.expr) or isinstance(self.value, Dim):
            raise CompileError(f"{self} says nothing of one size alone", code="dims")
        least, beyond = self._first(self.value), self._first(self.value + 1)
        if not self.equal:  # of those on either side of the value, the larger: 0 and 1 are special
            least, beyond = beyond, None
        if least is None or least == beyond:
            raise CompileError(f"no {symbols[0]} makes {self}", code="dims")
        return symbols[0], least, None if beyond is None else beyond - 1

    def _first(self, value: int) -> int | None:
        """The least n for which the size is at least `value`; None where there is none."""
        (symbol,) = self.size.symbols
        low, high = 0, 1
        while self.size.evaluate({symbol: high}) < value:
            low, high = high, 2 * high
            if high > _LARGEST:
                return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.size.evaluate({symbol: middle}) >= value else (middle + 1, high)
        return low


def _grows(expr: sympy.Expr) -> bool:
    """Whether an expression never falls as its symbol grows."""
    if expr.is_Symbol or expr.is_Rational:
        return True
    if expr.is_Mul:
        factor, rest = expr.as_coeff_Mul()
        return bool(factor > 0) and not rest.is_Mul and _grows(rest)
    kinds = (sympy.Add, sympy.floor, sympy.ceiling, sympy.Max, sympy.Min)
    return isinstance(expr, kinds) and all(map(_grows, expr.args))


@dataclass(frozen=True)
class Facts:
    """Facts found so far, in the order in which they were."""

    known: tuple[Fact, ...] = ()

    def add(self, fact: Fact) -> Facts:
        """Raises CompileError where nothing would come of it."""
        if fact in self.known or len(self.known) >= MOST_FACTS:
            raise CompileError(f"{fact} cannot be made use of", code="unsupported-op")
        return Facts((*self.known, fact))

    def value(self, size: int | Dim) -> int | Dim | None:
        """What a symbolic size is, where that is known."""
        found = next((f.value for f in self.known if f.equal and f.size == size), None)
        return found if not isinstance(found, Dim) else self.value(found) or found

    def decides(self, fact: Fact) -> bool | None:
        """Whether the size of a fact is its value, where that is known."""
        return next((f.equal for f in self.known if f.size == fact.size and f.value == fact.value), None)

    def bounds(self) -> Bounds:
        """The sizes for which all facts hold. Raises CompileError where there are none, or that cannot be said."""
        found: Bounds = {}
        for fact in self.known:
            if fact.equal and fact.size.is_symbol:
                continue  # the inputs have the value for it
            symbol, low, high = fact.bounds()
            least, greatest = found.get(symbol, (0, None))
            highest = [h for h in (high, greatest) if h is not None]
            found[symbol] = max(low, least), min(highest, default=None)
            if highest and found[symbol][0] > min(highest):
                raise CompileError(f"no {symbol} fits: {', '.join(map(str, self.known))}", code="dims")
        return found


NOTHING = Facts()


class Needed(Exception):
    """A fact without which the model fails whenever it runs."""

    def __init__(self, fact: Fact):
        super().__init__(str(fact))
        self.fact = fact


class Undecided(Exception):
    """A fact that decides between two ways, neither of which can stay open; `error` says what is wrong otherwise."""

    def __init__(self, fact: Fact, error: CompileError):
        super().__init__(str(fact))
        self.fact = fact
        self.error = error


def explore(build: Callable[[Facts], T], example: Mapping[str, int], facts: Facts = NOTHING) -> T:
    """`build` with all facts that it needs. Where a fact is open, what the sizes of `example` make of it, else the only
    way on which the model can be imported. Raises CompileError where there is none, or more than one."""
    while True:
        try:
            return build(facts)
        except Needed as e:
            facts = facts.add(e.fact)
        except Undecided as e:
            fact, error = e.fact, e.error
            if fact.size.symbols <= example.keys():
                equal = fact.size.evaluate(example) == fact.value
                facts = facts.add(Fact(fact.size, fact.value, equal))
                continue
            break
    found: list[T] = []
    reasons: list[str] = []
    for equal in (True, False):
        way = Fact(fact.size, fact.value, equal)
        try:
            found.append(explore(build, example, facts.add(way)))
        except CompileError as other:
            reasons.append(f"where {way}: {other.message}")
    if len(found) == 1:
        return found[0]
    why = "; ".join(reasons) or f"{fact} and {Fact(fact.size, fact.value, not fact.equal)} are both possible"
    raise CompileError(
        f"{error.message}; {why}",
        code=error.code,
        location=error.location,
        hint=error.hint or "give example arguments: their sizes decide which way is taken",
    )


def relation(a: Any, b: Any) -> Fact | bool | None:
    """a = b for sizes of which one is a number: what it is, or the fact that decides it."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if isinstance(a, int):
        a, b = b, a
    if not isinstance(a, Dim) or not isinstance(b, int):
        return None
    more = a.expr - b
    return False if more.is_positive or more.is_negative else Fact(a, b)
