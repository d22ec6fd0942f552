"""The pattern language: what a `Rewrite.pattern` builds.

`p.mul(p.silu(gate), up)` builds a `PNode` tree. Operands are other patterns, captures (the parameters of
`pattern`), numbers (a scalar constant of exactly that value) or None (an absent optional operand).
Attributes match exactly, an omitted one its default, unless captured with `p.attr("name")`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from moec.ir import Builder, CompileError, Dim, DType, OpDef, lookup
from moec.ir.opdef import REQUIRED, normalise_attr
from moec.passes.rewriting.match import Match
from moec.passes.rewriting.pattern_types import (
    AttrCapture,
    Bind,
    Const,
    DimCapture,
    Either,
    Pattern,
    PNode,
    PResult,
    Repeat,
    Rest,
    Shared,
    Sizes,
    Typed,
    Var,
    walk,
)

# what `m.name` is for every match
_OF_MATCH = {*dir(Match), "_captures", "location", "nodes", "refusal", "roots"}


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
        """A node of the pattern by op name; a tuple where the op has several results (`results=` says how many
        where that depends on the node). Raises CompileError on unknown ops or attributes, wrong arity."""
        opdef = op if isinstance(op, OpDef) else lookup(op)
        attrs = dict(fields or {})
        values = [_operand(v, many=True) for v in operands]
        for i, (name, _) in enumerate(opdef.operands):
            if name in attrs:
                values += [None] * (i + 1 - len(values))
                values[i] = _operand(attrs.pop(name), many=True)
        many = sum(isinstance(v, Rest | Repeat) for v in values)
        if many > 1:
            raise CompileError(f"{opdef.name}: more than one p.rest or p.repeat among its operands", code="pattern")
        if not many:
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
            if isinstance(value, AttrCapture):
                full[name] = value
            elif isinstance(value, list | tuple) and any(v is ... or isinstance(v, AttrCapture) for v in value):
                full[name] = _sizes(value)
            else:
                full[name] = normalise_attr(value, spec, opdef.name)
        count = results or opdef.results
        if count is None:
            sizes = full.get("sizes")
            count = len(sizes.entries if isinstance(sizes, Sizes) else sizes) if isinstance(sizes, Sizes | tuple) else 1
        return self._created(PNode(opdef, tuple(values), full, count))

    def chain(self, repeat: Repeat, below: str | Var, end: Any) -> PResult:
        """Links of one op, each with the one that it captures as `below` among its operands, the last with `end`: all
        of a maximal chain. `p.chain(p.repeat(lambda below, i, v: p.index_put(below, i, v)), "below", p.any("start"))`
        finds all writes into one tensor; the captures of the links stand in the match from the top down."""
        links = _alternatives(repeat.inner) if isinstance(repeat, Repeat) else ()
        ops = {q.node.opdef if isinstance(q, PResult) and q.node.results == 1 else None for q in links}
        if len(ops) != 1 or None in ops or _name(below) not in repeat.names:
            text = "p.chain takes a p.repeat(…) of one op with one result, and the name of its capture that goes on"
            raise CompileError(text, code="pattern")
        node = PNode(links[0].node.opdef, (repeat, _operand(end)), below=_name(below))
        result: PResult = self._created(node)
        return result

    def _created(self, node: PNode) -> Any:
        self.created.append(node)
        if node.results == 1:
            return PResult(node)
        return tuple(PResult(node, i) for i in range(node.results))

    # -- captures ----------------------------------------------------------------------------------

    def any(self, name: str | Var) -> Var:
        """Captures a value under `name`, as the parameters of `pattern` do."""
        return Var(_name(name))

    def optional(self, name: str | Var) -> Var:
        """Captures an operand that may be absent (then None)."""
        return Var(_name(name), optional=True)

    def rest(self, name: str | Var) -> Rest:
        """Captures any number of further operands of a variadic op, or the other leaves of a tree."""
        return Rest(_name(name))

    def bind(self, name: str | Var, inner: Any) -> Bind:
        """Captures the value that `inner` matches."""
        return Bind(_name(name), _operand(inner))

    def const(self, name: str | Var) -> Const:
        """Captures a scalar constant as a Python number."""
        return Const(name=_name(name))

    def approx(self, value: float, rtol: float = 1e-5) -> Const:
        """A scalar constant within a relative tolerance."""
        return Const(value=value, rtol=rtol)

    def attr(self, name: str | Var | None = None) -> AttrCapture:
        """Captures an attribute (nameless: any value)."""
        return AttrCapture(None if name is None else _name(name))

    def dim(self, name: str | Var | None = None) -> DimCapture:
        """Captures one size, an int or a Dim, in a tuple attribute or in the shape of `typed`; nameless: any.
        A size captured twice must be the same: `p.reshape(x, shape=(p.dim("T"), 8))`."""
        return DimCapture(None if name is None else _name(name))

    def typed(self, inner: Any, dtype: Any = None, shape: Any = None) -> Typed:
        """`inner`, where its value has `dtype` (or one of several) and `shape`, whose entries are numbers,
        `p.dim(…)`, and once `...` for any: `p.typed(x, "f32", (..., p.dim("T"), 64))`."""
        names = dtype if isinstance(dtype, list | tuple) else () if dtype is None else (dtype,)
        return Typed(_operand(inner), tuple(map(DType.of, names)), None if shape is None else _sizes(shape))

    # -- combinations ------------------------------------------------------------------------------

    def either(self, *options: Any) -> Either:
        """Alternatives, tried in order; also as what `pattern` returns."""
        return Either(tuple(map(_operand, options)))

    def maybe(self, wrap: Callable[[Any], Any], inner: Any) -> Either:
        """`wrap(inner)` or just `inner`: p.maybe(lambda v: p.cast(v, dtype=p.attr()), x)."""
        return Either((_operand(wrap(inner)), _operand(inner)))

    def shared(self, inner: Any) -> Shared:
        """A part that others may use too: it is matched, but neither replaced nor removed."""
        return Shared(_operand(inner))

    def repeat(self, inner: Callable[..., Any], least: int = 1) -> Repeat:
        """A sub-pattern that occurs `least` times or more, as operands of a variadic op or leaves of a `tree`.

        The parameters of `inner` are captures of each repetition: in the match they are tuples, in order. They
        also name what `p.bind(h, …)`, `p.const(c)` and `p.attr(a)` capture. All other captures are common to the
        repetitions: `p.repeat(lambda w: p.linear_linear(x, w))` finds linear layers on one x.
        """
        names = _parameters(inner)
        first = len(self.created)
        built = _operand(inner(*map(Var, names)))
        nodes = frozenset(self.created[first:])
        if not any(isinstance(q, PResult) and q.node in nodes for q in walk([built])):
            raise CompileError("what p.repeat repeats must be built in it from ops", code="pattern")
        _check_used(names, [built], "p.repeat")
        return Repeat(built, frozenset(names), nodes, least)

    def tree(self, op: str, repeat: Repeat, rest: Rest | None = None) -> PResult:
        """All of a tree of additions, say, in any order and nesting: leaves that match `repeat`, and with `rest`
        others too. `op` is commutative and associative ("add", "mul", "and_", …)."""
        opdef = Builder._resolve(op)
        if not opdef.commutative:
            raise CompileError(f"{opdef.name} is not commutative, its operands are no tree", code="pattern")
        if not isinstance(repeat, Repeat) or not isinstance(rest, Rest | None):
            raise CompileError("p.tree takes an op, a p.repeat(…), and perhaps a p.rest(…)", code="pattern")
        operands = (repeat,) if rest is None else (repeat, rest)
        result: PResult = self._created(PNode(opdef, operands, tree=True))
        return result


def _parameters(method: Callable[..., Any]) -> list[str]:
    """The parameters that are captures: one with a default keeps that."""
    return [name for name, q in inspect.signature(method).parameters.items() if q.default is q.empty]


def _operand(v: Any, many: bool = False) -> Any:
    if isinstance(v, Rest | Repeat) and not many:
        what = "p.rest" if isinstance(v, Rest) else "p.repeat"
        raise CompileError(f"{what} stands among the operands of an op, or in p.tree, only", code="pattern")
    if v is None or isinstance(v, Var | Const | Either | Bind | Shared | Typed | Rest | Repeat | PResult):
        return v
    if isinstance(v, bool | int | float):
        return Const(value=v)
    if isinstance(v, tuple) and v and isinstance(v[0], PResult):
        raise CompileError(f"{v[0].node.opdef.name} has {len(v)} results; unpack it in the pattern", code="pattern")
    raise CompileError(f"a pattern operand cannot be {type(v).__name__} {v!r}", code="pattern")


def _sizes(entries: Any) -> Sizes:
    for e in entries:
        if not (e is ... or isinstance(e, AttrCapture | Dim) or (isinstance(e, int) and not isinstance(e, bool))):
            hint = f"p.dim({e!r}) captures it" if isinstance(e, str) else None
            raise CompileError(f"an entry of a shape cannot be {type(e).__name__} {e!r}", code="pattern", hint=hint)
    if list(entries).count(...) > 1:
        raise CompileError("a shape has at most one '...'", code="pattern")
    return Sizes(tuple(entries))


def _name(name: str | Var) -> str:
    """A capture's name, given itself or as a parameter of `pattern` or of what `p.repeat` repeats."""
    if not isinstance(name, str | Var):
        raise CompileError(f"a capture is named by a str, got {type(name).__name__} {name!r}", code="pattern")
    return name.name if isinstance(name, Var) else name


