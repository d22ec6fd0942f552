"""The table of imports: ONNX operator → function that builds IR nodes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

Import = Callable[..., Any]

MICROSOFT = "com.microsoft"

# (domain, operator) → [(first opset, function, names of the attributes it takes)], oldest first
IMPORTS: dict[tuple[str, str], list[tuple[int, Import, tuple[str, ...]]]] = {}


def imports(*names: str, since: int = 1, domain: str = "") -> Callable[[Import], Import]:
    """Register the import of operators from opset `since` on, up to that of a later registration.

    The function takes the context, the operands in order (IR Values, None for absent ones) and, by name, the attributes
    that it knows (the schema's defaults filled in, None where there is none). It returns a Value, or a list of Values
    for an operator with several results; what it cannot express it refuses with `c.refuse(reason)`, and the operator
    comes in as an `extern` op. An operator that has an attribute which the function does not take comes in so as well.
    """

    def register(fn: Import) -> Import:
        taken = tuple(
            n for n, p in inspect.signature(fn).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY
        )
        for name in names:
            versions = IMPORTS.setdefault((domain, name), [])
            versions.append((since, fn, taken))
            versions.sort(key=lambda v: v[0])
        return fn

    return register


def find(domain: str, op_type: str, opset: int) -> tuple[Import, tuple[str, ...]] | None:
    """The import of an operator in an opset, with the attributes it takes."""
    fitting = [v for v in IMPORTS.get((domain, op_type), []) if v[0] <= opset]
    return fitting[-1][1:] if fitting else None
