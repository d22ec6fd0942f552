"""One graph taken through passes, legalisation and lowering."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from moec.backends import Backend, Executable
from moec.backends.partition import Fallback, PartitionedExecutable, fallbacks
from moec.frontend.limits import Limits
from moec.ir import ArgumentTypeError, ArgumentValueError, CompileError, Graph
from moec.ir.interpreter import bind_inputs
from moec.passes.base import Pass, Record
from moec.passes.dump import Dump
from moec.passes.legalise import Legalise
from moec.passes.pipeline import Pipeline, run_pass
from moec.passes.spec import parse_passes

Step = Callable[[str], None]
MOST_THREADS = 1024
FALLBACKS = ("error", "reference")
MEMORY = ("fast", "fp8", "mapped")


@dataclass(frozen=True)
class Settings:
    """What `moec.compile` was asked for, resolved."""

    backend: Backend
    pipeline: Pipeline
    fallback: str = "error"
    threads: int | None = None
    dump: Path | None = None
    memory: str = "fast"
    cache: Path | None = None
    tuning: int | None = None  # how many of the backend's tuning passes run, None: all
    more: Mapping[str, Any] = field(default_factory=dict)  # options of the backend

    def __post_init__(self) -> None:
        if self.fallback not in FALLBACKS:
            raise ArgumentValueError(f"fallback={self.fallback!r} is none of {', '.join(FALLBACKS)}", code="fallback")
        if self.memory not in MEMORY:
            raise ArgumentValueError(f"memory={self.memory!r} is none of {', '.join(MEMORY)}", code="memory")
        if self.threads is not None and (type(self.threads) is not int or not 1 <= self.threads <= MOST_THREADS):
            raise ArgumentValueError(
                f"threads={self.threads!r} must be None or a positive integer up to {MOST_THREADS}", code="threads"
            )
        if not isinstance(self.more, Mapping) or not all(isinstance(name, str) for name in self.more):
            raise ArgumentTypeError(f"options={self.more!r} must map names to values", code="options")
        if self.more and not self.backend.has_options:
            raise ArgumentValueError(
                f"backend {self.backend.name!r} has no options, got {', '.join(self.more)}", code="options"
            )
        if twice := {"memory", "cache"} & self.more.keys():
            raise ArgumentValueError(
                f"{', '.join(sorted(twice))} among the options: they are arguments of their own", code="options"
            )

    @property
    def options(self) -> dict[str, Any] | None:
        """What the backend is told: its own options, about memory (most hold FP8 weights in 8 bits anyway) and the
        cache (most have nothing to keep there)."""
        found: dict[str, Any] = dict(self.more)
        if self.backend.holds_wide and self.memory != "fast":
            found["memory"] = self.memory
        if self.backend.caches and self.cache is not None:
            found["cache"] = self.cache
        return found or None

    @property
    def tuning_passes(self) -> tuple[Pass, ...]:
        """The backend's own passes (`Backend.tuning`), as many of them as run."""
        text = self.backend.tuning
        return parse_passes(text)[: self.tuning] if text else ()

    def under(self, name: str) -> Settings:
        """The same with its dumps in a subfolder."""
        return replace(self, dump=self.dump / name) if self.dump else self


def cache_folder(cache: str | os.PathLike[str] | None) -> Path | None:
    """A caller's `cache` argument. Raises ArgumentTypeError."""
    if cache is None or isinstance(cache, str | os.PathLike):
        return None if cache is None else Path(cache).expanduser()
    raise ArgumentTypeError(f"cache must be a folder or None, got {type(cache).__name__}", code="cache")


@dataclass(eq=False)
class Program:
    """A compiled graph. `graph` is the IR after the target-independent passes, `legal` what was lowered from
    it; `records` say what each pass did, `seconds` how long each step took; `limits` are the sizes it holds for."""

    graph: Graph
    legal: Graph
    executable: Executable
    records: list[Record] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    fallbacks: list[Fallback] = field(default_factory=list)
    limits: Limits = field(default_factory=Limits)

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs of tensors that fit the inputs' types. Raises ArgumentValueError for sizes outside the limits."""
        if self.limits:
            self.limits.check(bind_inputs(self.graph, inputs))
        return self.executable.run(inputs)

    @property
    def legal_digest(self) -> str:
        return hashlib.sha256(str(self.legal).encode()).hexdigest()


def legalise(graph: Graph, settings: Settings) -> tuple[Graph, list[Record], list[Fallback]]:
    """What the backend is given: prepared, tuned, decomposed, checked. Raises CompileError naming op, location and
    reason where the backend cannot take a node and `fallback` is "error"."""
    backend, records = settings.backend, []
    graph = backend.prepare(graph)
    for p in (*settings.tuning_passes, Legalise(backend, settings.fallback)):
        graph, record = run_pass(p, graph)
        record.phase = backend.name
        records.append(record)
    left = fallbacks(graph, backend) if settings.fallback == "reference" else []
    return graph, records, left


def build(
    graph: Graph,
    settings: Settings,
    step: Step = lambda name: None,
    limits: Limits | None = None,
    adapt: Callable[[Graph], Graph] = lambda after: after,
) -> Program:
    """Run the pipeline, `adapt` what comes of it, legalise and lower. Raises CompileError."""
    start = time.perf_counter()
    graph.verify()
    dump = None if settings.dump is None else Dump(settings.dump, graph)
    after, records = settings.pipeline.run(graph, dump=dump, progress=step)
    after = adapt(after)
    seconds = {"passes": time.perf_counter() - start}
    program = finish(after, settings, step)
    program.records[:0] = records
    program.limits = limits or Limits()
    program.seconds = {**seconds, **program.seconds}
    if dump is not None:
        dump.add(program.records[-1], after, program.legal)
    return program


def run_passes(graph: Graph, settings: Settings, step: Step = lambda name: None) -> tuple[Graph, list[Record]]:
    """The graph after the target-independent pipeline."""
    graph.verify()
    return settings.pipeline.run(graph, progress=step)


def finish(after: Graph, settings: Settings, step: Step = lambda name: None) -> Program:
    """Legalise and lower a graph that has been through the pipeline."""
    start = time.perf_counter()
    step("legalise")
    legal, records, left = legalise(after, settings)
    seconds = {"legalise": time.perf_counter() - start}

    start = time.perf_counter()
    step(f"lower to {settings.backend.name}")
    executable = lower(legal, settings, left)
    seconds["lower"] = time.perf_counter() - start
    return Program(after, legal, executable, records, seconds, left)


def lower(legal: Graph, settings: Settings, left: list[Fallback], folder: Path | None = None) -> Executable:
    """An executable of a legalised graph, from saved backend artefacts where there is a `folder`."""
    backend = settings.backend
    try:
        if left:
            return PartitionedExecutable(legal, backend, settings.threads, folder, settings.options)
        if folder is not None:
            return backend.load(legal, folder, threads=settings.threads, options=settings.options)
        return backend.compile(legal, threads=settings.threads, options=settings.options)
    except (CompileError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as e:  # whatever a backend from outside raises
        raise CompileError(
            f"{backend.name} failed to take the program: {type(e).__name__}: {e}",
            code="lowering",
            hint="this is a fault of the backend's lowering; backend='reference' runs the program meanwhile",
        ) from e
