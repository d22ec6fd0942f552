"""Passes and analyses: frozen dataclasses over graphs."""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moec.ir import Graph, Location


@dataclass(frozen=True)
class Refusal:
    """A rule that matched and declined in `when`, or that only another use of an inner value stopped.
    `source` is the rule's file:line."""

    rule: str
    reason: str
    location: Location
    source: str = ""

    def __str__(self) -> str:
        return f"rule {self.rule} ({self.source}) refused at {self.location.describe()}: {self.reason}"


@dataclass
class Record:
    """What a pass did; the pipeline makes one per pass. `result` is an analysis's, `unfired` tells why a single rule
    was applied nowhere."""

    name: str
    phase: str = ""
    seconds: float = 0.0
    nodes_before: int = 0
    nodes_after: int = 0
    fired: dict[str, int] = field(default_factory=dict)
    refused: list[Refusal] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    result: Any = None
    unfired: str = ""

    def to_dict(self) -> dict[str, Any]:
        refused: dict[str, int] = {}
        for r in self.refused:
            key = f"{r.rule} ({Path(r.source).name}): {r.reason}"
            refused[key] = refused.get(key, 0) + 1
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("refused", "result")}
        return {**plain, "refused": refused} | ({} if self.result is None else {"result": str(self.result)})


# the record that rules and passes write to while the pipeline runs them
active_record: ContextVar[Record | None] = ContextVar("active_record", default=None)


def report(**figures: Any) -> None:
    """Add figures of the running pass to its record (nothing where no pipeline runs)."""
    record = active_record.get()
    if record is not None:
        record.figures.update(figures)


# field names whose capitals do not mark words
_WORDS = {"SwiGLU": "Swiglu", "GeGLU": "Geglu", "ReGLU": "Reglu", "RoPE": "Rope", "MoE": "Moe"}


def snake_case(name: str) -> str:
    """FuseSwiGLU → fuse_swiglu, QuantizeWeights → quantize_weights."""
    for word, plain in _WORDS.items():
        name = name.replace(word, plain)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


@dataclass(frozen=True)
class Pass(ABC):
    """Graph → Graph. `run` never changes its input: it clones the structure (weights are shared).
    Options are the dataclass fields."""

    @property
    def name(self) -> str:
        return snake_case(type(self).__name__)

    @abstractmethod
    def run(self, graph: Graph) -> Graph:
        """The rewritten graph. Raises CompileError."""


@dataclass(frozen=True)
class Analysis(ABC):
    """Graph → any result, without changing it."""

    @property
    def name(self) -> str:
        return snake_case(type(self).__name__)

    @abstractmethod
    def run(self, graph: Graph) -> Any:
        """The result."""
