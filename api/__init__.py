"""moec compiles Mixture-of-Experts transformers.

    compiled = moec.compile(model, (input_ids,), backend="onnxruntime", quantize="fp8")
    logits = compiled(input_ids)

Names are loaded when first used: `import moec` costs nothing but itself, and no part of the package pays for
another that it does not use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moec import passes, testing
    from moec.artifact import load
    from moec.bisection import bisect
    from moec.comparing import Comparison, compare
    from moec.compiled import CompiledModel
    from moec.compiler import compile, trace
    from moec.culprit import Culprit
    from moec.generation import UNSET
    from moec.ir import (
        ArgumentTypeError,
        ArgumentValueError,
        ArtifactError,
        CompileError,
        Dim,
        Graph,
        Mesh,
        Placement,
        Quantization,
        parse,
    )
    from moec.passes import place_experts
    from moec.passes.rewriting.explain import explain
    from moec.report import Report

__version__ = "0.1.0"
__all__ = [
    "UNSET",
    "ArgumentTypeError",
    "ArgumentValueError",
    "ArtifactError",
    "Comparison",
    "CompileError",
    "CompiledModel",
    "Culprit",
    "Dim",
    "Graph",
    "Mesh",
    "Placement",
    "Quantization",
    "Report",
    "bisect",
    "compare",
    "compile",
    "explain",
    "load",
    "parse",
    "passes",
    "place_experts",
    "testing",
    "trace",
]

_HOMES = {
    "UNSET": "moec.generation",
    "Comparison": "moec.comparing",
    "CompiledModel": "moec.compiled",
    "Culprit": "moec.culprit",
    "Report": "moec.report",
    "bisect": "moec.bisection",
    "compare": "moec.comparing",
    "compile": "moec.compiler",
    "explain": "moec.passes",
    "load": "moec.artifact",
    "place_experts": "moec.passes",
    "trace": "moec.compiler",
}


def __getattr__(name: str) -> Any:
    if name in ("backends", "frontend", "ir", "models", "passes", "testing"):
        return importlib.import_module(f"moec.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'moec' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "moec.ir")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
