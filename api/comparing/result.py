"""What a comparison found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moec.comparing.nodes import NodeResult
from moec.comparing.routing import RoutingFlip
from moec.difference import Difference
from moec.ir import CompileError, DType, Graph, Node


@dataclass(frozen=True)
class OutputResult:
    """One output of one backend against the first backend's. `judged`: else it is for information, and the backend's
    nodes are judged one by one."""

    backend: str
    output: str
    difference: Difference
    judged: bool = True


@dataclass(frozen=True)
class Divergence:
    """The node that first computes something out of tolerance, in the order of the reference's graph.

    `isolated`: whether it does so on the reference's own operands, so that it is itself to blame; else it is the first
    whose value differs end to end. `case`: the node as a graph, and its operands in the reference. `tuning`: where the
    backend computes the graph rightly but for its own tuning passes, those that made the node (which then is one of the
    tuned program) or, `meaning`, the one after which the program is another, in the reference too.
    """

    backend: str
    node: Node
    location: str
    error: float
    tolerance: float
    why: str
    isolated: bool = False
    case: tuple[Graph, tuple[torch.Tensor, ...]] | None = field(default=None, repr=False, compare=False)
    tuning: str = ""
    meaning: bool = False

    @property
    def module(self) -> str:
        """Module path in the model, "" where it is not known."""
        return self.node.location.module

    @property
    def layer(self) -> int | None:
        """The number in the module path (`layers.3.mlp` → 3)."""
        return self.node.location.layer

    @property
    def file(self) -> str:
        return self.node.location.frames[0].file if self.node.location else ""

    @property
    def line(self) -> int:
        return self.node.location.frames[0].line if self.node.location else 0

    def __str__(self) -> str:
        how = "on the reference's own operands" if self.isolated else "end to end"
        layer = "" if self.layer is None else f"layer {self.layer}, "
        return (
            f"{self.backend} first diverges at {self.node.op} ({layer}{self.location}): error {self.error:.3g}, "
            f"tolerance {self.tolerance:.3g} ({self.why}), {how}{self._tuned()}"
        )

    def _tuned(self) -> str:
        if not self.tuning:
            return ""
        if self.meaning:
            return f"; its tuning pass {self.tuning} changes the meaning, without it the program is right"
        frames = self.node.location.frames
        parts = f", made of {', '.join(map(str, frames))}" if len(frames) > 1 else ""
        return f"; a node of the program as tuned by {self.tuning}{parts}, without which it is right"


@dataclass(eq=False)
class Comparison:
    """What `moec.compare` found.

    `outputs` holds a row per backend and output; `values` a row per backend and value inside that both graphs have (of
    a program without the backend's tuning passes under the name "NAME untuned");
    `nodes` a row per backend and node where nodes were compared in isolation; `routing_flips` the tokens that chose
    other experts. `fallbacks`: nodes that ran in the reference instead, by backend; `peak_bytes`: the largest resident
    memory of each backend that ran in a process of its own; `notes`: what else is worth knowing.
    """

    reference: str
    isolated: bool
    outputs: list[OutputResult] = field(default_factory=list)
    values: list[NodeResult] = field(default_factory=list)
    nodes: list[NodeResult] = field(default_factory=list)
    routing_flips: list[RoutingFlip] = field(default_factory=list)
    first_divergence: Divergence | None = None
    fallbacks: dict[str, int] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything judged is in tolerance: nodes by themselves, outputs that are not for information, values
        inside; and every routing flip is a near tie."""
        judged: list[Any] = [*self.nodes, *self.values, *(o for o in self.outputs if o.judged)]
        return all(_in_tolerance(row) for row in judged) and all(f.near_tie for f in self.routing_flips)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: everything but the graphs."""
        first = self.first_divergence
        return {
            "ok": self.ok,
            "reference": self.reference,
            "isolated": self.isolated,
            "outputs": [asdict(o) for o in self.outputs],
            "values": [v.to_dict() for v in self.values],
            "nodes": [n.to_dict() for n in self.nodes],
            "routing_flips": [asdict(f) for f in self.routing_flips],
            "first_divergence": None if first is None else divergence_dict(first),
            "fallbacks": dict(self.fallbacks),
            "peak_bytes": dict(self.peak_bytes),
            "notes": list(self.notes),
        }

    def save_repro(self, folder: str | Path) -> Path:
        """Write the first divergent node as a graph of its own with its operands (`node.ir`, `node.safetensors`), the
        comparison (`comparison.txt`, `comparison.json`) and how to see it again (in node.ir) to a folder. Returns the
        folder. Raises CompileError where nothing diverges."""
        from moec.comparing.repro import save

        if self.first_divergence is None:
            raise CompileError("nothing diverges, so there is nothing to reproduce", code="compare")
        return save(self, self.first_divergence, Path(folder))

    def __str__(self) -> str:
        from moec.comparing.table import render

        return render(self)


def dtype_note(backend: str, output: str, expected: torch.Tensor, got: torch.Tensor) -> str:
    """What a comparison says of two tensors that differ in their type, and may agree in their values."""
    return f"{backend}: output {output!r} is {DType.of(got.dtype)}, the reference's {DType.of(expected.dtype)}"


def _in_tolerance(row: OutputResult | NodeResult) -> bool:
    return row.ok if isinstance(row, NodeResult) else row.difference.ok


def divergence_dict(d: Divergence) -> Mapping[str, Any]:
    """A divergence as plain data."""
    return {
        "backend": d.backend, "op": d.node.op, "layer": d.layer, "module": d.module, "file": d.file, "line": d.line,
        "error": d.error, "tolerance": d.tolerance, "why": d.why, "isolated": d.isolated,
        "tuning": d.tuning, "meaning": d.meaning,
    }  # fmt: skip
