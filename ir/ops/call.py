"""`call`: one graph called by another."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from moec.ir.dims import Dim
from moec.ir.errors import require
from moec.ir.opdef import Attr, Operands, op
from moec.ir.types import TensorType


@op("call.graph", results=None)
class CallGraph:
    """Results of running the function `callee` on the operands. `dims` binds the function's dimension
    symbols: pairs of (name, size in the caller)."""

    args: Operands
    callee: Attr[str]
    dims: Attr[tuple] = ()

    functions: ClassVar[Mapping[str, Any]] = MappingProxyType({})  # graphs by name; the verifier and interpreter set it

    def infer(self) -> tuple[TensorType, ...]:
        require(self.callee in self.functions, f"no function {self.callee!r}")
        fn = self.functions[self.callee]
        binding = dict(self.dims)
        require(
            len(self.args) == len(fn.inputs), f"{self.callee!r} takes {len(fn.inputs)} values, got {len(self.args)}"
        )
        for v, got in zip(fn.inputs, self.args, strict=True):
            want = _substitute(v.type, binding)
            require(want == got, f"input {v.name!r} of {self.callee!r} is {want}, got {got}")
        return tuple(_substitute(v.type, binding) for v in fn.outputs)

    def reference(self) -> tuple[torch.Tensor, ...]:
        from moec.ir.interpreter import run

        return tuple(run(self.functions[self.callee], self.args, functions=self.functions))


def _substitute(type: TensorType, binding: dict[str, int | Dim]) -> TensorType:
    return type.with_shape([s.substitute(binding) if isinstance(s, Dim) else s for s in type.shape])
