"""Building the ONNX graph: nodes with names that lead back to the IR, shared constants, lazy weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import onnx_ir as onnx
import torch

from moec.backends.base import Backend
from moec.backends.onnxruntime.opsets import Requirement, attach, rename_values
from moec.backends.onnxruntime.options import Options
from moec.backends.onnxruntime.sizes import Sizes
from moec.backends.onnxruntime.types import FLOAT8, ONNX, carrier, numpy_type, onnx_type
from moec.backends.onnxruntime.weights import WeightReader, as_numpy
from moec.ir import CompileError, Dim, DType, Graph, Node, Value, Weight
from moec.ir.fp8 import E5M2
from moec.ir.literals import literal

MICROSOFT = "com.microsoft"
SAME = "moec.same"  # metadata of an If whose branches mean the same: the plain one
COMPACT = 1 << 14  # elements; smaller weights are not worth a cast in every run
PIECE = 1 << 21  # elements that are widened at once
Transform = Callable[[torch.Tensor], torch.Tensor]
Scale = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@contextmanager
def _quiet() -> Iterator[None]:
    """Within: onnx_ir does not warn that a body reads names which it does not define; they are connected afterwards."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _computed(x: Any) -> bool:
    """Whether there is a value that a node gives in it."""
    if isinstance(x, tuple):
        return any(_computed(part) for part in x)
    return isinstance(x, onnx.Value) and x.producer() is not None


def given(node: Node) -> tuple[Any, ...]:
    """IR operands, untyped: a lowering knows which of them are present."""
    return node.operands


