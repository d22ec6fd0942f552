"""The pattern language: what a `Rewrite.pattern` builds.

`p.mul(p.silu(gate), up)` builds a `PNode` tree. Operands are other patterns, captures (the parameters of
`pattern`), numbers (a scalar constant of exactly that value) or None (an absent optional operand).
Attributes match exactly, an omitted one its default, unless captured with `p.attr("name")`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from moec.ir import Builder, CompileError, OpDef, lookup
from moec.ir.opdef import REQUIRED, normalise_attr

# results of ops that have several; `tensor.split` and unknown ops take `results=` in the pattern
_RESULTS = {"math.topk": 2, "math.sort": 2, "moe.route": 2, "norm.add_rms": 2, "quant.quantize": 2}


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
class PNode:
    """One node of the pattern; `PResult` picks one of its results."""

    opdef: OpDef
    operands: tuple[Any, ...]
    attrs: dict[str, Any]
    results: int = 1


@dataclass(frozen=True, eq=False)
class PResult:
    node: PNode
    index: int = 0


@dataclass
class PatternBuilder:
    """The `p` of `Rewrite.pattern`: every op is a method, under its bare or (`p.linear_matmul`) full name."""

    created: list[PNode] = field(default_factory=list)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        opdef = Builder._resolve(name)

        def build(*operands: Any, results: int | None = None, **fields: Any) -> Any:
            return self.op(opdef, operands, fields, results)

        return build

    def op(self, op: str | OpDef, operands: Any = (), fields: dict[str, Any] | None = None, results: Any = None) -> Any:
        """A node of the pattern by op name. Raises CompileError on unknown ops or attributes, wrong arity."""
        opdef = op if isinstance(op, OpDef) else lookup(op)
        attrs = dict(fields or {})
        values = [_operand(v) for v in operands]
        for i, (name, _) in enumerate(opdef.operands):
            if name in attrs:
                values += [None] * (i + 1 - len(values))
                values[i] = _operand(attrs.pop(name))
        if not any(isinstance(v, Rest) for v in values):
            values = list(opdef.pad_operands(values))
        for name in attrs:
            if name not in opdef.attrs:
                opdef.complete_attrs({name: attrs[name]})  # raises with the nearest name
        full: dict[str, Any] = {}
        for name, spec in opdef.attrs.items():
            value = attrs.get(name, spec.default)
            if value is REQUIRED:
                raise CompileError(
                    f"{opdef.name}: attribute {name!r} is required",
                    code="pattern",
                    hint=f"give its value, or {name}=p.attr({name!r}) to capture it",
                )
            full[name] = value if isinstance(value, AttrCapture) else normalise_attr(value, spec, opdef.name)
        count = results or (
            len(full["sizes"]) if opdef.name == "tensor.split" and isinstance(full["sizes"], tuple) else 0
        )
        node = PNode(opdef, tuple(values), full, count or _RESULTS.get(opdef.name, 1))
        self.created.append(node)
        if node.results == 1:
            return PResult(node)
        return tuple(PResult(node, i) for i in range(node.results))

    def attr(self, name: str | None = None) -> AttrCapture:
        """Captures an attribute (nameless: any value)."""
        return AttrCapture(name)

    def const(self, name: str) -> Const:
        """Captures a scalar constant as a Python number."""
        return Const(name=name)

    def approx(self, value: float, rtol: float = 1e-5) -> Const:
        """A scalar constant within a relative tolerance."""
        return Const(value=value, rtol=rtol)

    def optional(self, name: str) -> Var:
        """Captures an operand that may be absent (then None)."""
        return Var(name, optional=True)

    def any(self, name: str) -> Var:
        """Captures a value under `name`, as the parameters of `pattern` do."""
        return Var(name)

    def rest(self, name: str) -> Rest:
        """Captures all further operands of a variadic op."""
        return Rest(name)

    def either(self, *options: Any) -> Either:
        """Alternatives, tried in order."""
        return Either(tuple(map(_operand, options)))

    def maybe(self, wrap: Callable[[Any], Any], inner: Any) -> Either:
        """`wrap(inner)` or just `inner`: p.maybe(lambda v: p.cast(v, dtype=p.attr()), x)."""
        return Either((_operand(wrap(inner)), _operand(inner)))

    def shared(self, inner: Any) -> Shared:
        """A part that others may use too: it is matched, but neither replaced nor removed."""
        return Shared(_operand(inner))

    def bind(self, name: str, inner: Any) -> Bind:
        """Captures the value that `inner` matches."""
        return Bind(name, _operand(inner))


def _operand(v: Any) -> Any:
    if v is None or isinstance(v, Var | Const | Either | Bind | Shared | Rest | PResult):
        return v
    if isinstance(v, bool | int | float):
        return Const(value=v)
    if isinstance(v, tuple) and v and isinstance(v[0], PResult):
        raise CompileError(f"{v[0].node.opdef.name} has {len(v)} results; unpack it in the pattern", code="pattern")
    raise CompileError(f"a pattern operand cannot be {type(v).__name__} {v!r}", code="pattern")


@dataclass(frozen=True, eq=False)
class Pattern:
    """A built pattern: its roots (the values to replace) and the captures' names."""

    roots: tuple[PResult, ...]
    nodes: tuple[PNode, ...]
    captures: tuple[str, ...]
    shared: frozenset[PNode] = frozenset()

    @property
    def depth(self) -> int:
        """Longest chain of nodes from a root."""
        return max(_depth(r) for r in self.roots)


def _depth(p: Any) -> int:
    match p:
        case PResult():
            return 1 + max((_depth(o) for o in p.node.operands), default=0)
        case Either():
            return max(map(_depth, p.options))
        case Bind() | Shared():
            return _depth(p.inner)
    return 0


def build_pattern(method: Callable[..., Any]) -> Pattern:
    """Call a `pattern(self, p, x, …)` method with captures for its parameters."""
    p = PatternBuilder()
    names = list(inspect.signature(method).parameters)[1:]  # the first is p
    built = method(p, *[Var(n) for n in names])
    if built is None:
        raise CompileError("pattern() returned nothing", code="pattern", hint="return the value(s) to replace")
    roots = built if isinstance(built, tuple) else (built,)
    for r in roots:
        if not isinstance(r, PResult):
            raise CompileError(
                f"pattern() must return the result of an op, got {type(r).__name__}",
                code="pattern",
                hint="alternatives at the root are separate rules",
            )
    used = set(walk(roots))
    for n in names:
        if not any(isinstance(u, Var) and u.name == n for u in used):
            raise CompileError(f"capture {n!r} of pattern() is not used in it", code="pattern")
    shared = {q.node for s in used if isinstance(s, Shared) for q in walk([s]) if isinstance(q, PResult)}
    if shared & {r.node for r in roots}:
        raise CompileError("a root of the pattern cannot be shared", code="pattern")
    return Pattern(roots, tuple(p.created), tuple(names), frozenset(shared))


def walk(patterns: Any) -> Iterator[Any]:
    """All parts of patterns, operands included."""
    stack = list(patterns)
    while stack:
        q = stack.pop()
        yield q
        match q:
            case PResult():
                stack += q.node.operands
            case Either():
                stack += q.options
            case Bind() | Shared():
                stack.append(q.inner)
