"""The state of a match, and where an attempt failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moec.ir import Node, Value
from moec.ir.compare import same_attrs
from moec.passes.rewriting.pattern_types import PNode


@dataclass(frozen=True)
class Bindings:
    """What is matched so far: captures by name, the graph node of each pattern node, and the nodes of
    repetitions, of which one pattern node has many."""

    captures: Mapping[str, Any]
    nodes: Mapping[PNode, Node]
    repeated: tuple[Node, ...] = ()

    def capture(self, name: str, value: Any) -> Bindings | None:
        if name in self.captures:
            known = self.captures[name]
            same = known is value if isinstance(value, Value) or value is None else same_attrs({"": known}, {"": value})
            return self if same else None
        return Bindings({**self.captures, name: value}, self.nodes, self.repeated)

    def place(self, p: PNode, node: Node, repeated: tuple[Node, ...] = ()) -> Bindings:
        return Bindings(self.captures, {**self.nodes, p: node}, self.repeated + repeated)


@dataclass
class Failure:
    """The furthest point that an attempt reached; what was expected there may have alternatives."""

    matched: int = -1
    node: Node | None = None
    value: Value | None = None
    alternatives: tuple[str, ...] = ()
    found: str = ""

    @property
    def expected(self) -> str:
        return " or ".join(self.alternatives)

    def note(self, matched: int, node: Node | None, value: Value | None, expected: str, found: str) -> None:
        if matched > self.matched:
            self.matched, self.node, self.value = matched, node, value
            self.alternatives, self.found = (expected,), found
            return
        here = matched == self.matched and node is self.node and value is self.value and found == self.found
        if here and len(self.alternatives) < 4 and expected not in self.alternatives:
            self.alternatives += (expected,)


@dataclass(frozen=True)
class Escape:
    """A match that was given up because `value`, inside it, has another use."""

    root: Node
    value: Value
    reason: str
