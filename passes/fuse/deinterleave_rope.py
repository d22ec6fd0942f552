"""Rotary embedding that reorders its input, to one that does not behind a linear layer with reordered rows.

DeepSeek's code rotates pairs (x[2i], x[2i + 1]) and leaves them as halves. A linear layer that gives its even outputs
first makes the halves at once, so that nothing is moved at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moec.ir import Builder, Graph, Node, Value, Weight
from moec.ir.weight import ordered_rows
from moec.passes.base import Pass, report


@dataclass(frozen=True)
class DeinterleaveRoPE(Pass):
    """rope(f(linear(x, w)), interleaved, deinterleave) → rope(f(linear(x, w[rows]))) for f of reshapes, transposes and
    splits that keep the last axis together.

    Not part of the default pipeline: the reordered weight is a copy, in memory beside the tensors of a live model, and
    the values between are others than the model's. A weight that is used elsewhere too, or a value between that is,
    stays as it is.
    """

    def run(self, graph: Graph) -> Graph:
        graph = graph.clone()
        done = 0
        for node in list(graph.nodes):
            if node.op == "rope.apply" and node.attrs["deinterleave"]:
                done += self._reorder(graph, node)
        graph.prune_weights()
        report(reordered=done)
        return graph

    def _reorder(self, graph: Graph, rope: Node) -> bool:
        x = rope.operand("x")
        width = x.shape[-1]
        found = _source(x, torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2)]))
        if found is None:
            return False
        linear, order, between = found
        b = Builder(graph, before=linear, location=linear.location)
        operands = [linear.operand("x"), *(_rows(b, linear.operand(name), order) for name in ("weight", "bias"))]
        y = b.op("linear.linear", operands)
        graph.replace_value(linear.result, y)
        for value in (y, *between):  # what was traced is in another order
            value.origins = frozenset(f"{origin} deinterleaved" for origin in value.origins or {"rows"})
        b = Builder(graph, before=rope, location=rope.location)
        z = b.op("rope.apply", [rope.operand(name) for name in ("x", "cos", "sin")])
        graph.replace_value(rope.result, z)
        graph.erase(rope)
        graph.erase(linear)
        return True


def _source(x: Value, order: torch.Tensor) -> tuple[Node, torch.Tensor, list[Value]] | None:
    """The linear layer that x comes from, the order of its rows that makes `order` of the last axis of x, and the
    values between. None where something else sees the order too."""
    between: list[Value] = []
    while True:
        made = x.producer
        if made is None or len(x.uses) != 1 or x.output_slots:
            return None
        if made.op == "linear.linear":
            weights = [made.operand("weight"), made.operand("bias")]
            plain = all(w is None or (w.weight is not None and len(w.uses) == 1) for w in weights)
            return (made, order, between) if plain else None
        source = made.operands[0]
        if source is None:
            return None
        width = source.shape[-1]
        if made.op == "tensor.reshape":
            # whole rows of x side by side in its source
            if not isinstance(width, int) or width % len(order) or not _keeps_columns(source, x):
                return None
            order = torch.cat([order + i * len(order) for i in range(width // len(order))])
        elif made.op == "tensor.split" and made.attrs["axis"] in (-1, source.type.rank - 1):
            sizes, place = made.attrs["sizes"], list(made.results).index(x)
            before = sum(sizes[:place])
            order = torch.cat([torch.arange(before), order + before, torch.arange(before + sizes[place], width)])
        elif made.op != "tensor.transpose" or made.attrs["perm"][-1] != source.type.rank - 1:
            return None
        between.append(x)
        x = source


def _keeps_columns(source: Value, x: Value) -> bool:
    """Whether a reshape only moves or adds whole axes before columns that stay next to each other."""
    lead = [s for s in x.shape[:-1] if s != 1]
    given = [s for s in source.shape[:-1] if s != 1]
    if source.shape[-1] == x.shape[-1]:
        return lead == given
    heads = source.shape[-1] // x.shape[-1]
    return lead == [*given, heads]


def _rows(b: Builder, value: Value | None, order: torch.Tensor) -> Value | None:
    if value is None:
        return None
    weight = value.weight
    assert weight is not None
    name = b.graph.fresh_weight_name(f"{weight.name}.deinterleaved")
    source = None if weight.source is None else ordered_rows(weight, order)
    return b.graph.add_weight(Weight(name, weight.type, source))
