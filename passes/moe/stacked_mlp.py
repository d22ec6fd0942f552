"""Gated MLPs with stacked weights [E, …], of every expert on every token or of each token's chosen experts, however the
products are written; see `axes`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moec.ir import Value
from moec.passes.moe.axes import Axes, Axis, Named, flattened, named
from moec.passes.moe.structure import producer
from moec.passes.moe.units import Columns, unit_attrs
from moec.passes.rewriting.match_values import describe

_MOVED = ("tensor.reshape", "tensor.transpose", "tensor.expand", "math.cast")
_PRODUCTS = ("linear.matmul", "linear.linear")


class NotExpertsError(Exception):
    """Why something is not what is looked for; `near` where a report should tell."""

    def __init__(self, reason: str, at: Value | None = None, near: bool = False):
        super().__init__(reason)
        self.reason, self.at, self.near = reason, at, near


def moved(v: Value | None) -> Value | None:
    """The value of which v is the elements, moved."""
    while v is not None and v.producer is not None and v.producer.op in _MOVED:
        v = v.producer.operands[0]
    return v


@dataclass
class Table:
    """Stored weights [E, …] (and perhaps the ids of the experts whose rows are taken) and the product or sum that they
    are in."""

    weight: Value
    ids: Value | None
    at: Value

    @staticmethod
    def of(v: Value | None, at: Value) -> Table | None:
        v = moved(v)
        gather = producer(v, "tensor.gather")
        ids = None
        if gather is not None and gather.attrs["axis"] == 0:
            ids, v = gather.operands[1], moved(gather.operands[0])
        return Table(v, ids, at) if v is not None and v.weight is not None and v.type.rank >= 2 else None


@dataclass
class Layer:
    """A product with a table, plus a biased one."""

    rows: Value
    table: Table
    bias: Table | None
    flipped: bool = False  # stored [E, in, out]; known once its axes are named

    @staticmethod
    def of(v: Value | None, what: str) -> Layer:
        """Raises NotExpertsError."""
        v = moved(v)
        bias = None
        total = producer(v, "math.add")
        for one, other in (total.operands, total.operands[::-1]) if total is not None else ():
            found = Table.of(other, total.results[0]) if bias is None else None
            if found is not None:
                bias, v = found, moved(one)
        node = v.producer if v is not None else None
        if v is None or node is None or node.op not in _PRODUCTS or (node.op == _PRODUCTS[1] and node.operands[2]):
            raise NotExpertsError(f"{what} is {describe(v)}, expected a product with stacked weights", v)
        a, b = node.operands[:2]
        for rows, weight in ((a, b), (b, a)):
            table = Table.of(weight, v)
            if rows is not None and table is not None and table.weight.type.rank == 3:
                return Layer(rows, table, bias)
        raise NotExpertsError(f"{what} is a product without stacked weights [E, …]", v)


@dataclass
class StackedMLP:
    """down(unit(gate, up)); gate and up are one layer or two. Raises NotExpertsError where it is not one."""

    unit: Value
    down: Layer
    first: tuple[Layer, ...]
    columns: Columns | None = None  # those of gate and up, where they are one layer
    names: Named = field(default_factory=Named)
    tokens: Axis = ()
    x: Value | None = None

    @staticmethod
    def of(y: Value) -> StackedMLP:
        down = Layer.of(y, "an expert's output")
        unit = moved(down.rows)
        node = unit.producer if unit is not None else None
        if unit is None or node is None or node.op not in ("math.swiglu", "math.glu"):
            raise NotExpertsError(f"the second product is of {describe(unit)}, expected a gated unit", unit)
        gate, up = (moved(o) for o in node.operands)
        columns = Columns.of(gate, up)
        if columns is None:
            return StackedMLP(unit, down, (Layer.of(gate, "the gate"), Layer.of(up, "up")))
        reason = columns.why_not()
        if reason:
            raise NotExpertsError(f"gate and up are not the halves of their product: {reason}", gate, near=True)
        return StackedMLP(unit, down, (Layer.of(columns.whole, "gate and up"),), columns)

    @property
    def tables(self) -> list[Table]:
        layers = [*self.first, self.down]
        return [t for layer in layers for t in (layer.table, layer.bias) if t is not None]

    @property
    def num(self) -> Any:
        return self.down.table.weight.shape[0]

    def unit_attrs(self) -> dict[str, Any]:
        return unit_attrs(self.unit, self.columns)

    def experts(self) -> Value | None:
        """The ids by which weights are taken, None where all experts run. Raises NotExpertsError where they differ."""
        ids = {_ids(t.ids) if t.ids is not None else None for t in self.tables}
        if len(ids) > 1:
            raise NotExpertsError("the experts' weights are taken by different ids", self.unit, near=True)
        return ids.pop()

    def name_axes(self, ids: Value | None) -> None:
        """Names all axes from those of x [tokens, channel], the tables [expert, …] and the ids [tokens, choice].
        Raises NotExpertsError where the products do not contract the same axes."""
        rows = self.first[0].rows
        if len({moved(layer.rows) for layer in self.first}) > 1:
            raise NotExpertsError("gate and up are of different rows", rows, near=True)
        chain = [rows]
        while chain[-1].producer is not None and chain[-1].producer.op in _MOVED:
            below = chain[-1].producer.operands[0]
            assert below is not None
            chain.append(below)
        for x in reversed(chain):
            usable = x.type.rank >= 2 and x.dtype == self.down.table.weight.dtype
            names = self._named(x, ids) if usable else None
            if names is not None:
                self.x, self.names = x, names
                return
        raise NotExpertsError(
            "the products do not contract the channels of one x with each expert's weights", rows, True
        )

    def _named(self, x: Value, ids: Value | None) -> Named | None:
        names = Named()
        names.known[x] = named(*(f"token {i}" for i in range(x.type.rank - 1)), "channel", sizes=x.shape)
        self.tokens = flattened((names.known[x] or ())[:-1])
        if ids is not None and not self._name_choices(names, ids):
            return None
        hidden = "hidden" if len(self.first) == 2 else "gate_up"
        for layer in self.first:
            if not _name_table(names, layer, "channel", hidden):
                return None
        return names if _name_table(names, self.down, "hidden", "out") else None

    def _name_choices(self, names: Named, ids: Value) -> bool:
        """Names the ids as they are, and wherever they are taken from."""
        return all(
            names.name(v, self.tokens, "choice", ids.shape[-1]) for v in {ids, *(t.ids for t in self.tables if t.ids)}
        )


def _ids(v: Value) -> Value:
    while v.producer is not None and v.producer.op == "tensor.reshape":
        (inner,) = v.producer.operands
        if inner is None or inner.type.rank < 2:
            break
        v = inner
    return v


def _name_table(names: Named, layer: Layer, into: str, out: str) -> bool:
    """Names a layer's weight by what its product needs, [expert, into, out] or [expert, out, into], and its bias."""
    weight = layer.table.weight
    bias = layer.bias
    for order in ((out, into), (into, out)):
        found: dict[Value, Axes | None] = {**names.known, weight: named("expert", *order, sizes=weight.shape)}
        if bias is not None:
            inner = [""] * (bias.weight.type.rank - 2)
            found[bias.weight] = named("expert", *inner, out, sizes=bias.weight.shape)
        tried = Named(found)
        if tried.axes(layer.table.at) is not None and (bias is None or tried.axes(bias.at) is not None):
            names.known = tried.known
            layer.flipped = order == (into, out)
            return True
    return False
