"""What a backend is: a name, what it can take, a lowering per op, and a way to run the result."""

from __future__ import annotations

import importlib
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from moec.ir import ArgumentValueError, CompileError, Dim, DType, Graph, Node, Value, lookup
from moec.ir.dims import evaluate
from moec.ir.interpreter import bind_inputs

F = TypeVar("F", bound=Callable[..., Any])
Item = TypeVar("Item")
Check = Callable[[Node], "str | None"]


Keep = Callable[[Value, torch.Tensor], None]
TAP_BUDGET = 128 << 20  # bytes of values inside that are held at once


class Executable(ABC):
    """A lowered graph that runs. `graph` is what was lowered; inputs and outputs are its, in order."""

    graph: Graph

    @abstractmethod
    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs for `inputs`. Raises ArgumentTypeError/ArgumentValueError on inputs that do not fit."""

    def run_into(self, inputs: Sequence[torch.Tensor], into: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Outputs as `run` gives them, each in the tensor of `into` where there is one: contiguous, of its dtype and
        shape. It may be an input that `tensor.write` makes that output of, which then is written where it lies."""
        found = self.run(inputs)
        return [v if t is None else t.copy_(v) for v, t in zip(found, into, strict=True)]

    @abstractmethod
    def tap(self, inputs: Sequence[torch.Tensor], values: Sequence[Value]) -> dict[Value, torch.Tensor]:
        """Intermediate values of the lowered graph (not of a differently fused one) for `inputs`."""

    def stream(
        self, inputs: Sequence[torch.Tensor], values: Sequence[Value], keep: Keep, budget: int = TAP_BUDGET
    ) -> None:
        """`keep(value, tensor)` for each of `values`, in bounded memory: as many at a time as `budget` bytes hold, each
        time in a run of its own, or all in one run where the backend hands them out as it goes."""
        binding = bind_inputs(self.graph, inputs)
        for chunk in chunked(values, binding, budget):
            for value, tensor in self.tap(inputs, chunk).items():
                keep(value, tensor)

    def save(self, folder: Path) -> None:  # noqa: B027  (a hook)
        """Write backend artefacts (a model.onnx, say) beside the IR; nothing where there are none."""

    @property
    def stats(self) -> dict[str, Any]:
        """Figures for the report: memory, number of kernels, load time, …"""
        return {}


def by_size(
    items: Iterable[Item], size: Callable[[Item], int], budget: int, most: int = sys.maxsize
) -> Iterator[list[Item]]:
    """Consecutive parts of `items`, each of `most` items and of `budget` in total size at most (or of one item)."""
    part: list[Item] = []
    held = 0
    for item in items:
        more = size(item)
        if part and (len(part) == most or held + more > budget):
            yield part
            part, held = [], 0
        part.append(item)
        held += more
    if part:
        yield part


def chunked(values: Sequence[Value], binding: Mapping[str, int], budget: int) -> Iterator[list[Value]]:
    """Consecutive parts of `values`, each of at most `budget` bytes (or of one value)."""

    def size(v: Value) -> int:
        return math.prod(evaluate(s, binding) for s in v.shape if known(s, binding)) * v.dtype.bits // 8

    return by_size(values, size, budget)


def known(size: int | Dim, binding: Mapping[str, int]) -> bool:
    """Whether a binding gives a size its number."""
    return not isinstance(size, Dim) or size.symbols <= binding.keys()


