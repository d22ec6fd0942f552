"""Runs a graph in the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.backends.base import TAP_BUDGET, Backend, Check, Executable, F, Keep
from moec.ir import CompileError, DType, Graph, Node, Value, run


@dataclass(eq=False)
class ReferenceExecutable(Executable):
    graph: Graph

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return run(self.graph, inputs)

    def tap(self, inputs: Sequence[torch.Tensor], values: Sequence[Value]) -> dict[Value, torch.Tensor]:
        seen: dict[Value, torch.Tensor] = {}
        self.stream(inputs, values, seen.__setitem__)
        return seen

    def stream(
        self, inputs: Sequence[torch.Tensor], values: Sequence[Value], keep: Keep, budget: int = TAP_BUDGET
    ) -> None:
        wanted = set(values)

        def see(value: Value, tensor: torch.Tensor) -> None:
            if value in wanted:
                keep(value, tensor)

        run(self.graph, inputs, tap=see)


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
