"""A lowered graph in an ONNX Runtime session."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as onnx
import onnxruntime
import torch

from moec.backends.base import TAP_BUDGET, Backend, Executable, Keep
from moec.backends.onnxruntime import artifact
from moec.backends.onnxruntime.errors import serialising, wrapped
from moec.backends.onnxruntime.lower import Interface, Lowered, lower
from moec.backends.onnxruntime.options import Options
from moec.backends.onnxruntime.types import carried, uncarried
from moec.ir import CompileError, Dim, Graph, Node, Value
from moec.ir.arrays import from_numpy
from moec.ir.interpreter import bind_inputs

# a model in memory is copied while it is loaded; larger ones go through a memory-mapped file
IN_MEMORY = 32 * 2**20


# onnxruntime 1.32: removes the node that computes the bias where others read it too, and takes any transpose of two
# axes for a swap (issue 32228 there)
_BROKEN = ["GemmTransposeFusion"]


def session_options(threads: int | None, options: Options | None = None) -> onnxruntime.SessionOptions:
    """Full optimisation, quiet; FP8 weights are folded to f32 at load, or with memory="fp8" widened one at a time, in
    memory that is given back at once."""
    result = onnxruntime.SessionOptions()
    result.log_severity_level = 4  # errors come as exceptions
    result.intra_op_num_threads = threads or 0
    result.add_session_config_entry("session.disable_quant_qdq", "1")
    if options is not None and options.compact:
        result.enable_cpu_mem_arena = False  # it keeps a place for every widened weight
        result.enable_mem_pattern = False
    return result


@dataclass(eq=False)
class Session:
    """An ONNX Runtime session of a lowered graph."""

    session: onnxruntime.InferenceSession
    interface: Interface

    def run(
        self, graph: Graph, inputs: Sequence[torch.Tensor], values: Sequence[Value], binding: Mapping[str, int]
    ) -> list[torch.Tensor]:
        """Outputs in the dtypes of `values`."""
        check_derived(values, binding)
        names = self.interface
        if not names.outputs:
            return []
        feeds = {
            name: carried(t.detach().cpu(), v.dtype).contiguous().numpy()
            for name, v, t in zip(names.inputs, graph.inputs, inputs, strict=True)
        }
        try:
            arrays = self.session.run(names.outputs, feeds)
        except Exception as error:  # ONNX Runtime's exceptions have no common base but this
            raise wrapped(error, names.sources, "running") from error
        return [uncarried(from_numpy(a), v.dtype) for a, v in zip(arrays, values, strict=True)]


def check_derived(values: Sequence[Value], binding: Mapping[str, int]) -> None:
    """Raise CompileError where a computed size of `values` is negative or no integer: ONNX clips such sizes."""
    for size in {s: None for v in values for s in v.shape if isinstance(s, Dim) and not s.is_symbol}:
        if size.symbols <= binding.keys() and size.evaluate(binding) < 0:
            known = ", ".join(f"{n} = {binding[n]}" for n in sorted(size.symbols))
            raise CompileError(
                f"a result has the size {size}, which is {size.evaluate(binding)} for {known}", code="shape"
            )


@dataclass(eq=False)
class OnnxExecutable(Executable):
    """See moec.backends.base.Executable. `graph` keeps its dtypes: bf16 and f16 values are computed in f32
    and rounded where they leave the session."""

    graph: Graph
    options: Options
    threads: int | None
    backend: Backend
    _session: Session | None
    figures: dict[str, Any]
    _tapped: tuple[tuple[Value, ...], Session] | None = field(default=None, repr=False)
    _empty: Session | None = field(default=None, repr=False)

    @staticmethod
    def compile(graph: Graph, options: Options, threads: int | None, backend: Backend) -> OnnxExecutable:
        began = time.perf_counter()
        lowered = lower(graph, options, backend)
        built = time.perf_counter()
        session = start(lowered, options, threads)
        figures = {
            "nodes": sum(1 for _ in lowered.model.graph.all_nodes()),
            "weight_bytes": lowered.weight_bytes,
            "memory": _memory(lowered, options),
            "forms": dict(lowered.choices),
            "lowering_seconds": built - began,
            "load_seconds": time.perf_counter() - built,
        }
        return OnnxExecutable(graph, options, threads, backend, session, figures)

    @staticmethod
    def load(graph: Graph, folder: Path, threads: int | None, backend: Backend) -> OnnxExecutable:
        began = time.perf_counter()
        path, options = artifact.check(Path(folder))
        lowered = lower(graph, options, backend)  # for names: no weight is read
        session = Session(open_session(path, options, threads, lowered.interface.sources), lowered.interface)
        artifact.check_interface(session.session, lowered.interface)
        figures = {
            "nodes": sum(1 for _ in lowered.model.graph.all_nodes()),
            "weight_bytes": lowered.weight_bytes,
            "memory": _memory(lowered, options),
            "forms": dict(lowered.choices),
            "load_seconds": time.perf_counter() - began,
        }
        return OnnxExecutable(graph, options, threads, backend, session, figures)

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        binding = bind_inputs(self.graph, inputs)
        session = self.session if self.session.interface.takes(binding) else self.empty_session
        return session.run(self.graph, inputs, self.graph.outputs, binding)

    def stream(
        self, inputs: Sequence[torch.Tensor], values: Sequence[Value], keep: Keep, budget: int = TAP_BUDGET
    ) -> None:
        """Where weights are large, the session is given up first, so that there is one copy of them; the next run
        makes it again."""
        size = self.figures["weight_bytes"]
        if size > budget:
            self._session = None
        super().stream(inputs, values, keep, max(budget, size // 4))
        self._tapped = None

    @property
    def session(self) -> Session:
        """The session that `run` uses."""
        if self._session is None:
            self._session = start(lower(self.graph, self.options, self.backend), self.options, self.threads)
        return self._session

    @property
    def empty_session(self) -> Session:
        """A session for sizes that the other does not take, made when first needed."""
        if self._empty is None:
            lowered = lower(self.graph, self.options, self.backend, empty=True)
            self._empty = start(lowered, self.options, self.threads)
        return self._empty

    def tap(self, inputs: Sequence[torch.Tensor], values: Sequence[Value]) -> dict[Value, torch.Tensor]:
        wanted = tuple(dict.fromkeys(values))
        inner = tuple(v for v in wanted if v.weight is None)
        binding = bind_inputs(self.graph, inputs)
        if self._tapped is None or self._tapped[0] != inner or not self._tapped[1].interface.takes(binding):
            self._check_known(inner)
            self._tapped = None  # one copy of the weights at a time
            lowered = lower(self.graph, self.options, self.backend, list(inner))
            if not lowered.interface.takes(binding):
                lowered = lower(self.graph, self.options, self.backend, list(inner), empty=True)
            self._tapped = inner, start(lowered, self.options, self.threads)
        given = self._tapped[1].run(self.graph, inputs, [*self.graph.outputs, *inner], binding)
        found = dict(zip(inner, given[len(self.graph.outputs) :], strict=True))
        return {v: v.weight.load() if v.weight is not None else found[v] for v in wanted}

    def _check_known(self, values: Sequence[Value]) -> None:
        known = {*self.graph.inputs, *(r for n in self.graph.nodes for r in n.results)}
        for v in values:
            if v not in known:
                raise CompileError(f"{v!r} is not a value of the lowered graph", code="tap", location=v.location)

    def save(self, folder: Path) -> None:
        """Writes model.onnx, model.onnx.data (weights) and onnxruntime.json."""
        lowered = lower(self.graph, self.options, self.backend)
        artifact.write(lowered, self.options, Path(folder))

    @property
    def stats(self) -> dict[str, Any]:
        return dict(self.figures)


def _memory(lowered: Lowered, options: Options) -> dict[str, Any]:
    """How weights are held, and the bytes that they take in either way."""
    return {"mode": options.memory, "weight_bytes_resident": dict(lowered.resident)}


def start(lowered: Lowered, options: Options, threads: int | None) -> Session:
    """Load a lowered model into a session. Raises CompileError."""
    # with memory="fp8", weights stay in the mapped file
    if lowered.weight_bytes <= IN_MEMORY and not options.compact:
        with serialising():
            data = onnx.to_proto(lowered.model).SerializeToString()
        lowered.forget_weights()
        return Session(open_session(data, options, threads, lowered.interface.sources), lowered.interface)
    folder = Path(tempfile.mkdtemp(prefix="moec-"))
    try:
        path = artifact.write_model(lowered, folder)
        session = open_session(path, options, threads, lowered.interface.sources)
    finally:
        shutil.rmtree(folder)  # what the session maps stays readable
    return Session(session, lowered.interface)


def open_session(
    source: bytes | Path, options: Options, threads: int | None, sources: dict[str, Node]
) -> onnxruntime.InferenceSession:
    """Raises CompileError naming the IR op that ONNX Runtime refuses."""
    model = source if isinstance(source, bytes) else str(source)
    try:
        return onnxruntime.InferenceSession(
            model,
            session_options(threads, options),
            providers=["CPUExecutionProvider"],
            disabled_optimizers=[*_BROKEN, *(["ConstantFolding"] if options.compact else [])],
        )
    except Exception as error:
        raise wrapped(error, sources, "loading") from error
