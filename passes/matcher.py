"""Matching a pattern against the graph, with backtracking; remembers the furthest failure for `explain`."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moec.ir import DType, Node, Value
from moec.ir.compare import same_attrs
from moec.passes.pattern import AttrCapture, Bind, Const, Either, Pattern, PNode, PResult, Rest, Shared, Var


@dataclass(frozen=True)
class Bindings:
    """What is matched so far: captures by name, and the graph node of each pattern node."""

    captures: Mapping[str, Any]
    nodes: Mapping[PNode, Node]

    def capture(self, name: str, value: Any) -> Bindings | None:
        if name in self.captures:
            known = self.captures[name]
            same = known is value if isinstance(value, Value) or value is None else same_attrs({"": known}, {"": value})
            return self if same else None
        return Bindings({**self.captures, name: value}, self.nodes)

    def place(self, p: PNode, node: Node) -> Bindings:
        return Bindings(self.captures, {**self.nodes, p: node})


@dataclass
class Failure:
    """The furthest point that an attempt reached."""

    matched: int = -1
    node: Node | None = None
    value: Value | None = None
    expected: str = ""
    found: str = ""

    def note(self, matched: int, node: Node | None, value: Value | None, expected: str, found: str) -> None:
        if matched > self.matched:
            self.matched, self.node, self.value = matched, node, value
            self.expected, self.found = expected, found


EMPTY = Bindings({}, {})


class Matcher:
    """Matches one pattern; `failure` is filled where matching does not succeed."""

    def __init__(self, pattern: Pattern, failure: Failure | None = None):
        self.pattern = pattern
        self.failure = failure

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
        for candidate in self._candidates(root, b):
            for extended in self._node(root, candidate, b):
                yield from self._further_roots(i + 1, extended)

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
            return
        if node in b.nodes.values():
            return
        if node.opdef is not p.opdef:
            self._fail(b, node, None, p.opdef.name, node.op)
            return
        if len(node.results) != p.results:
            self._fail(b, node, None, f"{p.results} results", f"{len(node.results)} results")
            return
        for name, want in p.attrs.items():
            got = node.attrs[name]
            if isinstance(want, AttrCapture):
                if want.name is not None:
                    captured = b.capture(want.name, got)
                    if captured is None:
                        self._fail(b, node, None, f"{name}={b.captures[want.name]}", f"{name}={got}")
                        return
                    b = captured
            elif not same_attrs({name: want}, {name: got}):
                self._fail(b, node, None, f"{p.opdef.name} with {name}={want}", f"{name}={got}")
                return
        orders = [p.operands]
        if p.opdef.commutative and len(p.operands) == 2:
            orders.append(p.operands[::-1])
        for operands in orders:
            yield from self._operands(operands, node, 0, b.place(p, node))

    def _operands(self, operands: tuple[Any, ...], node: Node, i: int, b: Bindings) -> Iterator[Bindings]:
        if i == len(operands):
            if i == len(node.operands):
                yield b
            else:
                self._fail(b, node, None, f"{i} operands", f"{len(node.operands)} operands")
            return
        if isinstance(operands[i], Rest):
            captured = b.capture(operands[i].name, node.operands[i:])
            if captured is not None:
                yield captured
            return
        if i >= len(node.operands):
            self._fail(b, node, None, f"{len(operands)} operands", f"{len(node.operands)} operands")
            return
        for extended in self._value(operands[i], node.operands[i], b, node):
            yield from self._operands(operands, node, i + 1, extended)

    def _value(self, p: Any, value: Value | None, b: Bindings, user: Node) -> Iterator[Bindings]:
        match p:
            case None:
                if value is None:
                    yield b
                else:
                    self._fail(b, user, value, "an absent operand", _describe(value))
            case Var():
                if value is None and not p.optional:
                    self._fail(b, user, None, f"an operand for {p.name!r}", "an absent one")
                    return
                captured = b.capture(p.name, value)
                if captured is None:
                    self._fail(b, user, value, f"the same value as {p.name!r}", _describe(value))
                else:
                    yield captured
            case Const():
                yield from self._const(p, value, b, user)
            case Bind():
                for extended in self._value(p.inner, value, b, user):
                    captured = extended.capture(p.name, value)
                    if captured is not None:
                        yield captured
            case Shared():
                yield from self._value(p.inner, value, b, user)
            case Either():
                for option in p.options:
                    yield from self._value(option, value, b, user)
            case PResult():
                if value is None or value.producer is None:
                    self._fail(b, user, value, p.node.opdef.name, _describe(value))
                elif value.index != p.index:
                    self._fail(b, user, value, f"result {p.index} of {p.node.opdef.name}", f"result {value.index}")
                else:
                    yield from self._node(p.node, value.producer, b)

    def _const(self, p: Const, value: Value | None, b: Bindings, user: Node) -> Iterator[Bindings]:
        number = scalar_constant(value)
        if number is None or value is None:
            want = f"the constant {p.value}" if p.value is not None else "a scalar constant"
            self._fail(b, user, value, want, _describe(value))
        elif p.name is not None:
            captured = b.capture(p.name, number)
            if captured is not None:
                yield captured
        elif p.value is not None and same_constant(number, p.value, value.dtype, p.rtol):
            yield b
        else:
            self._fail(b, user, value, f"the constant {p.value}", f"the constant {number}")

    # -- conditions on the whole -------------------------------------------------------------------

    def _closed(self, b: Bindings) -> bool:
        """Inner results are used inside the match only, results of roots that are not replaced not at all."""
        matched = {n for p, n in b.nodes.items() if p not in self.pattern.shared}
        replaced = {b.nodes[r.node].results[r.index] for r in self.pattern.roots}
        for node in matched:
            for result in node.results:
                if result in replaced:
                    continue
                outside = [u for u in result.users if u not in matched]
                if result.is_output:
                    self._fail(b, node, result, f"{node.op} used inside the match only", "a graph output", closed=True)
                    return False
                if outside:
                    where = f"{outside[0].op} at {outside[0].location.describe()}"
                    self._fail(
                        b, node, result, f"{node.op} used inside the match only", f"also used by {where}", closed=True
                    )
                    return False
        return True

    def _fail(
        self, b: Bindings, node: Node | None, value: Value | None, expected: str, found: str, closed: bool = False
    ) -> None:
        if self.failure is not None:
            self.failure.note(len(b.nodes) + closed, node, value, expected, found)


def _describe(value: Value | None) -> str:
    if value is None:
        return "an absent operand"
    if value.weight is not None:
        return f"weight @{value.weight.name}"
    number = scalar_constant(value)
    if number is not None:
        return f"the constant {number}"
    return value.producer.op if value.producer else f"input %{value.name}"


def scalar_constant(value: Value | None) -> float | int | bool | None:
    """The number in a one-element `tensor.constant` of rank ≤ 1, else None."""
    if value is None or value.producer is None or value.producer.op != "tensor.constant":
        return None
    return value.producer.attrs["value"][0] if value.type.numel == 1 and value.type.rank <= 1 else None


def same_constant(a: float, b: float, dtype: DType, rtol: float = 0.0) -> bool:
    """Equality after rounding to `dtype` (1e-6 written in Python equals the f32 nearest to it)."""
    if dtype.is_float:
        fa, fb = _rounded(float(a), dtype), _rounded(float(b), dtype)
        return fa == fb or (fa != fa and fb != fb) or (rtol > 0 and abs(fa - fb) <= rtol * abs(fb))
    return a == b


def _rounded(x: float, dtype: DType) -> float:
    if dtype is DType.F64:
        return x
    try:
        narrow = struct.unpack("f", struct.pack("f", x))[0]
    except OverflowError:
        return x
    if dtype is DType.F32:
        return narrow
    import torch

    return float(torch.tensor(x, dtype=dtype.torch))
