"""The cached program of a language model with caches that are written where they lie, not joined to what is new."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moec.buffer_rows import MixesRows, Rows
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


def in_place(graph: Graph) -> InPlace | None:
    """What a program (input_ids i64[B, S], attention_mask i64[B, P + S], past [.., P, ..]) → (logits, [.., P + S, ..])
    becomes; None where rows of a cache or of the mask are more than attended to, see `buffer_rows`.

    Sizes of P + S rows become C; where P stands for a position it becomes `slot`.
    """
    ids, mask, *_ = graph.inputs
    past, total = size(mask.shape[1]) - ids.shape[1], mask.shape[1]
    if not (isinstance(past, Dim) and past.is_symbol and isinstance(total, Dim)):
        return None
    try:
        return InPlace(_Rewrite(graph, str(past), total).run(), str(past))
    except (MixesRows, CompileError):  # the latter: sizes that no longer fit
        return None


class _Rewrite:
    def __init__(self, graph: Graph, past: str, total: Dim):
        self.old, self.past, self.total = graph, past, total
        self.length: Size = graph.inputs[0].shape[1]
        name = "C"
        while name in graph.symbols:
            name += "_"
        self.capacity = Dim(name)
        self.rows = Rows(self.capacity)
        self.joined = {node for v in graph.inputs[2:] for node in [self._joined(v)] if node is not None}
        self.new = Graph(graph.name)
        self.map: dict[Value, Value] = {}
        self.made: dict[Any, Value] = {}  # what the layers share

    def _joined(self, v: Value) -> Node | None:
        """The node that joins a cache to its new rows; None for a state, which has no rows."""
        if not any(self.past in _symbols(n) for n in v.shape):
            return None
        node = self.old.outputs[self.old.inputs.index(v) - 1].producer  # the logits come before, the ids and the mask
        users = list(v.users)
        if node is None or node.op != "tensor.concat" or len(node.operands) != 2 or node.operands[0] is not v:
            raise MixesRows
        axis = normal_axis(node.attrs["axis"], v.type.rank)
        rows = [i for i, n in enumerate(v.shape) if self.past in _symbols(n)]
        if users != [node] or rows != [axis] or v.shape[axis] != Dim(self.past):
            raise MixesRows
        return node

    def run(self) -> Graph:
        old, new = self.old, self.new
        if not self.joined or old.functions or SLOT in {v.name for v in old.inputs}:
            raise MixesRows
        for v in old.inputs[:2]:
            self.map[v] = new.add_input(v.name or "", self._type(v.type))
        self.slot = new.add_input(SLOT, TensorType(DType.I64, ()))
        self.rows.add(self.map[old.inputs[1]], 1, zero=True)
        for v in old.inputs[2:]:
            shape = [self.capacity if n == Dim(self.past) else n for n in v.shape]
            buffer = self.map[v] = new.add_input(v.name or "", v.type.with_shape(shape))
            if self.capacity in shape:
                self.rows.add(buffer, shape.index(self.capacity))
        for v in old.weights.values():
            assert v.weight is not None
            self.map[v] = new.add_weight(v.weight)
        for node in old.nodes:
            self._node(node)
        for v, name in zip(old.outputs, old.output_names, strict=True):
            new.add_output(self.map[v], name)
        if self.map[old.outputs[0]] in self.rows.axis:
            raise MixesRows
        new.verify()
        return new

    # -- sizes ---------------------------------------------------------------------------------------

    def _size(self, n: Any) -> Any:
        """P + S is C; other sizes that P is in are none of a buffer's."""
        if not isinstance(n, Dim) or self.past not in n.symbols:
            return n
        if n != self.total:
            raise MixesRows
        return self.capacity

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
            raise MixesRows
        return rest

    # -- nodes ---------------------------------------------------------------------------------------

    def _node(self, node: Node) -> None:
        b = Builder(self.new, location=node.location)
        operands = [None if v is None else self.map[v] for v in node.operands]
        results = self._positions(b, node, operands) or self._same(b, node, operands)
        for made in b.created:
            self.rows.follow(made)
        for old, new in zip(node.results, results, strict=True):
            if new is not self.slot:
                new.origins, new.name = old.origins, old.name
            self.map[old] = new

    def _same(self, b: Builder, node: Node, operands: list[Any]) -> tuple[Value, ...]:
        if node in self.joined:
            buffer, rows = operands
            return (b.write(buffer, rows, self.slot, axis=normal_axis(node.attrs["axis"], rows.type.rank)),)
        if node.op == "attention.sdpa" and any(v in self.rows.axis for v in operands):
            operands = self._attended(b, node, operands)
        made = b.op(node.opdef, operands, {k: self._attr(v) for k, v in node.attrs.items()})
        return made if isinstance(made, tuple) else (made,)

    def _attended(self, b: Builder, node: Node, operands: list[Any]) -> list[Any]:
        """With a mask that hides the free rows, and says what a causal one does of rows in a buffer."""
        q, k, v, mask, *sinks = operands
        length = q.shape[2]
        if length != self.length:
            raise MixesRows
        causal = node.attrs["causal"] and length != 1
        seen = self._seen(b, causal)
        key = (mask, causal)
        if key not in self.made:
            if mask is None:
                self.made[key] = seen
            elif mask.dtype is DType.BOOL:
                self.made[key] = b.and_(mask, seen)
            else:
                low = b.const(float("-inf"), mask.dtype)
                self.made[key] = b.where(seen, mask, low)
        return [q, k, v, self.made[key], *sinks]

    def _seen(self, b: Builder, causal: bool) -> Value:
        """bool[1, 1, 1 or S, C]: rows j ≤ slot + i of query i, or all that are filled. `causal` itself says
        j ≤ i + C − S, which follows."""
        if causal not in self.made:
            last = b.add(self.slot, b.dim(value=self.length - 1)) if self.length != 1 else self.slot
            if causal:
                last = b.reshape(b.add(b.arange(end=self.length), self.slot), shape=(self.length, 1))
            found = b.le(b.arange(end=self.capacity), last)
            lead = (1, 1, self.length) if causal else (1, 1, 1)
            self.made[causal] = b.reshape(found, shape=(*lead, self.capacity))
        return self.made[causal]

    def _positions(self, b: Builder, node: Node, operands: list[Any]) -> tuple[Value, ...] | None:
        """Nodes that take P for a position; None for all others."""
        a: Mapping[str, Any] = node.attrs
        if node.op == "tensor.dim" and (rest := self._behind(a["value"])) is not None:
            return (self._at(b, rest),)
        if node.op not in ("tensor.arange", "tensor.slice") or (rest := self._behind(a["start"])) is None:
            return None
        count = a["end"] - a["start"]
        if self.past in _symbols(count) or a["step"] != 1:
            raise MixesRows
        found = b.add(b.arange(end=count), self._at(b, rest))
        if node.op == "tensor.arange":
            return (found if a["dtype"] is DType.I64 else b.cast(found, dtype=a["dtype"]),)
        (x,) = operands
        axis = normal_axis(a["axis"], node.result.type.rank)
        if self.rows.axis.get(x) != axis:
            raise MixesRows
        return (self._read(b, x, found, axis),)

    def _read(self, b: Builder, x: Value, rows: Value, axis: int) -> Value:
        """Filled rows of a value that has some; this one gather of them is not asked about."""
        read: Value = b.gather(x, rows, axis=axis)
        b.created.pop()
        return read

    def _at(self, b: Builder, rest: Size) -> Value:
        """slot + rest"""
        return self.slot if rest == 0 else b.add(self.slot, b.dim(value=rest))


def _symbols(n: Any) -> frozenset[str]:
    return n.symbols if isinstance(n, Dim) else frozenset()