class Emitter:
    """Collects ONNX nodes and initialisers for one graph, by the lowerings of `backend`. `memo` holds what several
    lowerings share."""

    def __init__(
        self, graph: Graph, options: Options, backend: Backend, opset: int | None = None, *, empty: bool = False
    ):
        self.graph = graph
        self.empty = empty  # whether axes may turn out to be empty, for which some operators have no meaning
        self.needed: set[Dim] = set()  # sizes that have to be 1 at least
        self.backend = backend
        self.options = options
        self.functions = graph.functions
        self.nodes: list[onnx.Node] = []
        self.initializers: dict[str, onnx.Value] = {}
        self.sources: dict[str, Node] = {}  # ONNX node name prefix → IR node
        self.memo: dict[Hashable, Any] = {}
        self.choices: dict[str, int] = {}  # which form of a lowering was taken, how often
        self.experts: list[dict[str, Any]] = []  # of each layer of experts: the form, its cost, the alternatives
        self.opset = opset  # what the model will be written in, where that is known already
        self.foreign: list[Requirement] = []  # operators that are what a user's ONNX model had
        self._foreign_nodes: set[onnx.Node] = set()
        self.sizes = Sizes(self)
        self.reader = WeightReader()
        self.resident: dict[str, tuple[int, int]] = {}  # of each weight: its bytes folded to f32, and as it is stored
        self.read_from: dict[
            str, tuple[tuple[Weight, ...], str]
        ] = {}  # of an initialiser: weights, and what is made of them
        self.others = False  # whether a lowering from outside of moec was used
        self._values: dict[Value, onnx.Value] = {}
        self._names: set[str] = set()
        self._numbers: dict[str, int] = {}  # last number given to a taken name
        self._scope = "graph"
        self._calls: list[str] = []

    # -- names ------------------------------------------------------------------------------------

    def unique(self, name: str) -> str:
        """`name`, or with a number where it is taken; ONNX reads an empty name as none."""
        candidate = name or "_"
        while candidate in self._names:
            self._numbers[name] = self._numbers.get(name, 0) + 1
            candidate = f"{name}_{self._numbers[name]}"
        self._names.add(candidate)
        return candidate

    @contextmanager
    def scope(self, node: Node, index: int) -> Iterator[None]:
        """Within: ONNX nodes are named `module/op_index:Kind`, so that an error can name the IR node."""
        module = node.location.module
        path = "/".join([*self._calls, *([module] if module else []), f"{node.op}_{index}"])
        before, self._scope = self._scope, path
        self.sources[path] = node
        try:
            yield
        finally:
            self._scope = before

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        self._calls.append(name)
        try:
            yield
        finally:
            self._calls.pop()

    # -- values -----------------------------------------------------------------------------------

    def bind(self, value: Value, emitted: onnx.Value) -> None:
        self._values[value] = emitted

    def emitted(self, value: Value) -> onnx.Value | None:
        """The ONNX value of an IR value that was computed, else None."""
        return self._values.get(value)

    def value(self, v: Value) -> onnx.Value:
        """The ONNX value of an IR value; a weight becomes an initialiser when first asked for."""
        if v.weight is not None:
            return self.weight(v)
        return self._values[v]

    def operands(self, node: Node) -> list[Any]:
        """ONNX values of all operands, None for absent ones."""
        return [None if v is None else self.value(v) for v in node.operands]

    def op(self, kind: str, *inputs: Any, outputs: int = 1, domain: str = "", **attrs: Any) -> Any:
        """Append a node; NumPy operands become constants, None an absent input. Returns its output, or a
        tuple of them where `outputs` is more than 1. `domain="com.microsoft"` for ONNX Runtime's own operators.
        Raises CompileError for an input that is neither."""
        for x in inputs:
            if x is not None and not isinstance(x, onnx.Value | np.ndarray | np.generic):
                raise CompileError(
                    f"an input of {kind} must be an ONNX value or a NumPy array, got {type(x).__name__} {x!r}",
                    code="lowering",
                    hint="e.operands(node) gives the values of the operands, e.scalar(number, dtype) a constant",
                )
        values = [self.constant(x) if isinstance(x, np.ndarray | np.generic) else x for x in inputs]
        node = onnx.node(
            kind, values, attrs, domain=domain, num_outputs=outputs, name=self.unique(f"{self._scope}:{kind}")
        )
        for i, out in enumerate(node.outputs):
            out.name = node.name if outputs == 1 else f"{node.name}.{i}"
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def operator(
        self, proto: Any, known: dict[str, onnx.Value], outside: dict[str, onnx.Value]
    ) -> dict[str, onnx.Value]:
        """Append a node as it stands (a NodeProto) whose inputs are called as in `known`; its bodies read the values
        of `outside`. Returns its outputs by their names."""
        with _quiet():
            attributes = [onnx.serde.deserialize_attribute(a) for a in proto.attribute]
        for a in attributes:
            if a.type == onnx.AttributeType.GRAPH:
                attach(a.as_graph(), outside)
                rename_values(a.as_graph(), self.unique(f"{self._scope}:{proto.op_type}.{a.name}"))
        has_body = any(a.type == onnx.AttributeType.GRAPH for a in attributes)
        name = self.unique(f"{self._scope}:{proto.op_type}")
        node = onnx.Node(
            proto.domain,
            proto.op_type,
            [known[i] if i else None for i in proto.input],
            attributes,
            num_outputs=len(proto.output),
            name=name,
        )
        for i, (given_name, out) in enumerate(zip(proto.output, node.outputs, strict=True)):
            # ONNX Runtime crashes in loops without a name for every state
            out.name = f"{name}.{i}" if given_name or has_body else ""
        self.nodes.append(node)
        self._foreign_nodes.add(node)
        return {o: v for o, v in zip(proto.output, node.outputs, strict=True) if o}

    @property
    def native(self) -> list[onnx.Node]:
        """The nodes that our own lowerings made."""
        return [n for n in self.nodes if n not in self._foreign_nodes]

    @contextmanager
    def body(self) -> Iterator[list[onnx.Node]]:
        """Within: nodes go to the yielded list (the body of a Loop or a branch). What is shared of it is forgotten
        afterwards, as nobody outside can read it: sizes that others use too are better made before."""
        before, self.nodes = self.nodes, []
        outside = [(memo, len(memo)) for memo in (self.memo, self.sizes.cache)]
        try:
            yield self.nodes
        finally:
            self.nodes = before
            for memo, count in outside:  # there are thousands of bodies: only the new entries are looked at
                for key in list(islice(reversed(memo), len(memo) - count)):
                    if any(_computed(x) for x in (key, memo[key])):
                        del memo[key]

    def either(
        self,
        condition: onnx.Value,
        then: Callable[[], onnx.Value],
        otherwise: Callable[[], onnx.Value],
        dtype: DType,
        *,
        plain: str = "else_branch",
    ) -> onnx.Value:
        """One of two ways to compute a value of `dtype`, chosen at run time. `plain` is the branch that the other
        is faster than; the node says so, so that a reader of the model need not know both."""
        branches = []
        for make in (then, otherwise):
            with self.body() as nodes:
                result = make()
            result.type = onnx.TensorType(onnx_type(dtype))
            branches.append(onnx.Graph([], [result], nodes=nodes, name=self.unique(f"{self._scope}:branch")))
        value: onnx.Value = self.op("If", condition, then_branch=branches[0], else_branch=branches[1])
        node = value.producer()
        assert node is not None
        node.metadata_props[SAME] = plain
        return value

    def constant(self, array: np.ndarray | np.generic) -> onnx.Value:
        """An initialiser; equal constants are shared."""
        array = np.asarray(array)
        key = ("constant", array.dtype.str, array.shape, array.tobytes())
        if key not in self.memo:
            tensor = onnx.tensor(array, name=self.unique(f"constant_{len(self.initializers)}"))
            self.memo[key] = self._initializer(tensor)
        return self.memo[key]

    def product(
        self, x: onnx.Value, shape: tuple[int, int], weight: Callable[[torch.Tensor | None], onnx.Value]
    ) -> onnx.Value:
        """x [..., K] times the transpose of a stored weight [N, K]; `weight(rows)` gives these rows, or all, as
        [K, rows]. Where weights are widened in every run it goes piece by piece, so that little is in f32 at once."""
        n, k = shape
        count = min(-(-n * k // PIECE), n) if self.options.compact else 1
        if count <= 1:
            return self.op("MatMul", x, weight(None))
        rows = torch.arange(n).tensor_split(count)
        return self.op("Concat", *[self.op("MatMul", x, weight(part)) for part in rows], axis=-1)

    def scalar(self, value: Any, dtype: DType) -> onnx.Value:
        """A 0-d constant of the carrier of `dtype`, rounded to `dtype`."""
        return self.constant(np.asarray(literal(value, dtype)).astype(numpy_type(dtype)))

    def _initializer(self, tensor: Any) -> onnx.Value:
        value = onnx.Value(name=tensor.name, type=onnx.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.initializers[tensor.name] = value
        return value

    # -- weights ----------------------------------------------------------------------------------

    def compact(self, v: Value) -> bool:
        """Whether a weight of 16-bit floats is stored as such and widened where it is used."""
        wide = v.weight is not None and self.options.compact and v.dtype in (DType.BF16, DType.F16)
        return wide and math.prod(int(s) for s in v.shape) >= COMPACT

    def stored(
        self,
        v: Value,
        key: str,
        shape: Sequence[int],
        transform: Transform,
        *,
        index: int | None = None,
        scales: bool = False,
        dtype: DType | None = None,
        widened: DType | None = None,
    ) -> onnx.Value:
        """The initialiser of `transform` applied to a weight, or to its matrix `index`, in its stored type (FP8 stays
        FP8; `dtype`: another, which `transform` gives) and read when the model is written. `key` tells the transforms
        of one weight apart. `scales`: they go into the weight when that is folded, to `widened` (or its carrier)."""
        assert v.weight is not None
        weight, memo = v.weight, ("weight", v.weight.name, id(v.weight.source), key)
        if memo not in self.memo:
            held = dtype or (v.dtype if v.dtype in FLOAT8 or self.compact(v) else carrier(v.dtype))
            name = self.unique(f"{weight.name}{key}")

            def load() -> onnx.Tensor:
                return self.reader.read(weight, held, transform, name, index)

            tensor = onnx.LazyTensor(load, dtype=ONNX[held], shape=onnx.Shape(shape), name=name)
            self.memo[memo] = self._initializer(tensor)
            self.read_from[name] = (weight,), f"{key} {index}"
            count = math.prod(shape)
            folded = (widened or carrier(v.dtype)).bits // 8 * count
            self.resident[name] = 0 if scales else folded, min((dtype or v.dtype).bits * count // 8, folded)
        return self.memo[memo]

    def scaled(
        self, codes: Value, scales: Value, key: str, shape: Sequence[int], product: Scale, *, index: int | None = None
    ) -> onnx.Value:
        """The f32 initialiser of `product(codes, scales)` of two weights, or of their matrices `index`, computed when
        the model is written; `key` as in `stored`."""
        assert codes.weight is not None
        assert scales.weight is not None
        pair = codes.weight, scales.weight
        memo = ("scaled", *((w.name, id(w.source)) for w in pair), key)
        if memo not in self.memo:
            name = self.unique(f"{pair[0].name}{key}")

            def load() -> onnx.Tensor:
                data = product(*(self.reader.data(w, index) for w in pair))
                return onnx.Tensor(as_numpy(data, DType.F32), dtype=ONNX[DType.F32], name=name)

            tensor = onnx.LazyTensor(load, dtype=ONNX[DType.F32], shape=onnx.Shape(shape), name=name)
            self.memo[memo] = self._initializer(tensor)
            self.read_from[name] = pair, f"{key} {index}"
            count = math.prod(shape)
            self.resident[name] = 4 * count, codes.dtype.bits * count // 8
        return self.memo[memo]

    def weight(
        self,
        v: Value,
        key: str = "",
        shape: Sequence[int] | None = None,
        transform: Transform = lambda t: t,
        *,
        index: int | None = None,
    ) -> onnx.Value:
        """As `stored`, in the carrier type: what is stored narrower is cast to f32, which constant folding does at load
        where weights are folded."""
        stored = self.stored(v, key, v.shape if shape is None else shape, transform, index=index)
        if v.dtype not in FLOAT8 and not self.compact(v):
            return stored
        memo = ("cast", stored.name)
        if memo not in self.memo:
            self.memo[memo] = self.op("Cast", stored, to=ONNX[DType.F32].value)
        return self.memo[memo]

    # -- conversions ------------------------------------------------------------------------------

    def cast(self, x: onnx.Value, source: DType, target: DType) -> onnx.Value:
        """Between carriers, without rounding to narrower floats."""
        if carrier(source) == carrier(target):
            return x
        return self.op("Cast", x, to=onnx_type(target).value)

    def round_to(self, x: onnx.Value, dtype: DType) -> onnx.Value:
        """f32 rounded to FP8 values: E4M3 saturates, E5M2 goes to infinity, as in torch."""
        if dtype is DType.F8E5M2:  # Cast makes NaN of what rounds up to 65536
            beyond = self.op("GreaterOrEqual", self.op("Abs", x), self.scalar(E5M2.overflow, DType.F32))
            x = self.op("Where", beyond, self.op("Mul", x, self.scalar(np.inf, DType.F32)), x)
        codes = self.op("Cast", x, to=ONNX[dtype].value, saturate=int(dtype is DType.F8E4M3))
        return self.op("Cast", codes, to=ONNX[DType.F32].value)

    def reshape(self, x: onnx.Value, source: Sequence[int | Dim], target: Sequence[int | Dim]) -> onnx.Value:
        """x of shape `source` as `target`, with sizes copied or inferred by Reshape where it can."""
        source = [self.sizes.resolve(s) for s in source]
        target = [self.sizes.resolve(s) for s in target]
        x, source = self.memo.get(("reshaped", x), (x, source))  # two reshapes are one
        if source == target:
            return x
        result = self._reshape(x, source, target)
        self.memo["reshaped", result] = x, source
        return result

    def _reshape(self, x: onnx.Value, source: Sequence[int | Dim], target: Sequence[int | Dim]) -> onnx.Value:
        symbolic = [i for i, s in enumerate(target) if isinstance(s, Dim)]
        if 0 not in target:  # a literal 0 means "copy"
            if all(i < len(source) and source[i] == target[i] for i in symbolic):
                return self.op("Reshape", x, np.array([0 if isinstance(s, Dim) else s for s in target], np.int64))
            if len(symbolic) == 1:
                return self.op("Reshape", x, np.array([-1 if isinstance(s, Dim) else s for s in target], np.int64))
        return self.op("Reshape", x, self.sizes.vector(target), allowzero=1)

    def count(self, form: str) -> None:
        """Note for the report that a form of a lowering was taken once more."""
        self.choices[form] = self.choices.get(form, 0) + 1

    def positive(self, *sizes: int | Dim) -> bool:
        """Whether a lowering may count on these sizes being 1 at least: then the model is only run where they are, and
        another one, which does not, where they are not."""
        found = {self.sizes.resolve(s) for s in sizes}
        known = {d.name for v in self.graph.inputs for s in v.shape if isinstance(s, Dim) for d in s.expr.free_symbols}
        if self.empty or 0 in found or not all(s.symbols <= known for s in found if isinstance(s, Dim)):
            return False
        self.needed |= {s for s in found if isinstance(s, Dim)}
        return True

    @property
    def scope_name(self) -> str:
        """What names of ONNX nodes start with now."""
        return self._scope

    def refuse(self, node: Node, reason: str) -> CompileError:
        return CompileError(f"{node.op}: {reason}", code="onnxruntime", location=node.location)
