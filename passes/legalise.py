"""Making a graph fit a backend: what it lacks is decomposed, what still does not fit is an error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from moec.ir import Builder, CompileError, Graph, Node, Value
from moec.ir.compare import same_attrs
from moec.ir.ops.quant import check_scales
from moec.ir.printer import excerpt
from moec.passes.base import Pass, report


class Capabilities(Protocol):
    """What legalisation asks of a backend."""

    name: str

    def missing(self, node: Node) -> str | None:
        """Why the backend cannot take a node, or None."""
        ...

    def advice(self, node: Node) -> str | None:
        """What to write so that the backend takes it, or None where there is nothing to say."""
        ...


@dataclass(frozen=True)
class Legalise(Pass):
    """Decomposes ops that the backend lacks until only supported ones are left.

    With `fallback="error"` the first node that still does not fit raises CompileError (op, location,
    reason); with "reference" such nodes stay for the reference interpreter and are reported. Stored scales of FP8
    weights are checked when they are read.
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
                done, following, failed = self._decompose(g, node) if reason else (False, None, None)
                if reason and not done:
                    if failed:
                        reason = f"{reason}, and its decomposition does not apply: {failed}"
                    if self.fallback == "error":
                        other = 'fallback="reference" runs such ops in the reference interpreter'
                        advice = self.backend.advice(node)
                        raise CompileError(
                            f"{node.op} cannot run on {self.backend.name}: {reason}",
                            code="unsupported-op",
                            location=node.location,
                            excerpt=excerpt(node),
                            hint=f"{advice}; {other}" if advice else other,
                        )
                    left.append(f"{node.op} at {node.location.describe()}: {reason}")
                # continue with the first new node: it may need decomposing too
                node = following if done else node._next
            check_scales(g)
        report(left_to_reference=left)
        return graph

    def _decompose(self, graph: Graph, node: Node) -> tuple[bool, Node | None, str | None]:
        """Replace a node by its decomposition: whether there was one, the node to continue with (None at the end of
        the graph), and why it does not decompose, where the op says so."""
        decompose: Callable | None = node.opdef.decompose
        if decompose is None:
            return False, None, None
        b = Builder(graph, before=node, location=node.location)
        try:
            new = decompose(node.opdef.instance(node.operands, node.attrs), b)
        except CompileError as e:
            for created in reversed(b.created):
                graph.erase(created)
            return False, None, e.message
        except Exception as e:  # whatever a decomposition does wrong is said with its node
            raise self._wrong(node, f"raised {type(e).__name__}: {e}") from e
        values = new if isinstance(new, tuple) else (new,)
        if len(values) != len(node.results) or not all(isinstance(v, Value) for v in values):
            shown = ", ".join(type(v).__name__ for v in values)
            raise self._wrong(node, f"returned {shown}, expected {len(node.results)} Value(s)")
        if any(c.op == node.op and same_attrs(c.attrs, node.attrs) for c in b.created):
            raise self._wrong(node, "holds the op itself")
        following = node._next
        for old, value in zip(node.results, values, strict=True):
            if old.type != value.type:
                raise self._wrong(node, f"gives {value.type} for {old.type}")
            graph.replace_value(old, value)
        graph.erase(node)
        return True, b.created[0] if b.created else following, None

    @staticmethod
    def _wrong(node: Node, what: str) -> CompileError:
        declared = f" ({node.opdef.file}:{node.opdef.line})" if node.opdef.file else ""
        return CompileError(f"the decomposition of {node.op}{declared} {what}", code="op", location=node.location)
