"""Building nodes: `b.silu(x)`, `b.mul(x, 2.0)`, `b.cast(x, dtype="i64")`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moec.ir.errors import CompileError
from moec.ir.graph import Graph, Node, Value
from moec.ir.location import Location
from moec.ir.opdef import OpDef, known, lookup
from moec.ir.types import DType, TensorType
from moec.ir.weight import ComputedSource, Weight


class Builder:
    """Creates nodes in `graph`, at the end or before `before`; every op is a method under its bare or
    (with `_` for the dot, where ambiguous) full name. Operands come first in declared order or by name,
    attributes by name. A Python number among the operands becomes a scalar constant of the dtype of the
    first value operand. Returns the result Value, or a tuple where the op has several."""

    def __init__(self, graph: Graph, *, before: Node | None = None, location: Location | None = None):
        self.graph = graph
        self.before = before
        self.location = location or Location()
        self.created: list[Node] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        opdef = self._resolve(name)

        def build(*operands: Any, **fields: Any) -> Any:
            return self.op(opdef, operands, fields)

        return build

    @staticmethod
    def _resolve(name: str) -> OpDef:
        # Python keywords and builtins that are op names take a trailing underscore: b.and_(x, y)
        stem = name.rstrip("_")
        return known(stem) or known(stem.replace("_", ".", 1)) or lookup(stem)

    def op(self, op: str | OpDef, operands: Sequence[Any] = (), fields: dict[str, Any] | None = None) -> Any:
        """Create one node by name. Raises CompileError on any misuse."""
        opdef = op if isinstance(op, OpDef) else lookup(op)
        values = list(operands)
        attrs = dict(fields or {})
        names = [n for n, _ in opdef.operands]
        for i, name in enumerate(names):
            if name in attrs:
                values += [None] * (i + 1 - len(values))
                if values[i] is not None:
                    raise CompileError(f"{opdef.name}: operand {name!r} is given twice", code="arity")
                values[i] = attrs.pop(name)
        flat: list[Any] = []
        for v in values:
            flat += v if isinstance(v, list | tuple) else [v]
        like = next((v for v in flat if isinstance(v, Value)), None)
        node = self.graph.create(
            opdef, [self._value(v, like, opdef) for v in flat], attrs, location=self.location, before=self.before
        )
        self.created.append(node)
        return node.results[0] if len(node.results) == 1 else node.results

    def _value(self, v: Any, like: Value | None, opdef: OpDef) -> Value | None:
        if v is None or isinstance(v, Value):
            return v
        if isinstance(v, bool | int | float):
            return self.constant_like(v, like)
        hint = "b.weight(name, tensor) makes it a weight of the graph" if isinstance(v, torch.Tensor) else None
        raise CompileError(
            f"{opdef.name}: an operand must be a Value or number, got {type(v).__name__}", code="arity", hint=hint
        )

    def weight(
        self,
        name: str,
        data: torch.Tensor | Callable[[], torch.Tensor] | ComputedSource,
        type: TensorType | None = None,
    ) -> Value:
        """A new weight named `name` (with a number after it where that is taken). `data` is a tensor, or with
        `type` a function that computes it when it is first needed: `b.weight("w", lambda: f(m.w.weight.load()),
        m.w.type)`, or a ComputedSource of such a function."""
        name = self.graph.fresh_weight_name(name)
        if isinstance(data, torch.Tensor):
            return self.graph.add_weight(Weight.of(name, data))
        if type is None:
            raise CompileError(f"weight {name!r}: a computed weight needs its type", code="weight")
        source = data if isinstance(data, ComputedSource) else ComputedSource(data)
        return self.graph.add_weight(Weight(name, type, source))

    def constant_like(self, value: bool | int | float, like: Value | None) -> Value:
        """A scalar constant of `like`'s dtype (f32, i64 or bool without one)."""
        default = DType.BOOL if isinstance(value, bool) else DType.I64 if isinstance(value, int) else DType.F32
        dtype = like.dtype if like is not None else default
        return self.const(value, dtype)

    def const(self, value: Any, dtype: DType | str = DType.F32, shape: Sequence[int] = ()) -> Value:
        """A `tensor.constant`: `value` is a number, or a flat sequence for a non-empty `shape`."""
        flat = tuple(value) if isinstance(value, list | tuple) else (value,)
        return self.op("tensor.constant", (), {"value": flat, "type": TensorType(DType.of(dtype), tuple(shape))})
