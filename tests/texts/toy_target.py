"""A target for legalise.ir that takes the ops it is given."""

from dataclasses import dataclass

from moec.ir import Graph, Node
from moec.passes import Legalise, Pass


@dataclass(frozen=True)
class Takes:
    ops: tuple[str, ...]
    name: str = "toy"

    def missing(self, node: Node) -> str | None:
        return None if node.op in self.ops else f"it takes {', '.join(self.ops)}"

    def advice(self, node: Node) -> str | None:
        return None


@dataclass(frozen=True)
class LegaliseTo(Pass):
    """Legalise for a target of these ops."""

    ops: tuple[str, ...]
    fallback: str = "error"

    def run(self, graph: Graph) -> Graph:
        return Legalise(Takes(self.ops), self.fallback).run(graph)
