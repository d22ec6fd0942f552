"""ATen ops that stay themselves: `extern.aten_*`, for what our families cannot say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moec.frontend.context import Context
from moec.ir import Dim, DType, TensorType, Value, lookup
from moec.ir.ops.extern_aten import NAMES, attribute, op_of, overload

EXTERN = {f"aten::{name}": name for name in NAMES}
_KINDS = ("Tensor", "Optional[Tensor]", "List[Tensor]")


def lower_extern(c: Context, name: str, arguments: dict[str, Any], pair: Callable[[Any], Value | None]) -> list[Value]:
    """The op with its operands as they are, but a complex one, for which `pair` gives f32[…, 2] (None for any other);
    complex results are such pairs. Raises CompileError for attributes that the IR cannot hold."""
    torch_name = EXTERN[name]
    operands: list[Value | None] = []
    complex_at: list[int] = []
    attrs: dict[str, Any] = {}

    def operand(x: Any) -> None:
        both = pair(x)
        if both is not None:
            complex_at.append(len(operands))
        operands.append(x if x is None else both if both is not None else c.value(x))

    opdef = lookup(op_of(torch_name))
    for a in overload(torch_name)._schema.arguments:
        value = arguments.get(a.name)
        if str(a.type) == "List[Tensor]":
            for x in value or ():
                operand(x)
        elif str(a.type) in _KINDS:
            operand(value)
        elif a.name in opdef.attrs:
            attrs[a.name] = _attribute(c, value)
    outs = [t for t in (c.out if isinstance(c.out, list) else [c.out]) if isinstance(t, TensorType)]
    types = tuple(TensorType(DType.F32, (*t.shape, 2)) if t.dtype is DType.C64 else t for t in outs)
    results = c.b.op(opdef, operands, attrs | {"types": types, "complex": tuple(complex_at)})
    return [results] if isinstance(results, Value) else list(results)


def _attribute(c: Context, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_attribute(c, v) for v in value)
    if value is None or isinstance(value, bool | int | float | str | Dim):
        return value
    converted = attribute(value)
    if isinstance(converted, DType):
        return converted
    raise c.refuse(f"an argument of {type(value).__name__} has no form in the IR")
