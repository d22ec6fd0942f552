"""Pipelines: passes in order, verified, timed and recorded; the default one is a readable list below."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from moec.ir import ArgumentValueError, CompileError, Graph, Placement, Quantization
from moec.passes.base import Pass, Record, active_record
from moec.passes.canonicalise import Canonicalise
from moec.passes.cleanup import CommonSubexpressions, DeadCode, FoldConstants
from moec.passes.fuse_attention import FuseAttention
from moec.passes.fuse_mlp import FuseMLP
from moec.passes.fuse_norm import FuseNorm
from moec.passes.fuse_rope import FuseRoPE
from moec.passes.place import PlaceExperts
from moec.passes.quantize import QuantizeFP8
from moec.passes.raise_dense import RaiseUnrolledExperts
from moec.passes.raise_moe import RaiseMoE


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. Editing returns a new pipeline; passes are named by `Pass.name`."""

    passes: tuple[Pass, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", tuple(self.passes))
        for p in self.passes:
            if not isinstance(p, Pass):
                hint = f"write {p.__name__}()" if isinstance(p, type) and issubclass(p, Pass) else None
                raise ArgumentValueError(f"{p!r} is not a Pass", code="pipeline", hint=hint)

    @property
    def names(self) -> list[str]:
        return [p.name for p in self.passes]

    def _index(self, name: str) -> int:
        if name not in self.names:
            near = difflib.get_close_matches(name, self.names, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"passes: {', '.join(self.names)}"
            raise ArgumentValueError(f"no pass {name!r} in the pipeline", code="pipeline", hint=hint)
        return self.names.index(name)

    def insert_before(self, name: str, *passes: Pass) -> Pipeline:
        i = self._index(name)
        return replace(self, passes=(*self.passes[:i], *passes, *self.passes[i:]))

    def insert_after(self, name: str, *passes: Pass) -> Pipeline:
        i = self._index(name) + 1
        return replace(self, passes=(*self.passes[:i], *passes, *self.passes[i:]))

    def replace_pass(self, name: str, *passes: Pass) -> Pipeline:
        i = self._index(name)
        return replace(self, passes=(*self.passes[:i], *passes, *self.passes[i + 1 :]))

    def drop(self, name: str) -> Pipeline:
        """Without every pass of that name."""
        self._index(name)
        return replace(self, passes=tuple(p for p in self.passes if p.name != name))

    def append(self, *passes: Pass) -> Pipeline:
        return replace(self, passes=(*self.passes, *passes))

    def run(
        self, graph: Graph, *, dump: str | Path | None = None, progress: Callable[[str], None] | None = None
    ) -> tuple[Graph, list[Record]]:
        """Run all passes, verifying after each. `dump` is a folder for numbered `.ir` files; `progress` is
        called with each pass's name. Raises CompileError naming the pass that failed."""
        folder = Path(dump) if dump is not None else None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "00_input.ir").write_text(str(graph))
        records = []
        for i, p in enumerate(self.passes, 1):
            if progress:
                progress(p.name)
            graph, record = run_pass(p, graph)
            records.append(record)
            if folder is not None:
                (folder / f"{i:02d}_{p.name}.ir").write_text(str(graph))
        return graph, records


def run_pass(p: Pass, graph: Graph) -> tuple[Graph, Record]:
    """One pass with its record, its result verified. Raises CompileError naming the pass."""
    record = Record(p.name, nodes_before=len(graph))
    token = active_record.set(record)
    start = time.perf_counter()
    try:
        result = p.run(graph)
        if not isinstance(result, Graph):
            raise CompileError(
                f"returned {type(result).__name__}, not a Graph", code="pass", hint="is a return missing in run()?"
            )
        result.verify()
    except CompileError as e:
        e.args = (f"pass {p.name}: {e.message}",)
        e.message = e.args[0]
        raise
    finally:
        active_record.reset(token)
    record.seconds = time.perf_counter() - start
    record.nodes_after = len(result)
    return result, record


def default_pipeline(quantize: Quantization | str | None = None, placement: Placement | None = None) -> Pipeline:
    """What `moec.compile` runs with passes=None."""
    quantization = Quantization.of(quantize)
    passes: list[Pass] = [
        DeadCode(),
        Canonicalise(),
        # single numbers only: the rules below look for masks, tables and transposed weights as they were written
        FoldConstants(limit=8),
        CommonSubexpressions(),
        FuseNorm(),
        FuseRoPE(),
        FuseAttention(),
        RaiseMoE(),
        RaiseUnrolledExperts(),
        FuseMLP(),
        FoldConstants(),
        Canonicalise(),
        CommonSubexpressions(),
        DeadCode(),
    ]
    if quantization is not None:
        passes.append(QuantizeFP8(quantization))
    if placement is not None:
        passes.append(PlaceExperts(placement))
    return Pipeline(tuple(passes))


def build_pipeline(
    passes: Pipeline | Iterable[Pass] | None,
    quantize: Quantization | str | None = None,
    placement: Placement | None = None,
) -> Pipeline:
    """From `moec.compile`'s arguments: a list is appended to the default pipeline, a Pipeline replaces it."""
    if isinstance(passes, Pipeline):
        if quantize is not None or placement is not None:
            raise ArgumentValueError(
                "quantize= and placement= belong to the default pipeline; a Pipeline of your own holds its passes",
                code="pipeline",
                hint="moec.passes.default_pipeline(quantize=…, placement=…).append(…)",
            )
        return passes
    return default_pipeline(quantize, placement).append(*(passes or ()))
