"""Making a graph fit a backend: what it lacks is decomposed, what still does not fit is an error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from moec.ir import Builder, CompileError, Graph, Node
from moec.ir.printer import excerpt
from moec.passes.base import Pass, report


class Capabilities(Protocol):
    """What legalisation asks of a backend."""

    name: str

    def missing(self, node: Node) -> str | None:
        """Why the backend cannot take a node, or None."""
        ...


@dataclass(frozen=True)
class Legalise(Pass):
    """Decomposes ops that the backend lacks until only supported ones are left.

    With `fallback="error"` the first node that still does not fit raises CompileError (op, location,
    reason); with "reference" such nodes stay for the reference interpreter and are reported.
    """

    backend: Capabilities
    fallback: str = "error"

    def run(self, graph: Graph) -> Graph:
        graph = graph.clone()
        left = []
        for g in (graph, *graph.functions.values()):
            node = g._first
            while node is not None:
                reason = self.backend.missing(node)
                first_new = self._decompose(g, node) if reason else None
                if reason and first_new is None:
                    if self.fallback == "error":
                        raise CompileError(
                            f"{node.op} cannot run on {self.backend.name}: {reason}",
                            code="unsupported-op",
                            location=node.location,
                            excerpt=excerpt(node),
                            hint='fallback="reference" runs such ops in the reference interpreter',
                        )
                    left.append(f"{node.op} at {node.location.describe()}: {reason}")
                # continue with the first new node: it may need decomposing too
                node = first_new or node._next
        report(left_to_reference=left)
        return graph

    def _decompose(self, graph: Graph, node: Node) -> Node | None:
        """Replace a node by its decomposition; its first node, or None where the op is primitive."""
        decompose: Callable | None = node.opdef.decompose
        if decompose is None:
            return None
        b = Builder(graph, before=node, location=node.location)
        try:
            new = decompose(node.opdef.instance(node.operands, node.attrs), b)
        except CompileError:
            for created in reversed(b.created):
                graph.erase(created)
            return None
        values = new if isinstance(new, tuple) else (new,)
        following = node._next
        for old, value in zip(node.results, values, strict=True):
            if old.type != value.type:
                raise CompileError(f"decomposition of {node.op} gives {value.type} for {old.type}", code="op")
            graph.replace_value(old, value)
        graph.erase(node)
        return b.created[0] if b.created else following
