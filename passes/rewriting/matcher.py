"""Matching a pattern against the graph, with backtracking; remembers the furthest failure for `explain`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moec.ir import Node, Value
from moec.passes.rewriting.bindings import Bindings, Escape, Failure
from moec.passes.rewriting.match_values import attribute, describe, same_constant, scalar_constant, shown, wanted
from moec.passes.rewriting.pattern_types import (
    Bind,
    Const,
    Either,
    Pattern,
    PNode,
    PResult,
    Repeat,
    Rest,
    Shared,
    Typed,
    Var,
)

EMPTY = Bindings({}, {})


class Matcher:
    """Matches one pattern. `failure` is filled where matching does not succeed; `escape` is the first match
    that only another use of an inner value stopped."""

    def __init__(self, pattern: Pattern, failure: Failure | None = None):
        self.pattern = pattern
        self.failure = failure
        self.roots = {r.node for r in pattern.roots}
        self.escape: Escape | None = None

    def at(self, node: Node) -> Iterator[Bindings]:
        """Matches whose first root is (a result of) `node`, in order; escapes and use counts are checked."""
        first = self.pattern.roots[0]
        for b in self._node(first.node, node, EMPTY):
            for full in self._further_roots(1, b):
                if self._closed(full):
                    yield full

    # -- structure ---------------------------------------------------------------------------------

    def _further_roots(self, i: int, b: Bindings) -> Iterator[Bindings]:
        if i == len(self.pattern.roots):
            yield b
            return
        root = self.pattern.roots[i].node
        if root in b.nodes:
            yield from self._further_roots(i + 1, b)
            return
        candidate: Node | None = None
        for candidate in self._candidates(root, b):
            for extended in self._node(root, candidate, b):
                yield from self._further_roots(i + 1, extended)
        if candidate is None:
            first = b.nodes[self.pattern.roots[0].node]
            self._fail(b, first, None, f"{root.opdef.name} on what it is computed from", "none")

    def _candidates(self, root: PNode, b: Bindings) -> Iterator[Node]:
        """Nodes of the root's op near what is already bound: users of shared values, upwards."""
        seen: set[Node] = set(b.nodes.values())
        frontier = [v for v in b.captures.values() if isinstance(v, Value)]
        frontier += [r for n in b.nodes.values() for r in n.results]
        for _ in range(self.pattern.depth):
            following: list[Value] = []
            for user in dict.fromkeys(u for v in frontier for u in v.users):
                if user in seen:
                    continue
                seen.add(user)
                if user.opdef is root.opdef:
                    yield user
                following += user.results
            frontier = following

    def _node(self, p: PNode, node: Node, b: Bindings) -> Iterator[Bindings]:
        known = b.nodes.get(p)
        if known is not None:
            if known is node:
                yield b
            else:
                self._fail(b, node, None, f"the {p.opdef.name} that is matched already", f"another {node.op}")
            return
        # two parts of a pattern may be one node, as in p.mul(p.relu(x), p.relu(x)) on a square; roots are distinct
        if node in b.nodes.values():
            others = (q for q, n in b.nodes.items() if n is node)
            if p in self.roots or any(q in self.roots for q in others):
                return
        if node.opdef is not p.opdef:
            self._fail(b, node, None, p.opdef.name, node.op)
            return
        if p.tree or p.below is not None:
            yield from (self._tree if p.tree else self._chain)(p, node, b)
            return
        if len(node.results) != p.results:
            self._fail(b, node, None, f"{p.results} results", f"{len(node.results)} results")
            return
        for name, want in p.attrs.items():
            extended = attribute(want, node.attrs[name], b)
            if extended is None:
                if self.failure is not None:
                    found = f"{name}={shown(node.attrs[name])}"
                    if name == "axis" and _same_axis(want, node):
                        found += ", the same axis from the other end; canonicalise counts from the end"
                    self._fail(b, node, None, f"{p.opdef.name} with {name}={wanted(want, b)}", found)
                return
            b = extended
        orders = [p.operands]
        if p.opdef.commutative and len(p.operands) == 2 and p.operands[0] is not p.operands[1]:
            orders.append(p.operands[::-1])
        for operands in orders:
            yield from self._operands(operands, node, 0, b.place(p, node))

    def _operands(
        self, operands: tuple[Any, ...], node: Node, i: int, b: Bindings, at: int | None = None
    ) -> Iterator[Bindings]:
        """Pattern operands from the i-th against the node's from `at` (a Rest or Repeat shifts them)."""
        at = i if at is None else at
        if i == len(operands):
            if at == len(node.operands):
                yield b
            else:
                self._fail(b, node, None, f"{i} operands", f"{len(node.operands)} operands")
            return
        if isinstance(operands[i], Rest | Repeat):
            # what follows takes the last operands
            end = len(node.operands) - (len(operands) - i - 1)
            many = node.operands[i:end] if end >= i else ()
            for extended in self._many(operands[i], many, b, node):
                yield from self._operands(operands, node, i + 1, extended, i + len(many))
            return
        if at >= len(node.operands):
            self._fail(b, node, None, f"{len(operands)} operands", f"{len(node.operands)} operands")
            return
        for extended in self._value(operands[i], node.operands[at], b, node):
            yield from self._operands(operands, node, i + 1, extended, at + 1)

    def _many(self, p: Any, values: Sequence[Value | None], b: Bindings, node: Node) -> Iterator[Bindings]:
        """Operands of a variadic op: all of them captured, or each a repetition."""
        if isinstance(p, Rest):
            captured = b.capture(p.name, tuple(values))
            if captured is not None:
                yield captured
            return
        if len(values) < p.least:
            self._fail(b, node, None, f"at least {p.least} operands", f"{len(values)}")
            return
        if not values:
            yield _collected(p, (), b)
            return
        # the first operand decides the common captures
        for state, own in self._repetition(p, values[0], b, node):
            found = [own]
            for v in values[1:]:
                repetition = next(self._repetition(p, v, state, node), None)
                if repetition is None:
                    break
                state = repetition[0]
                found.append(repetition[1])
            else:
                yield _collected(p, found, state)

    def _repetition(
        self, p: Repeat, value: Value | None, b: Bindings, user: Node
    ) -> Iterator[tuple[Bindings, dict[str, Any]]]:
        """One repetition: the bindings outside it, and its own captures."""
        for full in self._value(p.inner, value, b, user):
            own = {n: full.captures[n] for n in p.names if n in full.captures}
            outer = {n: v for n, v in full.captures.items() if n not in p.names}
            nodes = {q: n for q, n in full.nodes.items() if q not in p.nodes}
            mine = tuple(n for q, n in full.nodes.items() if q in p.nodes and q not in self.pattern.shared)
            yield Bindings(outer, nodes, full.repeated + mine), own

    def _tree(self, p: PNode, top: Node, b: Bindings) -> Iterator[Bindings]:
        """The whole tree below `top`. The first leaf that matches decides the common captures."""
        users = top.result.users
        if len(users) == 1 and not top.result.is_output and _continues(top.result, users[0]):
            self._fail(b, top, None, f"the whole tree of {top.op}", "a part of one")
            return
        repeat, rest = p.operands[0], p.operands[1] if len(p.operands) > 1 else None
        inside, leaves = _flatten(top)
        tried: set[int] = set()
        for start in range(len(leaves)):
            if start in tried:
                continue
            for state, own in self._repetition(repeat, leaves[start], b, top):
                found = {start: own}
                for i, leaf in enumerate(leaves):
                    repetition = None if i == start else next(self._repetition(repeat, leaf, state, top), None)
                    if repetition is not None:
                        state, found[i] = repetition
                tried |= found.keys()
                if len(found) < repeat.least or (rest is None and len(found) < len(leaves)):
                    if self.failure is not None:
                        found_text = f"{len(found)} that match among {len(leaves)} operands"
                        self._fail(state, top, None, f"at least {repeat.least}, and no others", found_text)
                    continue
                complete = _collected(repeat, [found[i] for i in sorted(found)], state)
                if rest is not None:
                    others = tuple(v for i, v in enumerate(leaves) if i not in found)
                    captured = complete.capture(rest.name, others)
                    if captured is None:
                        continue
                    complete = captured
                yield complete.place(p, top, inside)

    def _chain(self, p: PNode, top: Node, b: Bindings) -> Iterator[Bindings]:
        """The whole chain below `top`. The top link decides the common captures."""
        repeat, end = p.operands
        for user in top.result.users:
            if user.opdef is top.opdef:
                links = (own for _, own in self._repetition(repeat, user.result, b, user))
                if any(own[p.below or ""] is top.result for own in links):
                    self._fail(b, top, None, f"the whole chain of {top.op}", "a part of one")
                    return
        for first in self._repetition(repeat, top.result, b, top):
            state, found = first[0], [first[1]]
            while (below := found[-1][p.below or ""]).producer is not None:
                link = next(self._repetition(repeat, below, state, top), None)
                if link is None:
                    break
                state = link[0]
                found.append(link[1])
            if len(found) < repeat.least:
                self._fail(state, top, None, f"a chain of at least {repeat.least}", f"{len(found)}")
                continue
            for ended in self._value(end, below, state, top):
                yield _collected(repeat, found, ended).place(p, top)

    def _value(self, p: Any, value: Value | None, b: Bindings, user: Node) -> Iterator[Bindings]:
        match p:
            case None:
                if value is None:
                    yield b
                else:
                    self._fail(b, user, value, "an absent operand", value)
            case Var():
                if value is None and not p.optional:
                    self._fail(b, user, None, f"an operand for {p.name!r}", "an absent one")
                    return
                captured = b.capture(p.name, value)
                if captured is None:
                    self._fail(b, user, value, f"the same value as {p.name!r}", value)
                else:
                    yield captured
            case Const():
                yield from self._const(p, value, b, user)
            case Bind():
                for extended in self._value(p.inner, value, b, user):
                    captured = extended.capture(p.name, value)
                    if captured is not None:
                        yield captured
                    else:
                        self._fail(extended, user, value, f"the same value as {p.name!r}", value)
            case Shared():
                yield from self._value(p.inner, value, b, user)
            case Either():
                for option in p.options:
                    yield from self._value(option, value, b, user)
            case Typed():
                typed = None if value is None else self._typed(p, value, b, user)
                if typed is not None:
                    yield from self._value(p.inner, value, typed, user)
            case PResult():
                if value is None or value.producer is None:
                    self._fail(b, user, value, p.node.opdef.name, value)
                elif value.index != p.index:
                    self._fail(b, user, value, f"result {p.index} of {p.node.opdef.name}", f"result {value.index}")
                else:
                    yield from self._node(p.node, value.producer, b)

    def _typed(self, p: Typed, value: Value, b: Bindings, user: Node) -> Bindings | None:
        if p.dtypes and value.dtype not in p.dtypes:
            self._fail(b, user, value, f"dtype {' or '.join(p.dtypes)}", value.dtype)
            return None
        extended = b if p.shape is None else attribute(p.shape, value.shape, b)
        if extended is None and self.failure is not None:
            self._fail(b, user, value, f"shape {wanted(p.shape, b)}", shown(value.shape))
        return extended

    def _const(self, p: Const, value: Value | None, b: Bindings, user: Node) -> Iterator[Bindings]:
        number = scalar_constant(value)
        if number is None or value is None:
            want = f"the constant {p.value}" if p.value is not None else "a scalar constant"
            self._fail(b, user, value, want, value)
        elif p.name is not None:
            captured = b.capture(p.name, number)
            if captured is not None:
                yield captured
            else:
                expected = f"the constant {b.captures[p.name]}, as {p.name!r} is elsewhere"
                self._fail(b, user, value, expected, f"the constant {number}")
        elif p.value is not None and same_constant(number, p.value, value.dtype, p.rtol):
            yield b
        else:
            self._fail(b, user, value, f"the constant {p.value}", f"the constant {number}")

    # -- conditions on the whole -------------------------------------------------------------------

    def _closed(self, b: Bindings) -> bool:
        """Inner results are used inside the match only, results of roots that are not replaced not at all."""
        matched = {n for p, n in b.nodes.items() if p not in self.pattern.shared}.union(b.repeated)
        replaced = {b.nodes[r.node].results[r.index] for r in self.pattern.roots}
        for node in matched:
            for result in node.results:
                if result in replaced:
                    continue
                outside = [u for u in result.users if u not in matched]
                if not result.is_output and not outside:
                    continue
                where = f"also used by {outside[0].op} at {outside[0].location.describe()}" if outside else ""
                found = "a graph output" if result.is_output else where
                self._fail(b, node, result, f"{node.op} used inside the match only", found, closed=True)
                if self.escape is None:
                    root = b.nodes[self.pattern.roots[0].node]
                    self.escape = Escape(root, result, f"{node.op} inside the match is {found}")
                return False
        return True

    def _fail(
        self, b: Bindings, node: Node | None, value: Value | None, expected: str, found: Any, closed: bool = False
    ) -> None:
        if self.failure is not None:
            text = found if isinstance(found, str) else describe(found)
            matched = len(b.nodes) + len(b.repeated) + closed
            self.failure.note(matched, node, value, expected, text)


