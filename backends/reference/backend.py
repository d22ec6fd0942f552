"""Runs a graph in the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.backends.base import Backend, Check, Executable, F
from moec.ir import CompileError, DType, Graph, Node, Value, run


@dataclass(eq=False)
class ReferenceExecutable(Executable):
    graph: Graph

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return run(self.graph, inputs)

    def tap(self, inputs: Sequence[torch.Tensor], values: Sequence[Value]) -> dict[Value, torch.Tensor]:
        wanted, seen = set(values), {}

        def keep(value: Value, tensor: torch.Tensor) -> None:
            if value in wanted:
                seen[value] = tensor

        run(self.graph, inputs, tap=keep)
        return seen


class ReferenceBackend(Backend):
    def lowers(self, *ops: str, check: Check | None = None) -> Callable[[F], F]:
        """Raises CompileError: an op's own `reference` is what runs here."""
        raise CompileError("the reference runs reference() of an op's class, and takes no lowerings", code="lowering")

    def missing(self, node: Node) -> str | None:
        return None

    def compile(
        self, graph: Graph, *, threads: int | None = None, options: Mapping[str, Any] | None = None
    ) -> ReferenceExecutable:
        return ReferenceExecutable(graph)


backend = ReferenceBackend("reference", dtypes=frozenset(DType))
