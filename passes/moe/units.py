"""The gated unit of an expert: its pattern, and its attributes and the columns that gate and up are, as its own nodes
say them. A match may hold several units, which need not agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.ir import Node, Value

_ATTRS = ("activation", "limit", "alpha", "up_offset")


def gated_unit(p: Any, h: Any, unit: Any = "unit") -> Any:
    """`math.swiglu` or `math.glu` of two parts of h, bound as `unit`; `Columns` tells which parts."""
    first, second = p.split(h, axis=-1, sizes=p.attr(), results=2)
    cuts = [p.slice(h, axis=-1, start=p.attr(), end=p.attr(), step=p.attr()) for _ in range(2)]
    return p.bind(unit, p.either(glu(p, first, second), glu(p, *cuts)))


def glu(p: Any, gate: Any, up: Any) -> Any:
    """`math.swiglu` or `math.glu` of gate and up."""
    return p.either(p.swiglu(gate, up), p.glu(gate, up, **{name: p.attr() for name in _ATTRS}))


@dataclass(frozen=True)
class Columns:
    """Which columns (start, end, step) of one product gate and up are."""

    whole: Value
    gate: tuple[Any, Any, int]
    up: tuple[Any, Any, int]

    @staticmethod
    def of(gate: Value | None, up: Value | None) -> Columns | None:
        """None where they are not both parts of one value."""
        found = [_part(v) for v in (gate, up)]
        if found[0] is None or found[1] is None or found[0][0] is not found[1][0]:
            return None
        return Columns(found[0][0], found[0][1], found[1][1])

    @staticmethod
    def of_unit(unit: Value) -> Columns | None:
        """Those of a unit whose operands are parts."""
        return Columns.of(*unit.producer.operands) if unit.producer is not None else None

    @property
    def interleaved(self) -> bool:
        return (self.gate[2], self.up[2]) == (2, 2)

    def why_not(self) -> str | None:
        """Why they do not stand as `moe.experts` has them, half by half or in turns; None where they do."""
        width = self.whole.shape[-1]
        if (self.gate, self.up) == ((0, width // 2, 1), (width // 2, width, 1)):
            return None
        # the end of the gate's columns may also be that of the last even one
        if self.interleaved and self.gate[0] == 0 and self.gate[1] in (width - 1, width) and self.up[:2] == (1, width):
            return None
        said = (":".join(map(str, part)) for part in (self.gate, self.up))
        return "gate columns {}, up columns {} of {}".format(*said, width)


def unit_attrs(unit: Value, columns: Columns | None = None) -> dict[str, Any]:
    """The attributes of `moe.experts` for a unit; `columns` where its operands are not the parts themselves."""
    node, columns = unit.producer, columns or Columns.of_unit(unit)
    assert node is not None
    attrs = {name: node.attrs[name] for name in _ATTRS if node.attrs.get(name) is not None}
    return {**attrs, "interleaved": True} if columns is not None and columns.interleaved else attrs


def why_not_halves(unit: Value) -> str | None:
    """Why gate and up do not stand in their product as `moe.experts` has them; None where they do."""
    columns = Columns.of_unit(unit)
    return columns.why_not() if columns is not None else "gate and up are parts of different products"


def _part(v: Value | None) -> tuple[Value, tuple[Any, Any, int]] | None:
    """(what v is columns of, which)"""
    node: Node | None = v.producer if v is not None else None
    if v is None or node is None or node.op not in ("tensor.split", "tensor.slice"):
        return None
    (whole,) = node.operands
    if whole is None or node.attrs["axis"] not in (-1, whole.type.rank - 1):
        return None
    if node.op == "tensor.slice":
        return whole, (node.attrs["start"], node.attrs["end"], node.attrs["step"])
    sizes = node.attrs["sizes"]
    start: Any = sum(sizes[: v.index])
    return whole, (start, start + sizes[v.index], 1)
