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
        binding = self._binding(fn)
        require(
            len(self.args) == len(fn.inputs), f"{self.callee!r} takes {len(fn.inputs)} values, got {len(self.args)}"
        )
        for v, got in zip(fn.inputs, self.args, strict=True):
            want = _substitute(v.type, binding)
            require(want == got, f"input {v.name!r} of {self.callee!r} is {want}, got {got}")
        return tuple(_substitute(v.type, binding) for v in fn.outputs)

    def _binding(self, fn: Any) -> dict[str, int | Dim]:
        for pair in self.dims:
            ok = isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)
            require(ok and isinstance(pair[1], int | Dim), f"dims holds {pair!r}, not a pair of name and size")
        binding = dict(self.dims)
        require(len(binding) == len(self.dims), f"dims names a symbol twice: {[n for n, _ in self.dims]}")
        missing = sorted(fn.symbols - binding.keys())
        require(not missing, f"dims gives no size for {missing} of {self.callee!r}")
        return binding

    def reference(self) -> tuple[torch.Tensor, ...]:
        from moec.ir.interpreter import run

        return tuple(run(self.functions[self.callee], self.args, functions=self.functions))


def _substitute(type: TensorType, binding: dict[str, int | Dim]) -> TensorType:
    return type.with_shape([s.substitute(binding) if isinstance(s, Dim) else s for s in type.shape])