@dataclass(eq=False)
class Backend:
    """A target. `holds_wide`: it multiplies no FP8 and holds such weights in f32, unless `compile` is given the option
    memory="fp8". `caches`: `compile` and `load` take the option cache= (see moec.backends.cache). `in_place`: caches of
    decoding are buffers, written where they lie (`Executable.run_into`). `tuning`: passes, as text, that pay on this
    target whatever the model; they see the graph after `prepare`, and may change weights, which then are its own.
    `has_options`: `compile` takes more options. `lowerings` is filled by `@backend.lowers("math.add")`, also from
    outside of moec; `unsupported` names ops that it refuses on purpose, with the reason; an op in neither must have a
    decomposition."""

    name: str
    dtypes: frozenset[DType]
    max_rank: int = 8
    dynamic: bool = True
    holds_wide: bool = False
    caches: bool = False
    in_place: bool = False
    tuning: str = ""
    has_options: bool = False
    lowerings: dict[str, Callable[..., Any]] = field(default_factory=dict)
    checks: dict[str, Check] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)

    def lowers(self, *ops: str, check: Check | None = None) -> Callable[[F], F]:
        """Register a function as the lowering of the named ops; a later one replaces an earlier.

        What the function is given and returns is said where each backend is. `check(node)` names what it cannot
        take (`"float32 only"`), or returns None; what it cannot take is decomposed, or an error that says so.
        Raises CompileError for an op that is not declared.
        """
        for op in ops:
            if not isinstance(op, str):
                raise CompileError(
                    f"lowers() takes op names, got {op!r}", code="lowering", hint='write @backend.lowers("family.op")'
                )
        names = [self._declared(op) for op in ops]

        def register(fn: F) -> F:
            for name in names:
                self._register(name, fn)
                self.checks.pop(name, None)
                if check is not None:
                    self.checks[name] = check
            return fn

        return register

    def _declared(self, op: str) -> str:
        if op == "extern.*":  # the ops of this family are made from a table when they are asked for
            return op
        try:
            return lookup(op).name
        except CompileError as e:
            e.hint = e.hint or f'declare it first, @moec.ir.op("{op}"), or import the module that does'
            e.args = (f"a lowering for {self.name}: {e.message}",)
            e.message = e.args[0]
            raise

    def _register(self, name: str, fn: Callable[..., Any]) -> None:
        self.lowerings[name] = fn
        self.unsupported.pop(name, None)

    def refuses(self, op: str, reason: str) -> None:
        """Never take an op, and give this reason."""
        self.unsupported[self._declared(op)] = reason

    def lowering(self, op: str) -> Callable[..., Any] | None:
        """The lowering of an op, or of its whole family (`backend.lowers("extern.*")`), or None."""
        return self.lowerings.get(op) or self.lowerings.get(_family(op))

    def refusal(self, op: str) -> str | None:
        """Why an op, or its whole family, is refused on purpose, or None."""
        return self.unsupported.get(op) or self.unsupported.get(_family(op))

    def missing(self, node: Node) -> str | None:
        """Why the backend cannot take this node as it is, or None where it can."""
        refusal = self.refusal(node.op)
        if refusal is not None:
            return refusal
        if self.lowering(node.op) is None:
            return f"{self.name} has no lowering of {node.op}"
        for v in (*node.operands, *node.results):
            if v is None:
                continue
            if v.dtype not in self.dtypes:
                return f"{self.name} does not take {v.dtype}"
            if v.type.rank > self.max_rank:
                return f"{self.name} takes rank {self.max_rank} at most, got {v.type}"
        check = self.checks.get(node.op)
        return (check(node) if check is not None else None) or self.check(node)

    def check(self, node: Node) -> str | None:
        """Further limits of the backend (a hook); the reason, or None."""
        return None

    def coarse_sums(self, node: Node) -> tuple[float, int] | None:
        """Where the hardware adds up more coarsely than f32 (a hook): the unit roundoff, and how many terms it adds up
        so before f32 takes over. Comparisons allow for it."""
        return None

    def advice(self, node: Node) -> str | None:
        """What to write so that the backend takes a node that it has no lowering of, or None where it has one."""
        if self.lowering(node.op) is not None or self.refusal(node.op) is not None:
            return None
        declared = f" ({node.opdef.file}:{node.opdef.line})" if node.opdef.file else ""
        return (
            f"write @backend.lowers({node.op!r}) with the `backend` of moec.backends.{self.name}, "
            f"or decompose(self, b) in the op's class{declared}"
        )

    def prepare(self, graph: Graph) -> Graph:
        """Backend-specific rewriting of a graph before it is legalised (a hook), e.g. bf16 → f32."""
        return graph

    def compile(
        self, graph: Graph, *, threads: int | None = None, options: Mapping[str, Any] | None = None
    ) -> Executable:
        """Lower a legal graph. Raises CompileError."""
        raise CompileError(f"backend {self.name} does not compile", code="backend")

    def load(
        self, graph: Graph, folder: Path, *, threads: int | None = None, options: Mapping[str, Any] | None = None
    ) -> Executable:
        """From what `Executable.save` wrote; compiles again where nothing was."""
        return self.compile(graph, threads=threads)


def _family(op: str) -> str:
    """What stands for all ops of a family that is made from a table; torch's own ops are declared one by one."""
    return "" if op.startswith("extern.aten_") else f"{op.split('.')[0]}.*"


def ships(fn: Callable[..., Any]) -> bool:
    """Whether a lowering is part of moec."""
    return (getattr(fn, "__module__", None) or "").split(".")[0] == "moec"


def describe(fn: Callable[..., Any]) -> str:
    """file:line of a function, for messages."""
    code = getattr(fn, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else repr(fn)


def returned(fn: Callable[..., Any], node: Node, result: Any, kind: type) -> tuple[Any, ...]:
    """What the lowering `fn` returned for a node, as a tuple of `kind`, one per result of the node.

    Raises CompileError naming the lowering's file:line for anything else.
    """
    values = tuple(result) if isinstance(result, list | tuple) else (result,)
    if len(values) == len(node.results) and all(isinstance(v, kind) for v in values):
        return values
    shown = ", ".join(type(v).__name__ for v in values) or "nothing"
    expected = f"{len(node.results)} × {kind.__name__}" if len(node.results) > 1 else f"one {kind.__name__}"
    raise CompileError(
        f"the lowering of {node.op} ({describe(fn)}) returned {shown}, expected {expected}",
        code="lowering",
        location=node.location,
        hint="is a return missing?" if result is None else None,
    )


def lowering_failed(fn: Callable[..., Any], node: Node, error: Exception) -> CompileError:
    """`error`, raised by the lowering `fn`, as a CompileError that names it, the op and the node's location."""
    what = error.message if isinstance(error, CompileError) else f"{type(error).__name__}: {error}"
    return CompileError(
        f"the lowering of {node.op} ({describe(fn)}) failed: {what}",
        code=error.code if isinstance(error, CompileError) else "lowering",
        location=node.location,
        hint=error.hint if isinstance(error, CompileError) else None,
    )


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
