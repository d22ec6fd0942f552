"""Weights that a checkpoint stores in block FP8 (DeepSeek-V3 technical report, §3.3), used as they are stored."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moec.ir import Builder, Graph, Node, Value, Weight
from moec.ir.weight import BlockScaledSource
from moec.passes.base import Pass, report
from moec.passes.coverage import quantized_coverage


@dataclass(frozen=True)
class UseStoredFP8(Pass):
    """Weights whose source is codes and scales → the `quant` ops on these very codes and scales.

    `activations`: as DeepSeek computes (W8A8), the rows that go into a product are quantised per token in groups as
    wide as a weight's block; without, they stay as they are and the weights are dequantised where they are used. A
    weight that is used by anything but a linear layer or experts is dequantised when it is read. No weight is rounded
    anew.
    """

    activations: bool = True

    def run(self, graph: Graph) -> Graph:
        if not any(_stored(v) for g in (graph, *graph.functions.values()) for v in g.weights.values()):
            return graph
        graph = graph.clone()
        for g in (graph, *graph.functions.values()):
            _Rewriter(g, self.activations).run()
        report(**quantized_coverage(graph).to_dict())
        return graph


def _stored(value: Value | None) -> BlockScaledSource | None:
    weight = None if value is None else value.weight
    return weight.source if weight is not None and isinstance(weight.source, BlockScaledSource) else None


class _Rewriter:
    """One graph's rewriting; weights and inputs become codes once, however many nodes use them."""

    def __init__(self, graph: Graph, activations: bool):
        self.graph, self.activations = graph, activations
        self.weights: dict[Value, tuple[Value, Value]] = {}
        self.inputs: dict[tuple[Value, int], tuple[Value, Value]] = {}
        self.dense: dict[Value, Value] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "linear.linear":
                self._linear(node)
            elif node.op == "moe.experts":
                self._experts(node)
        self.graph.prune_weights()

    def _linear(self, node: Node) -> None:
        x, weight, bias = (node.operand(name) for name in ("x", "weight", "bias"))
        stored = _stored(weight)
        if stored is None or x.type.rank < 2:
            return
        codes, scale = self._codes(weight, stored)
        b = Builder(self.graph, before=node, location=node.location)
        if not self.activations:
            if weight not in self.dense:
                self.dense[weight] = b.dequantize(codes, scale, block=stored.block, dtype=x.dtype)
            self._replace(node, b.op("linear.linear", [x, self.dense[weight], bias]))
            return
        group = stored.block[1]
        if (x, group) not in self.inputs:
            self.inputs[x, group] = b.quantize(x, block=(1, group))
        attrs = {"block": stored.block, "group": group, "dtype": x.dtype}
        self._replace(node, b.op("quant.scaled_linear", [*self.inputs[x, group], codes, scale, bias], attrs))

    def _experts(self, node: Node) -> None:
        gate_up, down = node.operand("gate_up"), node.operand("down")
        stored, other = _stored(gate_up), _stored(down)
        if stored is None or other is None or stored.block != other.block or node.attrs["interleaved"]:
            return
        block = stored.block
        group = block[1] if self.activations else None
        attrs = {n: node.attrs[n] for n in ("activation", "limit", "alpha", "up_offset")}
        attrs |= {"block": block, "group": group}
        routed = [node.operand("x"), node.operand("weights"), node.operand("experts")]
        weights = [*self._codes(gate_up, stored), *self._codes(down, other)]
        biases = [node.operand("gate_up_bias"), node.operand("down_bias")]
        b = Builder(self.graph, before=node, location=node.location)
        self._replace(node, b.op("quant.scaled_experts", [*routed, *weights, *biases], attrs))

    def _codes(self, value: Value, stored: BlockScaledSource) -> tuple[Value, Value]:
        """Codes and scales as weights of their own."""
        if value not in self.weights:
            assert value.weight is not None
            self.weights[value] = (
                self._add(f"{value.weight.name}.codes", stored.codes),
                self._add(f"{value.weight.name}.scale", stored.scale),
            )
        return self.weights[value]

    def _add(self, name: str, weight: Weight) -> Value:
        return self.graph.add_weight(replace(weight, name=self.graph.fresh_weight_name(name)))

    def _replace(self, node: Node, value: Value) -> None:
        value.name = node.result.name
        self.graph.replace_value(node.result, value)
        self.graph.erase(node)
