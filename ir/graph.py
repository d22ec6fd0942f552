"""The graph: SSA values, nodes in order, inputs, outputs, weights and called functions."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from moec.ir.errors import CompileError
from moec.ir.location import Location
from moec.ir.opdef import OpDef, infer_types, known, lookup
from moec.ir.types import TensorType
from moec.ir.weight import Weight

if TYPE_CHECKING:
    import networkx


# room between neighbours' order numbers, so that insertion rarely renumbers
_ORDER_GAP = 1 << 40


class Value:
    """An SSA value: a graph input, a weight, or a result of a node.

    `origins` are ids of the traced values it equals; they survive fusion and match values across graphs.
    """

    __slots__ = ("index", "name", "origins", "output_slots", "producer", "type", "uses", "weight")

    def __init__(
        self,
        type: TensorType,
        producer: Node | None = None,
        index: int = 0,
        *,
        name: str | None = None,
        weight: Weight | None = None,
        origins: Iterable[str] = (),
    ):
        self.type = type
        self.producer = producer
        self.index = index
        self.name = name
        self.weight = weight
        self.origins: frozenset[str] = frozenset(origins)
        self.uses: dict[tuple[Node, int], None] = {}
        self.output_slots: set[int] = set()

    @property
    def shape(self) -> tuple:
        return self.type.shape

    @property
    def dtype(self):
        return self.type.dtype

    @property
    def is_output(self) -> bool:
        return bool(self.output_slots)

    @property
    def users(self) -> list[Node]:
        """Distinct consuming nodes, in order of first use."""
        return list(dict.fromkeys(n for n, _ in self.uses))

    @property
    def location(self) -> Location:
        return self.producer.location if self.producer else Location()

    def __repr__(self) -> str:
        who = f"@{self.weight.name}" if self.weight else (self.name or (self.producer.op if self.producer else "?"))
        return f"<Value {who}: {self.type}>"


class Node:
    """An operation: op definition, operands (None where an optional one is absent), attributes, results."""

    __slots__ = ("_next", "_order", "_prev", "attrs", "graph", "location", "opdef", "operands", "results")

    def __init__(self, opdef: OpDef, operands: Sequence[Value | None], attrs: Mapping[str, Any], location: Location):
        self.opdef = opdef
        self.operands: tuple[Value | None, ...] = tuple(operands)
        self.attrs: dict[str, Any] = dict(attrs)
        self.location = location
        self.results: tuple[Value, ...] = ()
        self.graph: Graph | None = None
        self._prev: Node | None = None
        self._next: Node | None = None
        self._order = 0

    def precedes(self, other: Node) -> bool:
        """Whether this node comes before another of the same graph (constant time)."""
        return self._order < other._order

    @property
    def op(self) -> str:
        return self.opdef.name

    @property
    def result(self) -> Value:
        """The only result. Raises CompileError where there are several."""
        if len(self.results) != 1:
            raise CompileError(f"{self.op} has {len(self.results)} results", code="arity", location=self.location)
        return self.results[0]

    def operand(self, name: str) -> Any:
        """Operand by its declared name: a Value, None, or a tuple for a variadic one."""
        return self.opdef.named_operands(self.operands)[name]

    def __repr__(self) -> str:
        return f"<Node {self.op} at {self.location.describe()}>"


class Graph:
    """Ordered SSA nodes with typed inputs, named outputs, weights and called functions."""

    def __init__(self, name: str = "graph"):
        self.name = name
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.output_names: list[str] = []
        self.weights: dict[str, Value] = {}
        self.functions: dict[str, Graph] = {}
        self._input_names: set[str] = set()
        self._output_names: set[str] = set()
        self._first: Node | None = None
        self._last: Node | None = None
        self._count = 0

    # -- building ---------------------------------------------------------------------------------

    def add_input(self, name: str, type: TensorType) -> Value:
        if name in self._input_names:
            raise CompileError(f"duplicate input name {name!r}", code="name")
        self._input_names.add(name)
        value = Value(type, name=name, origins=[name])
        self.inputs.append(value)
        return value

    def add_weight(self, weight: Weight) -> Value:
        """The value of a weight; adding the same name again returns the first (types must agree)."""
        known = self.weights.get(weight.name)
        if known is not None:
            if known.type != weight.type:
                raise CompileError(
                    f"weight {weight.name!r} exists as {known.type}, cannot add {weight.type}", code="name"
                )
            return known
        value = Value(weight.type, weight=weight)
        self.weights[weight.name] = value
        return value

    def fresh_weight_name(self, stem: str) -> str:
        name, i = stem, 0
        while name in self.weights:
            i += 1
            name = f"{stem}.{i}"
        return name

    def add_output(self, value: Value, name: str | None = None) -> None:
        name = f"out{len(self.outputs)}" if name is None else name
        if name in self._output_names:
            raise CompileError(f"duplicate output name {name!r}", code="name")
        self._output_names.add(name)
        value.output_slots.add(len(self.outputs))
        self.outputs.append(value)
        self.output_names.append(name)

    def set_output(self, slot: int, value: Value) -> None:
        self.outputs[slot].output_slots.discard(slot)
        self.outputs[slot] = value
        value.output_slots.add(slot)

    def create(
        self,
        op: str | OpDef,
        operands: Sequence[Value | None] = (),
        attrs: Mapping[str, Any] | None = None,
        *,
        location: Location | None = None,
        before: Node | None = None,
        types: Sequence[TensorType] | None = None,
    ) -> Node:
        """Insert a node (at the end, or before another). Result types are inferred unless given.

        Raises CompileError on unknown op or attribute, wrong arity, or a failed type rule.
        """
        opdef = op if isinstance(op, OpDef) else lookup(op)
        location = location or Location()
        node = Node(opdef, opdef.pad_operands(operands), opdef.complete_attrs(attrs or {}), location)
        try:
            if types is None:
                types = infer_types(opdef, node.operands, node.attrs, self.functions)
        except CompileError as e:
            raise e.located(location) from None
        return self._insert(node, types, before)

    def _insert(self, node: Node, types: Sequence[TensorType], before: Node | None) -> Node:
        node.results = tuple(Value(t, node, i) for i, t in enumerate(types))
        for i, v in enumerate(node.operands):
            if v is not None:
                v.uses[(node, i)] = None
        self._link(node, before)
        return node

    def _link(self, node: Node, before: Node | None) -> None:
        node.graph = self
        node._next = before
        node._prev = before._prev if before else self._last
        if node._prev:
            node._prev._next = node
        else:
            self._first = node
        if before:
            before._prev = node
        else:
            self._last = node
        self._count += 1
        low = node._prev._order if node._prev else 0
        node._order = (low + before._order) // 2 if before else low + _ORDER_GAP
        if before and not low < node._order:
            self._renumber()

    def _renumber(self) -> None:
        for i, node in enumerate(self.nodes, 1):
            node._order = i * _ORDER_GAP

    def move_before(self, node: Node, before: Node | None) -> None:
        """Move a node in the order (before=None: to the end); the caller keeps SSA order valid."""
        if before is node:
            return
        self._unlink(node)
        self._link(node, before)

    # -- changing ---------------------------------------------------------------------------------

    def replace_operand(self, node: Node, index: int, value: Value | None) -> None:
        if not 0 <= index < len(node.operands):
            raise CompileError(
                f"{node.op} has {len(node.operands)} operands, none at {index}", code="arity", location=node.location
            )
        old = node.operands[index]
        if old is not None:
            del old.uses[(node, index)]
        node.operands = (*node.operands[:index], value, *node.operands[index + 1 :])
        if value is not None:
            value.uses[(node, index)] = None

    def replace_value(self, old: Value, new: Value) -> None:
        """Redirect every use of `old`, graph outputs included, to `new`; origins move along."""
        if old is new:
            return
        for node in old.users:  # each once: an op may use a value thousands of times
            node.operands = tuple(new if v is old else v for v in node.operands)
        new.uses.update(old.uses)
        old.uses.clear()
        for slot in sorted(old.output_slots):
            self.set_output(slot, new)
        new.origins |= old.origins

    def erase(self, node: Node) -> None:
        """Remove a node none of whose results is used."""
        for r in node.results:
            if r.uses or r.is_output:
                raise CompileError(f"cannot erase {node.op}: a result is used", code="erase", location=node.location)
        for i, v in enumerate(node.operands):
            if v is not None:
                del v.uses[(node, i)]
        node.operands = (None,) * len(node.operands)
        self._unlink(node)

    def _unlink(self, node: Node) -> None:
        if node._prev:
            node._prev._next = node._next
        else:
            self._first = node._next
        if node._next:
            node._next._prev = node._prev
        else:
            self._last = node._prev
        node.graph = None
        self._count -= 1

    def prune_weights(self) -> None:
        """Drop weights without uses."""
        self.weights = {n: v for n, v in self.weights.items() if v.uses or v.is_output}

    def bind_weights(self, tensors: Mapping[str, torch.Tensor | Weight]) -> None:
        """Give data to weights by name. Raises CompileError listing unknown names and type mismatches."""
        problems = []
        for name, data in tensors.items():
            weight = data if isinstance(data, Weight) else Weight.of(name, data)
            value = self.weights.get(name)
            if value is None:
                problems.append(f"no weight {name!r}")
            elif value.type != weight.type:
                problems.append(f"{name!r}: declared {value.type}, got {weight.type}")
            else:
                value.weight = Weight(name, weight.type, weight.source, weight.digest)
        if problems:
            raise CompileError("; ".join(problems), code="weight")

    # -- reading ----------------------------------------------------------------------------------

    @property
    def nodes(self) -> Iterator[Node]:
        """Nodes in order; safe while the current node is erased or nodes are inserted before it."""
        node = self._first
        while node is not None:
            following = node._next
            yield node
            node = following if node.graph is None else node._next

    def __len__(self) -> int:
        return self._count

    @property
    def symbols(self) -> frozenset[str]:
        """Dimension symbols of the inputs."""
        return frozenset().union(*(v.type.symbols for v in self.inputs))

    def find(self, op: str, *, unique: bool = False) -> list[Node]:
        """Nodes of one op (full or unambiguous bare name), descending into called functions: one result
        per call path, or one per definition with `unique`. An unknown name gives an empty list."""
        opdef = known(op)
        if opdef is None:
            return []
        name = opdef.name
        if unique:
            graphs = [self, *self.functions.values()]
            return [n for g in graphs for n in g.nodes if n.op == name]
        return list(self._walk_calls(name, self.functions))

    def _walk_calls(self, name: str, functions: Mapping[str, Graph]) -> Iterator[Node]:
        for node in self.nodes:
            if node.op == name:
                yield node
            if node.op == "call.graph":
                callee = functions.get(node.attrs["callee"])
                if callee is not None:
                    yield from callee._walk_calls(name, functions)

    def count_ops(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for node in self.nodes:
            counts[node.op] = counts.get(node.op, 0) + 1
        return dict(sorted(counts.items(), key=lambda kv: (-kv[1], kv[0])))

    def clone(self) -> Graph:
        """A structural copy; weights are shared. Raises CompileError where a value is used before it is defined."""
        g = Graph(self.name)
        mapping: dict[Value, Value] = {}
        for v in self.inputs:
            mapping[v] = g.add_input(v.name or "", v.type)
            mapping[v].origins = v.origins
        for v in self.weights.values():
            assert v.weight is not None
            mapping[v] = g.add_weight(v.weight)
            mapping[v].origins = v.origins
        g.functions = {name: fn.clone() for name, fn in self.functions.items()}
        for node in self.nodes:
            copy_node(node, g, mapping)
        for v, name in zip(self.outputs, self.output_names, strict=True):
            if v not in mapping:
                raise CompileError(f"output {name!r} is not a value of the graph", code="structure")
            g.add_output(mapping[v], name)
        return g

    def verify(self) -> None:
        """Check SSA order, use lists, types (by re-inference), symbols and names. Raises CompileError."""
        from moec.ir.verify import verify

        verify(self)

    def to_networkx(self) -> networkx.MultiDiGraph:
        """A networkx graph: one vertex per node (attributes op, module, types), input, weight and output;
        an edge per operand (attribute index)."""
        import networkx

        g = networkx.MultiDiGraph(name=self.name)
        ids: dict[Value, tuple[Any, int]] = {}
        for v in self.inputs:
            ids[v] = (f"%{v.name}", 0)
            g.add_node(f"%{v.name}", kind="input", type=str(v.type))
        for name, v in self.weights.items():
            ids[v] = (f"@{name}", 0)
            g.add_node(f"@{name}", kind="weight", type=str(v.type))
        for i, node in enumerate(self.nodes):
            types = [str(r.type) for r in node.results]
            g.add_node(i, kind="node", op=node.op, module=node.location.module, types=types, attrs=dict(node.attrs))
            for k, operand in enumerate(node.operands):
                if operand is not None:
                    if operand not in ids:
                        raise undefined(node, ids)
                    g.add_edge(ids[operand][0], i, operand=k, result=ids[operand][1])
            for r in node.results:
                ids[r] = (i, r.index)
        for v, name in zip(self.outputs, self.output_names, strict=True):
            g.add_node(f"output:{name}", kind="output", type=str(v.type))
            g.add_edge(ids[v][0], f"output:{name}", operand=0, result=ids[v][1])
        return g

    def __str__(self) -> str:
        from moec.ir.printer import print_graph

        return print_graph(self)

    def __repr__(self) -> str:
        return f"<Graph {self.name}: {len(self.inputs)} inputs, {len(self)} nodes, {len(self.outputs)} outputs>"

    def __eq__(self, other: object) -> bool:
        from moec.ir.compare import same_graph

        return isinstance(other, Graph) and same_graph(self, other)

    __hash__ = object.__hash__


def undefined(node: Node, defined: Container[Value]) -> CompileError:
    """The error for a node with an operand that is not defined before it."""
    i = next((i for i, v in enumerate(node.operands) if v is not None and v not in defined), 0)
    return CompileError(f"operand {i} of {node.op} is not defined before it", code="structure", location=node.location)


def copy_node(node: Node, into: Graph, mapping: dict[Value, Value], before: Node | None = None) -> Node:
    """Copy one node into `into` with operands mapped; extends `mapping` by its results."""
    try:
        operands = [None if v is None else mapping[v] for v in node.operands]
    except KeyError:
        raise undefined(node, mapping) from None
    # the node was checked when it was made
    new = into._insert(Node(node.opdef, operands, node.attrs, node.location), [r.type for r in node.results], before)
    for old_r, new_r in zip(node.results, new.results, strict=True):
        new_r.origins, new_r.name = old_r.origins, old_r.name
        mapping[old_r] = new_r
    return new
