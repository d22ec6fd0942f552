"""Planting backend bugs: a copy of a real backend with one lowering wrong, and the models to run on it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as onnx
import torch

import moec
from moec import models
from moec.backends import Backend, get_backend
from moec.backends.onnxruntime import Emitter
from moec.backends.reference.backend import ReferenceBackend, ReferenceExecutable
from moec.frontend import trace
from moec.ir import Graph, Node, Quantization, Value, run
from moec.ir.weight import Weight
from moec.passes.pipeline import Pipeline

from .. import model_matrix

AS_IT_IS = Pipeline(())
"""Subjects have been through the passes once, for all bugs."""

BOTH = ("propagated", "isolated")

Lowering = Callable[..., Any]


@dataclass(frozen=True)
class Bug:
    """One wrong lowering. `wrong(right, *args)` is what the backend runs in place of the lowering `right` for nodes of
    `op` in the module `at` for which `where` holds; the first of them in the graph is to be named. `subject` and
    `inputs` name what is run, `modes` how the bug can be seen."""

    name: str
    subject: str
    op: str
    wrong: Callable[..., Any]
    at: str = ""
    where: Callable[[Node], bool] | None = None
    inputs: str = "ids"
    modes: tuple[str, ...] = BOTH
    # in "triton", `wrong(right, op)` is for all nodes of the op; in "reference", `wrong(node, tensor)` is what an
    # executable gives for the result `tensor` of a node
    backend: str = "onnxruntime"

    def hits(self, node: Node) -> bool:
        here = node.op == self.op and (not self.at or node.location.under(self.at))
        return here and (self.where is None or self.where(node))

    def planted(self, graph: Graph) -> list[Node]:
        """The nodes whose lowering is wrong."""
        return [n for n in graph.nodes if self.hits(n)]

    def plant(self) -> Backend:
        healthy = get_backend(self.backend)
        if self.backend == "reference":
            return Faulty("faulty", dtypes=healthy.dtypes, bug=self)
        right = healthy.lowerings[self.op]

        def lowering(*args: Any) -> Any:
            if self.backend == "onnxruntime" and not self.hits(args[1]):
                return right(*args)
            return self.wrong(right, *args)

        return dataclasses.replace(healthy, name="faulty", lowerings={**healthy.lowerings, self.op: lowering})


@dataclass(eq=False)
class Faulty(ReferenceBackend):
    """A backend of its own, which computes nodes one by one."""

    bug: Bug | None = None

    def compile(self, graph: Graph, *, threads: int | None = None, options: Any = None) -> FaultyExecutable:
        assert self.bug is not None
        return FaultyExecutable(graph, self.bug)


@dataclass(eq=False)
class FaultyExecutable(ReferenceExecutable):
    bug: Bug

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return run(self.graph, inputs, tap=self._spoil)

    def tap(self, inputs: Sequence[torch.Tensor], values: Sequence[Value]) -> dict[Value, torch.Tensor]:
        seen: dict[Value, torch.Tensor] = {}

        def keep(value: Value, tensor: torch.Tensor) -> torch.Tensor:
            seen[value] = self._spoil(value, tensor)
            return seen[value]

        run(self.graph, inputs, tap=keep)
        return {v: seen[v] for v in values}

    def _spoil(self, value: Value, tensor: torch.Tensor) -> torch.Tensor:
        node = value.producer
        if node is None or value.index or not self.bug.hits(node):
            return tensor
        return self.bug.wrong(node, tensor)


# -- changing a node for a lowering


def changed(node: Node, operands: dict[str, Value | None] | None = None, **attrs: Any) -> Node:
    """A node as `node`, outside of any graph, with other attributes or operands."""
    given = [(operands or {}).get(name, v) for name, v in node.opdef.named_operands(node.operands).items()]
    copy = Node(node.opdef, given, {**node.attrs, **attrs}, node.location)
    copy.results = node.results
    return copy


def reweighted(node: Node, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Node:
    """A node whose operand `name`, a weight, holds changed data."""
    v = node.operand(name)
    weight = Weight.of(f"{v.weight.name}.wrong", change(v.weight.load()).contiguous())
    assert weight.type == v.type
    return changed(node, {name: Value(v.type, weight=weight)})


def refed(e: Emitter, node: Node, name: str, change: Callable[[onnx.Value], onnx.Value]) -> Node:
    """A node whose operand `name` is computed differently."""
    v = Value(node.operand(name).type)
    e.bind(v, change(e.value(node.operand(name))))
    return changed(node, {name: v})


# -- subjects


@dataclass(frozen=True, eq=False)
class Subject:
    """A graph after the passes, and inputs by name."""

    graph: Graph
    inputs: dict[str, tuple[torch.Tensor, ...]]


def _ids(vocabulary: int) -> dict[str, tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"ids": (2, 12), "one": (1, 1), "few": (1, 5), "long": (1, 40)}
    return {n: (torch.randint(0, vocabulary, s, generator=generator),) for n, s in shapes.items()}


def _traced(model: torch.nn.Module) -> Subject:
    # other tests run these programs at other sizes than the example's
    graph = trace(model, (torch.arange(14).reshape(2, 7),), dynamic_shapes="auto", check=False).graph
    return Subject(moec.compile(graph, backend="reference").graph, _ids(256))


def _again(name: str, quantize: Quantization) -> Subject:
    """A subject with its weights, or activations too, in FP8."""
    return Subject(moec.compile(subject(name).graph, backend="reference", quantize=quantize).graph, _ids(256))


def _stored(name: str, change: Callable[[str, torch.Tensor], torch.Tensor] | None = None, **options: Any) -> Subject:
    graph = model_matrix.load(name)
    if change is not None:
        graph.bind_weights({n: change(n, v.weight.load()) for n, v in graph.weights.items()})
    if options.get("passes") != AS_IT_IS:
        graph = moec.compile(graph, backend="reference", **options).graph
    return Subject(graph, _ids(29))


def _decoding(name: str) -> Subject:
    """A cached program: two rows with five past tokens and one or two new ones."""
    graph = _stored(name).graph
    generator = torch.Generator().manual_seed(6)

    def at(batch: int, past: int, new: int) -> tuple[torch.Tensor, ...]:
        sizes = {"B": batch, "P": past, "S": new}
        caches = [torch.randn([sizes.get(str(s), s) for s in v.shape], generator=generator) for v in graph.inputs[2:]]
        ids = torch.randint(0, 29, (batch, new), generator=generator)
        return ids, torch.ones(batch, past + new, dtype=torch.int64), *caches

    return Subject(graph, {"ids": at(2, 5, 2), "one": at(2, 5, 1)})


def _steep(name: str, t: torch.Tensor) -> torch.Tensor:
    """Gates and ups that reach their limit."""
    return t * 6 if "gate_up_proj" in name and "bias" not in name else t


def _tied(name: str, t: torch.Tensor) -> torch.Tensor:
    """Routers that cannot tell their experts apart."""
    if "router" not in name:
        return t
    return t[:1].expand(t.shape).clone()


BLOCKS = Quantization(block=(32, 32), group=32)
SUBJECTS: dict[str, Callable[[], Subject]] = {
    **{n: functools.partial(lambda n: _traced(models.build(f"{n}-mini")), n)
       for n in ("mixtral-8x7b", "deepseek-v3", "deepseek-v2-lite", "qwen3-30b-a3b")},
    "deepseek-v3 fp8": lambda: _again("deepseek-v3", BLOCKS),
    "deepseek-v3 fp8 weights": lambda: _again("deepseek-v3", dataclasses.replace(BLOCKS, activations=None)),
    "trained": lambda: _traced(models.trained()),
    "trained fp8": lambda: _again("trained", BLOCKS),
    "transformers mixtral": lambda: _stored("mixtral.sdpa.grouped.prefill"),
    "transformers mixtral bf16": lambda: _stored("mixtral.sdpa.grouped.prefill.bf16"),
    "transformers deepseek-v3": lambda: _stored("deepseek_v3.sdpa.grouped.prefill"),
    "transformers gpt-oss": lambda: _stored("gpt_oss.eager.grouped.prefill", _steep),
    "transformers gpt-oss, tied": lambda: _stored("gpt_oss.eager.grouped.prefill", _tied),
    "mixtral without passes": lambda: _stored("own_mixtral.sdpa.prefill", passes=AS_IT_IS),
    "deepseek-v3 decoding": lambda: _decoding("own_deepseek_v3.sdpa.decode"),
    "mixtral decoding": lambda: _decoding("mixtral.sdpa.grouped.decode"),
}  # fmt: skip


@functools.cache
def subject(name: str) -> Subject:
    return SUBJECTS[name]()


def compare(graph: Graph, inputs: tuple[torch.Tensor, ...], backend: str | Backend, mode: str) -> moec.Comparison:
    return moec.compare(
        graph, inputs, backends=("reference", backend), passes=AS_IT_IS, isolated=mode == "isolated", threads=1
    )


def same(a: Node, b: Node) -> bool:
    """Whether two nodes, of clones of one graph, are the same node."""
    alike = a.op == b.op and a.location == b.location and len(a.results) == len(b.results)
    return alike and all(x.type == y.type and x.origins == y.origins for x, y in zip(a.results, b.results, strict=True))
