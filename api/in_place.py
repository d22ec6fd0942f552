"""The cached program of a language model with caches that are written where they lie, not joined to what is new."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy

from moec.ir import Builder, CompileError, Dim, DType, Graph, Node, TensorType, Value
from moec.ir.dims import size
from moec.ir.ops.reduction import normal_axis

SLOT = "slot"
Size = int | Dim


@dataclass(frozen=True)
class InPlace:
    """`graph`: input_ids i64[B, S], attention_mask i64[B, C], slot i64[], caches [.., C, ..] and states → logits,
    caches, states. The first `slot` rows of a cache are filled, the S new ones are written behind them; attention_mask
    is 0 for rows behind those. `past`: the symbol of the program before that counted the filled rows."""

    graph: Graph
    past: str


class _Refused(Exception):
    """The program does something with the rows of a cache that cannot be said of a buffer."""


def in_place(graph: Graph) -> InPlace | None:
    """What a program (input_ids i64[B, S], attention_mask i64[B, P + S], past [.., P, ..]) → (logits, [.., P + S, ..])
    becomes; None where a cache is more than joined to new rows and attended to under the mask.

    Sizes of P + S rows become C; where P stands for a position it becomes `slot`.
    """
    ids, mask, *_ = graph.inputs
    past, total = size(mask.shape[1]) - ids.shape[1], mask.shape[1]
    if not (isinstance(past, Dim) and past.is_symbol and isinstance(total, Dim)):
        return None
    try:
        return InPlace(_Rewrite(graph, str(past), total).run(), str(past))
    except (_Refused, CompileError):
        return None


class _Rewrite:
    def __init__(self, graph: Graph, past: str, total: Dim):
        self.old, self.past = graph, past
        self.rows: Size = graph.inputs[0].shape[1]
        name = "C"
        while name in graph.symbols:
            name += "_"
        self.capacity = Dim(name)
        self.joined = {node for v in graph.inputs[2:] for node in [self._joined(v)] if node is not None}
        self.new = Graph(graph.name)
        self.map: dict[Value, Value] = {}
        self.masked: set[Value] = set()  # new values that know which rows are filled
        self.cached: set[Value] = set()  # new values that hold rows of a buffer

    def _joined(self, v: Value) -> Node | None:
        """The node that joins a cache to its new rows; None for a state, which has no rows."""
        if not any(self.past in _symbols(n) for n in v.shape):
            return None
        at = self.old.inputs.index(v) - 1  # the logits come before, the ids and the mask
        node = self.old.outputs[at].producer
        users = list(v.users)
        fits = node is not None and node.op == "tensor.concat" and len(node.operands) == 2 and node.operands[0] is v
        if not fits or users != [node] or v.shape[_axis(node)] != Dim(self.past):
            raise _Refused
        return node

    def run(self) -> Graph:
        if not self.joined or self.old.functions:
            raise _Refused
        old, new = self.old, self.new
        for v in old.inputs[:2]:
            self.map[v] = new.add_input(v.name or "", self._type(v.type))
        self.slot = new.add_input(SLOT, TensorType(DType.I64, ()))
        self.masked |= {self.map[old.inputs[1]], self.slot}
        for v in old.inputs[2:]:
            shape = [self.capacity if n == Dim(self.past) else n for n in v.shape]
            self.map[v] = new.add_input(v.name or "", self._type(v.type.with_shape(shape)))
        for v in old.weights.values():
            assert v.weight is not None
            self.map[v] = new.add_weight(v.weight)
        for node in old.nodes:
            self._node(node)
        for v, name in zip(old.outputs, old.output_names, strict=True):
            new.add_output(self.map[v], name)
        new.verify()
        return new

    # -- sizes ---------------------------------------------------------------------------------------

    def _size(self, n: Any) -> Any:
        """A size of rows: P + S is C, and P alone is none."""
        if not isinstance(n, Dim) or self.past not in n.symbols:
            return n
        changed = n.substitute({self.past: self.capacity - self.rows})
        terms = sympy.expand(changed.expr).as_coefficients_dict() if isinstance(changed, Dim) else {}
        if any(c < 0 for c in terms.values()) or (isinstance(changed, Dim) and changed.expr.atoms(sympy.Function)):
            raise _Refused
        return changed

    def _type(self, t: TensorType) -> TensorType:
        return t.with_shape([self._size(n) for n in t.shape])

    def _attr(self, x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(self._attr(y) for y in x)
        return self._type(x) if isinstance(x, TensorType) else self._size(x)

    def _behind(self, n: Size) -> Size | None:
        """k where n is P + k, None where n is without P."""
        if self.past not in _symbols(n):
            return None
        rest = n - Dim(self.past)
        if self.past in _symbols(rest):
            raise _Refused
        return rest

    # -- nodes ---------------------------------------------------------------------------------------

    def _node(self, node: Node) -> None:
        b = Builder(self.new, location=node.location)
        operands = [None if v is None else self.map[v] for v in node.operands]
        if node in self.joined:
            results = (self._write(b, node, operands),)
        else:
            results = self._positions(b, node, operands) or self._same(b, node, operands)
        known = {v for v in operands if v is not None}
        for old, new in zip(node.results, results, strict=True):
            if new is not self.slot:
                new.origins, new.name = old.origins, old.name
            self.map[old] = new
            if known & self.masked:
                self.masked.add(new)
            if node in self.joined or (known & self.cached and self._has_rows(new)):
                self.cached.add(new)

    def _write(self, b: Builder, node: Node, operands: list[Any]) -> Value:
        buffer, rows = operands
        written: Value = b.write(buffer, rows, self.slot, axis=_axis(node))
        return written

    def _same(self, b: Builder, node: Node, operands: list[Any]) -> tuple[Value, ...]:
        if node.op == "attention.sdpa" and operands[1] in self.cached:
            operands = self._attended(b, node, operands)
        attrs = {k: self._attr(v) for k, v in node.attrs.items()}
        made = b.op(node.opdef, operands, attrs)
        results = made if isinstance(made, tuple) else (made,)
        reads = any(v in self.cached for v in operands if v is not None)
        if reads and node.op != "attention.sdpa" and not all(self._has_rows(r) for r in results):
            raise _Refused  # something goes over the rows, filled or not
        return results

    def _attended(self, b: Builder, node: Node, operands: list[Any]) -> list[Any]:
        """A mask that knows which rows are filled, and what a causal one says of rows in a buffer."""
        q, k, v, mask, *sinks = operands
        if mask is None or mask not in self.masked or v not in self.cached:
            raise _Refused
        length = q.shape[2]
        if node.attrs["causal"] and length != 1:
            seen = self._causal(b, length, k.shape[2])
            mask = b.and_(mask, seen) if mask.dtype is DType.BOOL else b.where(seen, mask, float("-inf"))
        return [q, k, v, mask, *sinks]

    def _causal(self, b: Builder, length: Size, rows: Size) -> Value:
        """bool[S, C]: row j ≤ slot + i. `causal` itself says j ≤ i + C − S, which follows."""
        queries = b.reshape(b.add(b.arange(end=length), self.slot), shape=(length, 1))
        allowed: Value = b.le(b.arange(end=rows), queries)
        self.masked.add(allowed)
        return allowed

    def _positions(self, b: Builder, node: Node, operands: list[Any]) -> tuple[Value, ...] | None:
        """Nodes that take P for a position; None for all others."""
        a: Mapping[str, Any] = node.attrs
        if node.op == "tensor.dim" and (rest := self._behind(a["value"])) is not None:
            return (self._at(b, rest),)
        if node.op == "tensor.arange" and (rest := self._behind(a["start"])) is not None:
            count = a["end"] - a["start"]
            if self.past in _symbols(count) or a["step"] != 1:
                raise _Refused
            found = b.add(b.arange(end=count), self._at(b, rest))
            return (found if a["dtype"] is DType.I64 else b.cast(found, dtype=a["dtype"]),)
        if node.op == "tensor.slice" and (rest := self._behind(a["start"])) is not None:
            count = a["end"] - a["start"]
            if self.past in _symbols(count) or a["step"] != 1 or operands[0] in self.cached:
                raise _Refused
            rows = b.add(b.arange(end=count), self._at(b, rest))
            return (b.gather(operands[0], rows, axis=normal_axis(a["axis"], node.result.type.rank)),)
        return None

    def _at(self, b: Builder, rest: Size) -> Value:
        """slot + rest"""
        at: Value = self.slot if rest == 0 else b.add(self.slot, b.dim(value=rest))
        self.masked.add(at)
        return at

    def _has_rows(self, v: Value) -> bool:
        return any(str(self.capacity) in _symbols(n) for n in v.shape)


def _symbols(n: Any) -> frozenset[str]:
    return n.symbols if isinstance(n, Dim) else frozenset()


def _axis(node: Node | None) -> int:
    assert node is not None
    return normal_axis(node.attrs["axis"], node.results[0].type.rank)
