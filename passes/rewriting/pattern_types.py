"""The parts of a pattern: what the methods of `p` build and the matcher reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from moec.ir import DType, OpDef


@dataclass(frozen=True, eq=False)
class Var:
    """Captures any value; the same capture twice must be the same value. `optional` also takes absence."""

    name: str
    optional: bool = False


@dataclass(frozen=True, eq=False)
class Const:
    """A scalar constant: of a given `value` (exact in its dtype, or within `rtol`), or captured by `name`
    as a Python number."""

    name: str | None = None
    value: float | int | bool | None = None
    rtol: float = 0.0


@dataclass(frozen=True, eq=False)
class AttrCapture:
    """Captures an attribute under `name` (None: matches anything); equal captures must agree."""

    name: str | None = None


@dataclass(frozen=True, eq=False)
class DimCapture(AttrCapture):
    """Captures one size, an int or a Dim, inside a shape."""


@dataclass(frozen=True, eq=False)
class Sizes:
    """A tuple attribute or a shape entry by entry: numbers, Dims, captures; `...` stands for any entries."""

    entries: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Typed:
    """Matches like its inner pattern where the value also has this dtype and shape."""

    inner: Any
    dtypes: tuple[DType, ...] = ()
    shape: Sizes | None = None


@dataclass(frozen=True, eq=False)
class Either:
    """The first alternative that matches."""

    options: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Bind:
    """Captures the value that an inner pattern matched."""

    name: str
    inner: Any


@dataclass(frozen=True, eq=False)
class Shared:
    """Matches like its inner pattern, whose nodes may have other uses and stay in the graph."""

    inner: Any


@dataclass(frozen=True, eq=False)
class Rest:
    """Captures any number of further operands as a tuple."""

    name: str


@dataclass(frozen=True, eq=False)
class Repeat:
    """At least `least` operands that match `inner`; `names` are its own captures, one value for each
    repetition, `nodes` its own nodes. All other captures are common to the repetitions."""

    inner: Any
    names: frozenset[str]
    nodes: frozenset[PNode]
    least: int = 1


@dataclass(frozen=True, eq=False)
class PNode:
    """One node of the pattern; `PResult` picks one of its results. With `tree` it stands for all nodes of a
    maximal tree of one op, whose leaves are the operands in any order; with `below` for the top of a chain of
    repetitions, each on the one that it captures by that name; the operands are the repetition and the chain's end."""

    opdef: OpDef
    operands: tuple[Any, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    results: int = 1
    tree: bool = False
    below: str | None = None


@dataclass(frozen=True, eq=False)
class PResult:
    node: PNode
    index: int = 0


def parts(q: Any) -> tuple[Any, ...]:
    """The patterns directly inside one."""
    match q:
        case PResult():
            return q.node.operands
        case Either():
            return q.options
        case Bind() | Shared() | Typed() | Repeat():
            return (q.inner,)
    return ()


def walk(patterns: Any) -> Iterator[Any]:
    """All parts of patterns, operands included, each once however many use it."""
    stack = list(patterns)
    seen: set[Any] = set()
    while stack:
        q = stack.pop()
        if q not in seen:
            seen.add(q)
            yield q
            stack += parts(q)


@dataclass(frozen=True, eq=False)
class Pattern:
    """A built pattern: its roots (the values to replace) and the captures' names."""

    roots: tuple[PResult, ...]
    nodes: tuple[PNode, ...]
    captures: tuple[str, ...]
    shared: frozenset[PNode] = frozenset()

    @cached_property
    def depth(self) -> int:
        """Longest chain of nodes from a root."""
        known: dict[Any, int] = {}
        return max(_depth(r, known) for r in self.roots)

    @cached_property
    def uses(self) -> float:
        """At most so many uses has a value inside a match (inf: where repetitions use a part that is not theirs)."""
        for q in walk(self.roots):
            if isinstance(q, Repeat):
                inner = {r.node for r in walk([q.inner]) if isinstance(r, PResult)}
                if inner - q.nodes - self.shared:
                    return float("inf")
        return max(2, sum(len(n.operands) for n in self.nodes))

    @cached_property
    def forked(self) -> bool:
        """Whether a root is not among what the first is computed from."""
        below = {q.node for q in walk(self.roots[:1]) if isinstance(q, PResult)}
        return any(r.node not in below for r in self.roots)

    @cached_property
    def tree_ops(self) -> frozenset[str]:
        """Ops of which the pattern matches whole trees, whatever their depth."""
        return frozenset(n.opdef.name for n in self.nodes if n.tree)


def _depth(q: Any, known: dict[Any, int]) -> int:
    # a part that several others use is looked at once: their paths may be very many
    if q not in known:
        inner = max((_depth(x, known) for x in parts(q)), default=0)
        known[q] = inner + 1 if isinstance(q, PResult) else inner
    return known[q]