def _captures(q: Any) -> Iterator[str | None]:
    match q:
        case Var() | Const() | Bind() | Rest() | AttrCapture():
            yield q.name
        case PResult():
            for value in q.node.attrs.values():
                yield from _captures(value)
        case Sizes():
            for entry in q.entries:
                yield from _captures(entry)
        case Typed() if q.shape is not None:
            yield from _captures(q.shape)


def _check_used(names: Sequence[str], roots: Any, what: str) -> None:
    seen = {name for q in walk(roots) for name in _captures(q)}
    for n in names:
        if n not in seen:
            raise CompileError(f"capture {n!r} of {what} is not used in it", code="pattern")


def build_patterns(method: Callable[..., Any]) -> tuple[Pattern, ...]:
    """Call a `pattern(self, p, x, …)` method with captures for its parameters. One pattern for each
    alternative at the root. Raises CompileError where it is malformed."""
    p = PatternBuilder()
    names = _parameters(method)[1:]  # the first is p
    built = method(p, *map(Var, names))
    if built is None:
        raise CompileError("pattern() returned nothing", code="pattern", hint="return the value(s) to replace")
    built = tuple(built) if isinstance(built, list) else built
    roots = built if isinstance(built, tuple) else (built,)
    _check_used(names, roots, "pattern()")
    taken = {n for q in walk(roots) for n in _captures(q) if n in _OF_MATCH}
    if taken:
        text = f"a capture cannot be called {', '.join(sorted(taken))}: a match has that of its own"
        raise CompileError(text, code="pattern")
    options = _alternatives(built)
    return tuple(_pattern(root if isinstance(root, tuple) else (root,), tuple(names)) for root in options)


def _alternatives(built: Any) -> tuple[Any, ...]:
    if isinstance(built, Either):
        return tuple(a for option in built.options for a in _alternatives(option))
    return (built,)


def _pattern(roots: tuple[Any, ...], names: tuple[str, ...]) -> Pattern:
    if len({(r.node, r.index) if isinstance(r, PResult) else r for r in roots}) != len(roots) or not roots:
        text = "returned the same value twice" if roots else "returned no value"
        raise CompileError(f"pattern() {text}", code="pattern", hint="return each value to replace once")
    for r in roots:
        if not isinstance(r, PResult):
            raise CompileError(
                f"pattern() must return the result of an op, got {type(r).__name__}",
                code="pattern",
                hint="alternatives at one of several roots are separate rules" if len(roots) > 1 else None,
            )
    used = list(walk(roots))
    nodes = dict.fromkeys(q.node for q in used if isinstance(q, PResult))
    shared = {q.node for s in used if isinstance(s, Shared) for q in walk([s]) if isinstance(q, PResult)}
    if shared & {r.node for r in roots}:
        raise CompileError("a root of the pattern cannot be shared", code="pattern")
    return Pattern(roots, tuple(nodes), names, frozenset(shared))
