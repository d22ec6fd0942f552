"""The table of lowerings: torch op name → function that builds IR nodes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

Lower = Callable[..., Any]

LOWERINGS: dict[str, Lower] = {}
PARAMETERS: dict[str, tuple[str, ...]] = {}


def lowers(*names: str) -> Callable[[Lower], Lower]:
    """Register a lowering for ops such as "add.Tensor" (namespace aten) or "ns::op.overload".

    The function takes the lowering context and, by name, the schema arguments it needs: IR Values for
    tensors, `int | Dim` for sizes, Python constants for the rest, schema defaults filled in. It returns a
    Value, or a list of Values for an op with several results.
    """

    def register(fn: Lower) -> Lower:
        parameters = tuple(inspect.signature(fn).parameters)[1:]
        for name in names:
            full = name if "::" in name else f"aten::{name}"
            LOWERINGS[full] = fn
            PARAMETERS[full] = parameters
        return fn

    return register


def op_name(target: Any) -> str:
    """`aten::add.Tensor` for torch.ops.aten.add.Tensor; "default" overloads carry no suffix."""
    name = target._schema.name
    overload = target._schema.overload_name
    return f"{name}.{overload}" if overload else name
