"""ONNX Runtime sessions: their options, how a lowered model gets into one, and running it."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as onnx
import onnxruntime
import torch

from moec.backends.onnxruntime import artifact
from moec.backends.onnxruntime.errors import serialising, wrapped
from moec.backends.onnxruntime.huge_pages import huge_pages
from moec.backends.onnxruntime.lower import Interface, Lowered
from moec.backends.onnxruntime.memory import give_back
from moec.backends.onnxruntime.options import Options
from moec.backends.onnxruntime.types import carried, numpy_type, uncarried
from moec.ir import CompileError, Dim, Graph, Node, Value
from moec.ir.arrays import from_numpy

# a model in memory is copied while it is loaded; larger ones go through a memory-mapped file
IN_MEMORY = 32 * 2**20

# onnxruntime 1.32: removes the node that computes the bias where others read it too, and takes any transpose of two
# axes for a swap (issue 32228 there)
_BROKEN = ["GemmTransposeFusion"]

_INLINE = 1024  # bytes; an optimised model holds smaller weights itself


@dataclass(frozen=True)
class Optimised:
    """An optimised model: to be written to `path` while a session is made (`write`), or to be opened as it is."""

    path: Path
    write: bool = False


def session_options(
    threads: int | None, options: Options | None = None, optimised: Optimised | None = None
) -> onnxruntime.SessionOptions:
    """Full optimisation, quiet; FP8 weights are folded to f32 at load, or with memory="fp8" widened one at a time, in
    memory that is given back at once."""
    result = onnxruntime.SessionOptions()
    result.log_severity_level = 4  # errors come as exceptions
    result.intra_op_num_threads = threads or 0
    result.add_session_config_entry("session.disable_quant_qdq", "1")
    if options is not None and options.compact:
        result.enable_cpu_mem_arena = False  # it keeps a place for every widened weight
        result.enable_mem_pattern = False
    if options is not None and options.mapped:
        result.add_session_config_entry("session.disable_prepacking", "1")
    if optimised is not None and not optimised.write:
        result.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    elif optimised is not None:
        result.optimized_model_filepath = str(optimised.path)
        for name, value in (
            ("optimized_model_external_initializers_file_name", f"{optimised.path.name}.data"),
            ("optimized_model_external_initializers_min_size_in_bytes", str(_INLINE)),
            # the layouts that kernels multiply; a session that finds them maps them instead of holding its own
            ("save_external_prepacked_constant_initializers", "1"),
        ):
            result.add_session_config_entry(f"session.{name}", value)
    return result


@dataclass(eq=False)
class Session:
    """An ONNX Runtime session of a lowered graph."""

    session: onnxruntime.InferenceSession
    interface: Interface
    _bindings: threading.local = field(default_factory=threading.local, repr=False)

    def run(self, graph: Graph, inputs: Sequence[torch.Tensor], values: Sequence[Value]) -> list[torch.Tensor]:
        """Outputs in the dtypes of `values`, of inputs whose sizes the interface takes."""
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

    def _binding(self) -> tuple[onnxruntime.IOBinding, dict[tuple[str, str], tuple[int, torch.Size]]]:
        """This thread's from its last call and where it leads, by name and direction; a new one after a failure."""
        last = getattr(self._bindings, "last", None)
        self._bindings.last = None
        return last or (self.session.io_binding(), {})

    def run_into(
        self,
        graph: Graph,
        inputs: Sequence[torch.Tensor],
        values: Sequence[Value],
        into: Sequence[torch.Tensor | None],
    ) -> list[torch.Tensor]:
        """The same with outputs in the memory of `into` where there is some; their dtypes are their carriers'. A
        thread's next call binds again only what lies elsewhere, or has another size, than in this one."""
        held = [carried(t.detach().cpu(), v.dtype).contiguous() for v, t in zip(graph.inputs, inputs, strict=True)]
        bound, known = self._binding()
        for name, v, t in zip(self.interface.inputs, graph.inputs, held, strict=True):
            place = t.data_ptr(), t.shape
            if known.get((name, "in")) != place:
                bound.bind_input(name, "cpu", 0, numpy_type(v.dtype), list(t.shape), t.data_ptr())
                known[name, "in"] = place
        for name, v, out in zip(self.interface.outputs, values, into, strict=True):
            if out is None:  # bound again each time: ONNX Runtime would write into what it gave before
                bound.bind_output(name, "cpu")
                known.pop((name, "out"), None)
            elif known.get((name, "out")) != (place := (out.data_ptr(), out.shape)):
                bound.bind_output(name, "cpu", 0, numpy_type(v.dtype), list(out.shape), out.data_ptr())
                known[name, "out"] = place
        try:
            self.session.run_with_iobinding(bound)
        except Exception as error:  # as above
            raise wrapped(error, self.interface.sources, "running") from error
        found = bound.get_outputs()
        self._bindings.last = bound, known
        return [
            uncarried(from_numpy(found[i].numpy()), v.dtype) if out is None else out
            for i, (v, out) in enumerate(zip(values, into, strict=True))
        ]


def check_derived(values: Sequence[Value], binding: Mapping[str, int]) -> None:
    """Raise CompileError where a computed size of `values` is negative or no integer: ONNX clips such sizes."""
    for size in {s: None for v in values for s in v.shape if isinstance(s, Dim) and not s.is_symbol}:
        if size.symbols <= binding.keys() and size.evaluate(binding) < 0:
            known = ", ".join(f"{n} = {binding[n]}" for n in sorted(size.symbols))
            raise CompileError(
                f"a result has the size {size}, which is {size.evaluate(binding)} for {known}", code="shape"
            )


def start(lowered: Lowered, options: Options, threads: int | None, optimised: Optimised | None = None) -> Session:
    """Load a lowered model into a session, which writes `optimised` on the way. Raises CompileError."""
    # weights that are not copied stay in the mapped file
    if lowered.weight_bytes <= IN_MEMORY and not (options.compact or options.mapped):
        with serialising():
            data = onnx.to_proto(lowered.model).SerializeToString()
        lowered.forget_weights()
        return Session(open_session(data, options, threads, lowered.interface.sources, optimised), lowered.interface)
    folder = Path(tempfile.mkdtemp(prefix="moec-"))
    try:
        path = artifact.write_model(lowered, folder)
        return Session(open_session(path, options, threads, lowered.interface.sources, optimised), lowered.interface)
    finally:
        shutil.rmtree(folder)  # what the session maps stays readable
        give_back()


def open_session(
    source: bytes | Path,
    options: Options,
    threads: int | None,
    sources: dict[str, Node],
    optimised: Optimised | None = None,
) -> onnxruntime.InferenceSession:
    """Raises CompileError naming the IR op that ONNX Runtime refuses."""
    model = source if isinstance(source, bytes) else str(source)
    try:
        with huge_pages(options.huge_pages):
            return onnxruntime.InferenceSession(
                model,
                session_options(threads, options, optimised),
                providers=["CPUExecutionProvider"],
                disabled_optimizers=[*_BROKEN, *(["ConstantFolding"] if options.compact else [])],
            )
    except Exception as error:  # as above
        raise wrapped(error, sources, "loading") from error
