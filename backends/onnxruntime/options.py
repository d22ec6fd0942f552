"""What a caller can choose about the lowering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from moec.ir import ArgumentValueError

EXPERTS = ("auto", "unrolled", "if", "moe", "loop", "dense")
MEMORY = ("fast", "fp8", "mapped")


@dataclass(frozen=True)
class Options:
    """`portable`: standard ONNX operators only. `experts`: the form of `moe.experts`; "auto" takes the
    cheapest (see expert_forms.choose). `memory`: "fast" folds weights to f32 once, at load, and holds them in the
    layouts that its kernels multiply fastest; "fp8" keeps them as they are stored, in 8 or 16 bits, and widens each
    where it is used, in every run; "mapped" reads them in f32 from a memory-mapped file and copies none. `huge_pages`:
    ask Linux for huge pages for what the session holds (see huge_pages.py)."""

    portable: bool = False
    experts: str = "auto"
    memory: str = "fast"
    huge_pages: bool = True

    def __post_init__(self) -> None:
        for name in ("portable", "huge_pages"):
            if not isinstance(value := getattr(self, name), bool):
                raise ArgumentValueError(f"option {name}={value!r} is not True or False", code="options")
        if self.experts not in EXPERTS:
            raise ArgumentValueError(
                f"option experts={self.experts!r}", code="options", hint=f"one of {', '.join(EXPERTS)}"
            )
        if self.memory not in MEMORY:
            raise ArgumentValueError(
                f"option memory={self.memory!r}", code="options", hint=f"one of {', '.join(MEMORY)}"
            )
        if self.memory == "fp8" and self.experts not in ("auto", "unrolled", "if"):
            raise ArgumentValueError(
                f"experts={self.experts!r} needs all experts in f32 at once, memory='fp8' keeps them in 8 bits",
                code="options",
                hint="experts='if'",
            )
        if self.portable and self.experts == "moe":
            raise ArgumentValueError("experts='moe' is not a standard operator", code="options", hint="portable=False")

    @property
    def compact(self) -> bool:
        """Whether weights stay as they are stored."""
        return self.memory == "fp8"

    @property
    def mapped(self) -> bool:
        """Whether weights are read where the file is mapped, in f32."""
        return self.memory == "mapped"

    @staticmethod
    def of(options: Mapping[str, Any] | None) -> Options:
        """Raises ArgumentValueError on an unknown name."""
        known = [f.name for f in fields(Options)]
        for name in options or {}:
            if name not in known:
                raise ArgumentValueError(
                    f"the onnxruntime backend has no option {name!r}", code="options", hint=f"it has {', '.join(known)}"
                )
        return Options(**(options or {}))
