"""A graph with its floats in float64, so that what is left to compare is the algebra, not the rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from moec.ir.dims import Dim
from moec.ir.errors import CompileError
from moec.ir.graph import Graph, Node, Value
from moec.ir.interpreter import evaluate_node
from moec.ir.opdef import infer_types
from moec.ir.types import DType, TensorType
from moec.ir.weight import ComputedSource, TensorSource, Weight, loading_in_float64

# every value of the first is one of each of the others
_HELD_BY = {
    DType.F64: {DType.F64},
    DType.F32: {DType.F32, DType.F64},
    DType.F16: {DType.F16, DType.F32, DType.F64},
    DType.BF16: {DType.BF16, DType.F32, DType.F64},
}
UNIT_ROUNDOFF = {DType.F64: 2.0**-53, DType.F32: 2.0**-24, DType.F16: 2.0**-11, DType.BF16: 2.0**-8}
# functions of no operands that fill a tensor: their dtype says nothing of where a value came from
_FILLS = ("tensor.constant", "tensor.full", "tensor.arange", "tensor.dim")


def is_wide(dtype: DType) -> bool:
    """Floats that promotion widens: all but the 8-bit ones, which are codes."""
    return dtype in _HELD_BY


@dataclass(frozen=True)
class Promoted:
    """`graph`: the floats in float64. `rounded`: the same with the roundings that a rewrite may legitimately
    move or drop, or None where the graph has none; how far its results are from those of `graph` is how
    much the original leaves open."""

    graph: Graph
    rounded: Graph | None


def promote(graph: Graph) -> Graph:
    """A copy of `graph` with f32, f16, bf16 inputs, weights, constants and results in f64 and called
    functions inlined. What keeps its meaning:

    - integers, booleans, 8-bit codes; casts to them round as before. Ops that take or give other floats
      than f64 by their type rule (the f32 scales of `quant`, an op that knows f32 only) get them by a cast.
    - a cast that narrows (f32 → f16, i64 → bf16) still rounds to its dtype, and the result is widened again,
      unless it only *returns*: the value was computed from an input, a weight or an earlier such cast of a
      dtype whose values the target all holds. So `cast(rms(cast(x_bf16, f32)), bf16)`, where a bf16 model
      returns to its own dtype, becomes a no-op, as are casts that widen, and a fusion may swallow both; but
      f32 → f16 → f32 in an f32 model rounds, and a rule that drops it changes the result.

    The dtype of a constant or of an op that fills a tensor is no such origin, and what an op states as its
    result's dtype (`dequantize`) is one. Weights computed from others are computed from their f64 values.
    """
    return _Promotion(rounded=False).run(graph)


def promote_with_slack(graph: Graph) -> Promoted:
    """`promote(graph)`, and the variant that shows how much rounding of weight-only arithmetic the graph
    leaves open: constant expressions evaluated in their own dtypes (as folding does), constants that are
    no short binary fraction moved by one unit roundoff of their dtype (0.7978845 stands for √(2/π)), and
    computed weights that round inside moved by one unit roundoff."""
    exact = _Promotion(rounded=False)
    result = exact.run(graph)
    rounding = _Promotion(rounded=True)
    variant = rounding.run(graph)
    return Promoted(result, variant if rounding.inexact else None)


@dataclass
class _Scope:
    """One graph, or one call of a function, on the way: what its values became."""

    source: Graph
    dims: Mapping[str, int | Dim]
    values: dict[Value, Value] = field(default_factory=dict)
    origins: dict[Value, frozenset[DType]] = field(default_factory=dict)
    known: dict[Value, torch.Tensor] = field(default_factory=dict)  # constant expressions, in their own dtypes


class _Promotion:
    def __init__(self, *, rounded: bool):
        self.rounded = rounded
        self.inexact = False
        self.graph = Graph()
        self.weights: dict[int, Value] = {}  # by id: a function called twice brings its weights once

    def run(self, source: Graph) -> Graph:
        self.graph.name = source.name
        self.functions = source.functions
        scope = _Scope(source, {})
        for v in source.inputs:
            scope.values[v] = self.graph.add_input(v.name or "", _widened(v.type))
            scope.values[v].origins = v.origins
            scope.origins[v] = _origin(v.dtype)
        self._body(scope)
        for v, name in zip(source.outputs, source.output_names, strict=True):
            self.graph.add_output(self._as(self._value(v, scope), _widened(v.type).dtype), name)
        self.graph.prune_weights()
        return self.graph

    def _body(self, scope: _Scope) -> None:
        for node in scope.source.nodes:
            if node.op == "call.graph":
                self._call(node, scope)
            elif not (self.rounded and self._evaluates(node, scope)):
                self._node(node, scope)

    # -- values ------------------------------------------------------------------------------------

    def _value(self, v: Value, scope: _Scope) -> Value:
        if v not in scope.values:
            if v.weight is not None:
                scope.values[v] = self._weight(v.weight)
                scope.values[v].origins = v.origins
            else:
                scope.values[v] = self._known(v, scope)
        return scope.values[v]

    def _origins(self, v: Value, scope: _Scope) -> frozenset[DType]:
        return _origin(v.dtype) if v.weight is not None else scope.origins.get(v, frozenset())

    def _weight(self, weight: Weight) -> Value:
        if id(weight) not in self.weights:
            self.weights[id(weight)] = self._new_weight(weight)
        return self.weights[id(weight)]

    def _new_weight(self, weight: Weight) -> Value:
        name = weight.name if weight.name not in self.graph.weights else self.graph.fresh_weight_name(weight.name)
        if weight.source is None or not is_wide(weight.type.dtype):
            return self.graph.add_weight(Weight(name, _widened(weight.type), weight.source, weight.digest))
        if not self.rounded:
            return self._add_weight(name, weight.type, ComputedSource(lambda: _exact(weight)[0]))
        if not isinstance(weight.source, ComputedSource):
            return self._add_weight(name, weight.type, ComputedSource(lambda: weight.load().to(torch.float64)))
        self.inexact = True
        return self._add_weight(name, weight.type, ComputedSource(lambda: _rounded(weight)))

    def _add_weight(self, name: str, type: TensorType, source: ComputedSource) -> Value:
        return self.graph.add_weight(Weight(name, _widened(type), source))

    def _known(self, v: Value, scope: _Scope) -> Value:
        """The value of a constant expression, as a weight."""
        tensor = scope.known[v]
        assert v.producer is not None
        if v.producer.op == "tensor.constant" and is_wide(v.dtype):
            tensor = _moved(_literal(v.producer), v.dtype)
        elif is_wide(v.dtype):
            tensor = tensor.to(torch.float64)
        name = self.graph.fresh_weight_name(f"constant.{len(self.graph.weights)}")
        return self.graph.add_weight(Weight(name, TensorType.of(tensor), TensorSource(tensor, name)))

    def _as(self, v: Value, dtype: DType) -> Value:
        return v if v.dtype == dtype else self.graph.create("math.cast", [v], {"dtype": dtype}).result

    # -- nodes -------------------------------------------------------------------------------------

    def _evaluates(self, node: Node, scope: _Scope) -> bool:
        """Whether the node depends on constants and weights with data only; then its tensors are kept."""
        if any(_symbolic(a) for a in node.attrs.values()) or any(r.dtype.bits < 8 for r in node.results):
            return False
        if not all(v is None or v in scope.known or (v.weight and v.weight.source) for v in node.operands):
            return False
        if not node.operands and node.op != "tensor.constant":
            return False  # a fill of any size; it rounds nothing
        operands = [
            None if v is None else v.weight.load() if v.weight is not None else scope.known[v] for v in node.operands
        ]
        for r, t in zip(node.results, evaluate_node(node, operands, {}), strict=True):
            scope.known[r] = t
            # integers and moved data are the same in any precision
            self.inexact = self.inexact or (is_wide(r.dtype) and node.op.split(".")[0] != "tensor")
        if node.op == "tensor.constant" and is_wide(node.result.dtype):
            exact = _literal(node)
            self.inexact = self.inexact or not torch.equal(_moved(exact, node.result.dtype), exact)
        return True

    def _call(self, node: Node, scope: _Scope) -> None:
        callee = self.functions[node.attrs["callee"]]
        dims = {name: _substituted(s, scope.dims) for name, s in node.attrs["dims"]}
        inner = _Scope(callee, dims)
        for v, arg in zip(callee.inputs, node.operands, strict=True):
            assert arg is not None
            inner.values[v] = self._value(arg, scope)
            inner.origins[v] = self._origins(arg, scope)
        self._body(inner)
        for r, v in zip(node.results, callee.outputs, strict=True):
            scope.values[r] = self._value(v, inner)
            scope.origins[r] = self._origins(v, inner)

    def _node(self, node: Node, scope: _Scope) -> None:
        attrs = {k: _substituted(a, scope.dims) for k, a in node.attrs.items()}
        if node.op == "math.cast":
            self._cast(node, attrs["dtype"], scope)
            return
        if node.op == "tensor.full" and self.rounded and isinstance(attrs["value"], float):
            value = torch.tensor(attrs["value"], dtype=torch.float64)
            attrs["value"] = float(_moved(value, node.result.dtype))
            self.inexact = self.inexact or attrs["value"] != float(value)
        wide = {k: _widened_attr(a) for k, a in attrs.items()}
        given = [None if v is None else self._value(v, scope) for v in node.operands]
        names = _operand_names(node)

        def cast(keep: Any) -> list[Value | None]:
            return [
                g if g is None or v is None else self._as(g, v.dtype if keep(n, v.dtype) else _widened(v.type).dtype)
                for g, v, n in zip(given, node.operands, names, strict=True)
            ]

        # all wide; then f32 scales as they are; then, for an op that takes its own dtypes only, everything
        attempts = [
            (lambda n, d: False, wide),
            (lambda n, d: n.endswith("scale"), wide),
            (lambda n, d: True, attrs),
        ]
        error: CompileError | None = None
        for keep, chosen in attempts:
            start = self.graph._last
            operands = cast(keep)
            try:
                types = infer_types(node.opdef, operands, chosen, {})
            except CompileError as e:
                error = error or e
                self._forget(start)
                continue
            new = self.graph.create(node.opdef, operands, chosen, location=node.location, types=types)
            break
        else:
            assert error is not None
            raise error.located(node.location)
        stated = {a for a in node.attrs.values() if isinstance(a, DType)} if node.op not in _FILLS else set()
        origins = frozenset(d for d in stated if is_wide(d)).union(
            *(self._origins(v, scope) for v in node.operands if v is not None)
        )
        for old, result in zip(node.results, new.results, strict=True):
            result.origins = old.origins
            scope.values[old] = result
            scope.origins[old] = origins if is_wide(old.dtype) else frozenset()

    def _forget(self, last: Node | None) -> None:
        """Erase what was created after `last`."""
        while self.graph._last is not last:
            assert self.graph._last is not None
            self.graph.erase(self.graph._last)

    def _cast(self, node: Node, dtype: DType, scope: _Scope) -> None:
        (x,) = node.operands
        assert x is not None
        value, origins = self._value(x, scope), self._origins(x, scope)
        result = node.result
        if not is_wide(dtype):
            value, origins = self._as(value, dtype), frozenset()
        elif self._rounds(x.dtype, dtype, origins):
            value = self._as(self._as(value, dtype), DType.F64)
            origins = frozenset((dtype,))
        else:
            value = self._as(value, DType.F64)
        scope.values[result], scope.origins[result] = value, origins
        value.origins |= result.origins

    @staticmethod
    def _rounds(source: DType, target: DType, origins: frozenset[DType]) -> bool:
        if is_wide(source):
            return target not in _HELD_BY[source] and not any(target in _HELD_BY[o] for o in origins)
        # 8-bit floats and bools fit everywhere, integers of usual size into f32
        return source.is_integer and target in (DType.F16, DType.BF16)


def _origin(dtype: DType) -> frozenset[DType]:
    return frozenset((dtype,)) if is_wide(dtype) else frozenset()


def _widened(type: TensorType) -> TensorType:
    return type.with_dtype(DType.F64) if is_wide(type.dtype) else type


def _widened_attr(value: Any) -> Any:
    if isinstance(value, DType):
        return DType.F64 if is_wide(value) else value
    if isinstance(value, tuple):
        return tuple(map(_widened_attr, value))
    return _widened(value) if isinstance(value, TensorType) else value


def _operand_names(node: Node) -> list[str]:
    named = node.opdef.named_operands(node.operands)
    return [n for n, v in named.items() for _ in (v if isinstance(v, tuple) else (v,))]


def _symbolic(attr: Any) -> bool:
    return isinstance(attr, Dim) or (isinstance(attr, tuple) and any(map(_symbolic, attr)))


def _substituted(value: Any, dims: Mapping[str, int | Dim]) -> Any:
    """An attribute of a function, with its dims as the caller has them."""
    if not dims:
        return value
    if isinstance(value, Dim):
        return value.substitute(dims)
    if isinstance(value, TensorType):
        return value.with_shape(_substituted(value.shape, dims))
    return tuple(_substituted(v, dims) for v in value) if isinstance(value, tuple) else value


def _exact(weight: Weight) -> tuple[torch.Tensor, bool]:
    """A weight in f64, and whether it was computed without rounding on the way."""
    if not isinstance(weight.source, ComputedSource):
        return weight.load().to(torch.float64), True
    try:
        with loading_in_float64():
            tensor = weight.source.load()
    except RuntimeError:
        # the computation mixes what it loads with tensors of a dtype of its own: take its rounded result
        return weight.load().to(torch.float64), False
    return tensor.to(torch.float64), tensor.dtype == torch.float64


def _rounded(weight: Weight) -> torch.Tensor:
    """A computed weight as it is stored; moved by a unit roundoff where even its f64 form rounds inside."""
    _, exact = _exact(weight)
    tensor = weight.load().to(torch.float64)
    return tensor if exact else _moved(tensor, weight.type.dtype, short_too=True)


def _literal(constant: Node) -> torch.Tensor:
    """The numbers of a constant as they are written."""
    static: Any = constant.result.shape
    return torch.tensor(constant.attrs["value"], dtype=torch.float64).reshape(static)


def _moved(tensor: torch.Tensor, dtype: DType, *, short_too: bool = False) -> torch.Tensor:
    """Numbers that `dtype` can only have rounded (no eighths, no powers of two) moved by its unit roundoff, up and
    down in turn."""
    x = tensor.to(torch.float64)
    sign = 1.0 - 2.0 * (torch.arange(x.numel(), dtype=torch.float64).reshape(x.shape) % 2)
    moved = x * (1.0 + UNIT_ROUNDOFF[dtype] * sign)
    if short_too:
        return moved
    short = ((x * 8).round() == x * 8) & (x.abs() < 2**20) | (torch.frexp(x).mantissa.abs() == 0.5) | ~x.isfinite()
    return torch.where(short, x, moved)
