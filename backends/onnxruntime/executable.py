"""A lowered graph in an ONNX Runtime session."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moec.backends.base import TAP_BUDGET, Backend, Executable, Keep
from moec.backends.cache import Cache
from moec.backends.onnxruntime import artifact
from moec.backends.onnxruntime.lower import Lowered, lower
from moec.backends.onnxruntime.memory import fitting
from moec.backends.onnxruntime.options import Options
from moec.backends.onnxruntime.session import Optimised, Session, check_derived, open_session, start
from moec.backends.onnxruntime.types import carrier
from moec.backends.onnxruntime.warm import cached
from moec.ir import CompileError, Graph, Value
from moec.ir.interpreter import MOST_KEYS, bind_inputs, call_key


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
    cache: Cache | None = None
    _tapped: tuple[tuple[Value, ...], Session] | None = field(default=None, repr=False)
    _empty: Session | None = field(default=None, repr=False)
    _known: dict[Any, bool] = field(default_factory=dict, repr=False)

    @staticmethod
    def compile(
        graph: Graph, options: Options, threads: int | None, backend: Backend, cache: Cache | None = None
    ) -> OnnxExecutable:
        began = time.perf_counter()
        lowered = lower(graph, options, backend)
        options, why = fitting(lowered, options)
        if why is not None:
            lowered = lower(graph, options, backend)
        built = time.perf_counter()

        def make(optimised: Optimised | None = None) -> Session:
            return start(lowered, options, threads, optimised)

        session, said = (make(), None) if cache is None else cached(lowered, options, threads, cache, make)
        figures = _figures(lowered, options, why, said)
        figures |= {"lowering_seconds": built - began, "load_seconds": time.perf_counter() - built}
        return OnnxExecutable(graph, options, threads, backend, session, figures, cache)

    @staticmethod
    def load(
        graph: Graph, folder: Path, threads: int | None, backend: Backend, cache: Cache | None = None
    ) -> OnnxExecutable:
        began = time.perf_counter()
        options = artifact.read_options(Path(folder))
        lowered = lower(graph, options, backend)  # for names: no weight is read
        options, why = fitting(lowered, options)

        def make(optimised: Optimised | None = None) -> Session:
            path = artifact.check_model(Path(folder))
            found = open_session(path, options, threads, lowered.interface.sources, optimised)
            return Session(found, lowered.interface)

        session, said = (make(), None) if cache is None else cached(lowered, options, threads, cache, make)
        artifact.check_interface(session.session, lowered.interface)
        figures = _figures(lowered, options, why, said) | {"load_seconds": time.perf_counter() - began}
        return OnnxExecutable(graph, options, threads, backend, session, figures, cache)

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        session = self.session if self._fits(inputs) else self.empty_session
        return session.run(self.graph, inputs, self.graph.outputs)

    def run_into(self, inputs: Sequence[torch.Tensor], into: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        outputs = self.graph.outputs
        as_stored = all(
            t is None or (carrier(v.dtype) is v.dtype and t.dtype is v.dtype.torch and t.is_contiguous())
            for v, t in zip(outputs, into, strict=True)
        )
        if not as_stored or not self._fits(inputs):
            return super().run_into(inputs, into)
        return self.session.run_into(self.graph, inputs, outputs, into)

    def _fits(self, inputs: Sequence[torch.Tensor]) -> bool:
        """Whether the session takes these sizes (see `empty_session`). Raises as `run` does. What has been found for
        shapes and dtypes is kept: a step of decoding takes a millisecond or two."""
        key = call_key(inputs)
        found = self._known.get(key)
        if found is None:
            binding = bind_inputs(self.graph, inputs)
            check_derived(self.graph.outputs, binding)
            found = self.session.interface.takes(binding)
            if len(self._known) >= MOST_KEYS:
                self._known.clear()
            self._known[key] = found
        return found

    def stream(
        self, inputs: Sequence[torch.Tensor], values: Sequence[Value], keep: Keep, budget: int = TAP_BUDGET
    ) -> None:
        """Where weights are large, sessions are given up first, so that there is one copy of them; the next run makes
        its own again."""
        size = self.figures["weight_bytes"]
        if size > budget:
            self._session = self._empty = None
        super().stream(inputs, values, keep, max(budget, size // 4))
        self._tapped = None

    @property
    def session(self) -> Session:
        """The session that `run` uses."""
        if self._session is None:
            self._session = self._opened(lower(self.graph, self.options, self.backend))
        return self._session

    @property
    def empty_session(self) -> Session:
        """A session for sizes that the other does not take, made when first needed."""
        if self._empty is None:
            self._empty = self._opened(lower(self.graph, self.options, self.backend, empty=True))
        return self._empty

    def _opened(self, lowered: Lowered) -> Session:
        """A session, through the cache where there is one."""

        def make(optimised: Optimised | None = None) -> Session:
            return start(lowered, self.options, self.threads, optimised)

        if self.cache is None:
            return make()
        return cached(lowered, self.options, self.threads, self.cache, make)[0]

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
        check_derived([*self.graph.outputs, *inner], binding)
        given = self._tapped[1].run(self.graph, inputs, [*self.graph.outputs, *inner])
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


def _figures(lowered: Lowered, options: Options, why: str | None, cache: dict[str, Any] | None) -> dict[str, Any]:
    """What the report says: among it how weights are held, why so where it was not asked for, and the bytes that they
    take in memory of the process's own in each way."""
    memory = {"mode": options.memory, "weight_bytes_resident": {**lowered.resident, "mapped": 0}}
    return {
        "nodes": sum(1 for _ in lowered.model.graph.all_nodes()),
        "weight_bytes": lowered.weight_bytes,
        "memory": memory | ({} if why is None else {"why": why}),
        "forms": dict(lowered.choices),
        "experts": lowered.experts,
        **({} if cache is None else {"cache": cache}),
    }
