"""Carry out a placement: expert weights in slot order, and a remap from logical experts to slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from moec.ir import Builder, CompileError, ComputedSource, Graph, Node, Placement, Value, Weight
from moec.passes.base import Pass, report
from moec.passes.calibrate import expert_nodes


@dataclass(frozen=True, eq=False)
class PlaceExperts(Pass):
    """Put every grouped-experts node's weights in the slot order of `placement` (row i belongs to node i in
    graph order) and route through `moe.remap`.

    Weights [E, …] become [slots, …] under "<name>.placed", built when they are first read; an operand that is not a
    weight is gathered in the graph. Every slot computes what the expert it copies does, so a permutation leaves the
    outputs bit for bit; replicas split an expert's rows, and a matrix product may round differently for
    another number of rows. Raises CompileError where layers or experts differ in number, the graph is already placed,
    or the fractions of the placement are unequal, which `moe.remap` does not do.
    """

    placement: Placement

    once: ClassVar[bool] = True  # a second run would take slots for experts, and refuses

    def run(self, graph: Graph) -> Graph:
        graph = graph.clone()
        nodes = expert_nodes(graph)
        self._check(nodes)
        placed: dict[tuple[Value, bytes], Value] = {}
        for layer, node in enumerate(nodes):
            self._place(graph, node, layer, placed)
        graph.prune_weights()
        report(
            layers=len(nodes),
            slots=self.placement.mesh.num_slots,
            balance=_finite(self.placement.balance),
            lower_bound=_finite(self.placement.lower_bound),
        )
        return graph

    def _check(self, nodes: list[Node]) -> None:
        p = self.placement
        if len(nodes) != p.num_layers:
            raise CompileError(
                f"the placement has {p.num_layers} layers, the graph {len(nodes)} grouped-experts nodes",
                code="placement",
                hint="one row per MoE layer in graph order; moec.passes.expert_load(graph, inputs) gives their loads",
            )
        for layer, node in enumerate(nodes):
            if node.operand("experts").producer is not None and node.operand("experts").producer.op == "moe.remap":
                raise CompileError("the experts are already placed", code="placement", location=node.location)
            held = node.operand("gate_up").shape[0]
            if held != p.num_experts:
                raise CompileError(
                    f"layer {layer} has {held} experts, the placement {p.num_experts}",
                    code="placement",
                    location=node.location,
                )
            row = p.physical_to_logical[layer]
            equal = 1.0 / np.bincount(row)[row]
            if not np.allclose(p.fractions[layer], equal):
                raise CompileError(
                    f"layer {layer} of the placement splits experts unequally; moe.remap takes replicas in turn",
                    code="placement",
                )

    def _place(self, graph: Graph, node: Node, layer: int, placed: dict[tuple[Value, bytes], Value]) -> None:
        row = torch.from_numpy(self.placement.physical_to_logical[layer].copy())
        if torch.equal(row, torch.arange(self.placement.num_experts)):
            return
        b = Builder(graph, before=node, location=node.location)
        table, count = self.placement.tables(layer)
        routed = b.op(
            "moe.remap",
            [
                node.operand("experts"),
                _integers(graph, f"placement.{layer}.table", table),
                _integers(graph, f"placement.{layer}.count", count),
            ],
        )
        names = [name for name, _ in node.opdef.operands]
        for i, (name, value) in enumerate(zip(names, node.operands, strict=True)):
            if name == "experts":
                graph.replace_operand(node, i, routed)
            elif name not in ("x", "weights") and value is not None:
                key = (value, row.numpy().tobytes())
                if key not in placed:
                    placed[key] = _in_slot_order(graph, b, value, row, f"placement.{layer}.order")
                graph.replace_operand(node, i, placed[key])


def _in_slot_order(graph: Graph, b: Builder, value: Value, row: torch.Tensor, order_name: str) -> Value:
    old = value.weight
    if old is None:
        return b.op("tensor.gather", [value, _integers(graph, order_name, row.numpy())], {"axis": 0})
    type = old.type.with_shape((len(row), *old.type.shape[1:]))
    source = None if old.source is None else ComputedSource(lambda: gather_rows(old.load(), row))
    new = graph.add_weight(Weight(graph.fresh_weight_name(f"{old.name}.placed"), type, source))
    new.origins = value.origins
    return new


def gather_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x[rows] for any dtype; 8-bit floats go as bytes, which torch gathers everywhere."""
    if x.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return x.view(torch.uint8).index_select(0, rows).view(x.dtype)
    return x.index_select(0, rows)


def _integers(graph: Graph, stem: str, array: np.ndarray) -> Value:
    """An i64 weight of the graph."""
    tensor = torch.from_numpy(np.array(array, dtype=np.int64))
    return graph.add_weight(Weight.of(graph.fresh_weight_name(stem), tensor))


def _finite(values: np.ndarray) -> list[float] | None:
    return values.tolist() if np.isfinite(values).all() else None
