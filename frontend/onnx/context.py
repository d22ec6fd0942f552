"""What an import function works with: a builder, what is known of values while importing, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moec.frontend.context import Context, Size
from moec.frontend.onnx.assume import NOTHING, Fact, Needed
from moec.frontend.symbols import Symbols
from moec.ir import CompileError, Dim, DType, Graph, TensorType, Value, Weight
from moec.ir.arrays import OPAQUE, dtype_of, from_numpy
from moec.ir.ops.tensor import INLINE_LIMIT
from moec.ir.weight import TensorSource

# elements of integer tensors that are kept while importing: shapes, axes, indices
KNOWN_LIMIT = 4096


class ImportContext(Context):
    """Handed to every import function, see `registry.imports`."""

    def __init__(self, graph: Graph):
        super().__init__(graph, Symbols())
        self.opset = 0
        self.outputs = 1  # how many outputs the operator has, up to the last that is used
        self.arrays: dict[Value, np.ndarray] = {}
        self.sizes: dict[Value, tuple[Size, ...]] = {}  # elements of integer tensors of rank 0 and 1, symbols in them
        self.uniform: dict[Value, Any] = {}  # the number that every element is
        self.taken: set[str] = set()
        self.facts = NOTHING
        self.open: dict[Value, Fact] = {}  # conditions on sizes: what makes them true

    # -- what is known -------------------------------------------------------------------------------

    def array(self, v: Value | None) -> np.ndarray | None:
        """The elements of a value that is constant and small, else None."""
        return None if v is None else self.arrays.get(v)

    def elements(self, v: Value) -> tuple[Size, ...] | None:
        """The elements of an integer tensor of rank 0 or 1, where they are known as sizes."""
        if v in self.sizes:
            return self.sizes[v]
        a = self.arrays.get(v)
        return tuple(a.reshape(-1).tolist()) if a is not None and a.ndim <= 1 and a.dtype.kind in "iu" else None

    def ints(self, v: Value | None, what: str) -> tuple[int, ...] | None:
        """The elements of an operand that must be constant integers; None where it is absent."""
        if v is None:
            return None
        found = self.elements(v)
        if found is None or not all(isinstance(s, int) for s in found):
            raise self.refuse(f"{what} is not constant")
        return tuple(int(s) for s in found if isinstance(s, int))

    def scalar(self, v: Value | None, what: str) -> Any:
        """The element of an operand that must be a constant of one element; None where it is absent."""
        if v is None:
            return None
        a = self.array(v)
        if a is None or a.size != 1:
            raise self.refuse(f"{what} is not a constant number")
        return a.reshape(-1)[0].item()

    # -- making values -------------------------------------------------------------------------------

    def constant(self, array: Any, name: str = "constant") -> Value:
        """A value with these elements: inline where it is small, else a weight. Raises CompileError for element types
        that the IR does not have."""
        array = np.asarray(array)
        dtype = dtype_of(array)
        exact = not dtype.is_float or dtype in (DType.F32, DType.F64)
        if array.size <= INLINE_LIMIT and exact and dtype is not DType.C64 and dtype not in OPAQUE:
            v = self.b.const(array.reshape(-1).tolist(), dtype, array.shape)
        else:
            tensor = from_numpy(array)
            name = self.graph.fresh_weight_name(name)
            v = self.graph.add_weight(Weight(name, TensorType.of(tensor), TensorSource(tensor, name)))
        if array.size <= KNOWN_LIMIT:
            self.arrays[v] = array
        return v

    def of_sizes(self, sizes: Sequence[Size], *, scalar: bool = False) -> Value:
        """i64[n] (i64[] with `scalar`) of sizes."""
        if all(isinstance(s, int) for s in sizes):
            a = np.array(sizes, np.int64)
            return self.constant(a.reshape(()) if scalar else a)
        parts = [self.reshape(self.b.dim(value=s), () if scalar else (1,)) for s in sizes]
        v = self.concat(parts, 0)
        self.sizes[v] = tuple(sizes)
        return v

    def fresh(self, stem: str = "n") -> Dim:
        """A symbol that nothing in the graph has."""
        i = 0
        while f"{stem}{i}" in self.taken:
            i += 1
        self.taken.add(f"{stem}{i}")
        return Dim(f"{stem}{i}")

    def need(self, a: Size, b: Size) -> None:
        """Take for granted that two sizes are equal: without that the operator fails whenever it runs. Returns only
        where they are. Raises CompileError where they cannot be, or where their inputs do not show it."""
        inputs = {s for v in self.graph.inputs for s in v.type.symbols}
        for size, value in ((a, b), (b, a)):
            if a == b or not isinstance(size, Dim):
                continue
            more = value.symbols if isinstance(value, Dim) else frozenset()
            fact = Fact(size, value)
            fits = not more or (size.is_symbol and not size.symbols & more)
            if fits and fact not in self.facts.known and size.symbols | more <= inputs:
                raise Needed(fact)
        if a != b:
            raise self.refuse(f"needs {a} = {b}", code="type")

    # -- helpers --------------------------------------------------------------------------------------

    def norm_axis(self, axis: int, rank: int) -> int:
        """A non-negative axis. Raises CompileError where it is out of range."""
        if not -rank <= axis < rank:
            raise self.refuse(f"axis {axis} is out of range for rank {rank}", code="type")
        return axis % rank

    def floats(self, *values: Value | None) -> None:
        """Refuse anything but floats of one dtype."""
        kinds = {v.dtype for v in values if v is not None}
        if len(kinds) != 1 or not next(iter(kinds)).is_float or next(iter(kinds)).bits < 16:
            raise self.refuse(f"takes floats of one dtype here, got {', '.join(sorted(kinds))}")


def located_refusal(error: CompileError, op: str) -> str:
    """Why an operator did not become ops of our families."""
    return error.message.removeprefix(f"{op}: ")
