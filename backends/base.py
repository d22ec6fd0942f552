"""What a backend is: a name, what it can take, a lowering per op, and a way to run the result."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from moec.ir import ArgumentValueError, CompileError, DType, Graph, Node, Value, lookup

F = TypeVar("F", bound=Callable[..., Any])


class Executable(ABC):
    """A lowered graph that runs. `graph` is what was lowered; inputs and outputs are its, in order."""

    graph: Graph

    @abstractmethod
    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs for `inputs`. Raises ArgumentTypeError/ArgumentValueError on inputs that do not fit."""

    @abstractmethod
    def tap(self, inputs: Sequence[torch.Tensor], values: Sequence[Value]) -> dict[Value, torch.Tensor]:
        """Intermediate values of the lowered graph (not of a differently fused one) for `inputs`."""

    def save(self, folder: Path) -> None:  # noqa: B027  (a hook)
        """Write backend artefacts (a model.onnx, say) beside the IR; nothing where there are none."""

    @property
    def stats(self) -> dict[str, Any]:
        """Figures for the report: memory, number of kernels, load time, …"""
        return {}


@dataclass(eq=False)
class Backend:
    """A target. `lowerings` is filled by `@backend.lowers("math.add")`; `unsupported` names ops it
    refuses on purpose, with the reason; an op in neither must have a decomposition."""

    name: str
    dtypes: frozenset[DType]
    max_rank: int = 8
    dynamic: bool = True
    lowerings: dict[str, Callable[..., Any]] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)

    def lowers(self, *ops: str) -> Callable[[F], F]:
        """Register a function as the lowering of the named ops."""

        def register(fn: F) -> F:
            for op in ops:
                self.lowerings[lookup(op).name] = fn
            return fn

        return register

    def refuses(self, op: str, reason: str) -> None:
        self.unsupported[lookup(op).name] = reason

    def missing(self, node: Node) -> str | None:
        """Why the backend cannot take this node as it is, or None where it can."""
        if node.op in self.unsupported:
            return self.unsupported[node.op]
        if node.op not in self.lowerings:
            return f"{self.name} has no lowering of {node.op}"
        for v in (*node.operands, *node.results):
            if v is None:
                continue
            if v.dtype not in self.dtypes:
                return f"{self.name} does not take {v.dtype}"
            if v.type.rank > self.max_rank:
                return f"{self.name} takes rank {self.max_rank} at most, got {v.type}"
        return self.check(node)

    def check(self, node: Node) -> str | None:
        """Further limits of a lowering (a hook); the reason, or None."""
        return None

    def prepare(self, graph: Graph) -> Graph:
        """Backend-specific rewriting of a graph before it is legalised (a hook), e.g. bf16 → f32."""
        return graph

    def compile(
        self, graph: Graph, *, threads: int | None = None, options: Mapping[str, Any] | None = None
    ) -> Executable:
        """Lower a legal graph. Raises CompileError."""
        raise CompileError(f"backend {self.name} does not compile", code="backend")

    def load(self, graph: Graph, folder: Path, *, threads: int | None = None) -> Executable:
        """From what `Executable.save` wrote; compiles again where nothing was."""
        return self.compile(graph, threads=threads)


BACKENDS = ("reference", "onnxruntime", "triton")


def get_backend(name: str | Backend) -> Backend:
    """A backend by name. "auto" is triton where CUDA is, else onnxruntime. Raises ArgumentValueError."""
    if isinstance(name, Backend):
        return name
    if name == "auto":
        name = "triton" if torch.cuda.is_available() else "onnxruntime"
    if name not in BACKENDS:
        raise ArgumentValueError(
            f"unknown backend {name!r}", code="backend", hint=f"auto, {', '.join(BACKENDS)}, or a Backend"
        )
    return importlib.import_module(f"moec.backends.{name}").backend