def _same_axis(want: Any, node: Node) -> bool:
    """Whether an axis counted from the front is the same as one counted from the end."""
    x = node.operands[0] if node.operands else None
    return (
        isinstance(want, int) and x is not None and x.type.rank > 0 and (want - node.attrs["axis"]) % x.type.rank == 0
    )


def _collected(p: Repeat, found: Sequence[Mapping[str, Any]], b: Bindings) -> Bindings:
    """Bindings with one tuple for each capture of the repetitions."""
    own = {n: tuple(f.get(n) for f in found) for n in p.names}
    return Bindings({**b.captures, **own}, b.nodes, b.repeated)


def _continues(v: Value, user: Node) -> bool:
    """Whether `user` is the same op on whole operands of the same type, so that v is inside its tree."""
    node = v.producer
    return node is not None and user.opdef is node.opdef and user.result.type == v.type and len(v.uses) == 1


def _flatten(top: Node) -> tuple[tuple[Node, ...], list[Value]]:
    """The nodes of a tree below its top, and its leaves from left to right."""
    inside: list[Node] = []
    leaves: list[Value] = []
    stack = [v for v in reversed(top.operands) if v is not None]
    users = [top] * len(stack)
    while stack:
        v, user = stack.pop(), users.pop()
        node = v.producer
        if node is not None and node.opdef is top.opdef and not v.is_output and _continues(v, user):
            inside.append(node)
            below = [o for o in reversed(node.operands) if o is not None]
            stack += below
            users += [node] * len(below)
        else:
            leaves.append(v)
    return tuple(inside), leaves
