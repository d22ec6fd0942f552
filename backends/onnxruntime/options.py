"""What a caller can choose about the lowering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from moec.ir import ArgumentValueError

EXPERTS = ("auto", "unrolled", "moe", "loop")


@dataclass(frozen=True)
class Options:
    """`portable`: standard ONNX operators only. `experts`: the form of `moe.experts`; "auto" chooses by the
    number of experts (see experts.choose)."""

    portable: bool = False
    experts: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.portable, bool):
            raise ArgumentValueError(f"option portable={self.portable!r} is not True or False", code="options")
        if self.experts not in EXPERTS:
            raise ArgumentValueError(
                f"option experts={self.experts!r}", code="options", hint=f"one of {', '.join(EXPERTS)}"
            )
        if self.portable and self.experts == "moe":
            raise ArgumentValueError("experts='moe' is not a standard operator", code="options", hint="portable=False")

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
