"""Weights as E4M3 or integer codes with scales per block, and activations in E4M3 per token."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch

from moec.ir import Builder, CompileError, ComputedSource, DType, Graph, Node, Quantization, TensorType, Value, Weight
from moec.ir.ops.block_codes import quantize_blocks, scale_type
from moec.ir.ops.quant import require_finite
from moec.passes.base import Pass, report
from moec.passes.coverage import kept, quantized_coverage, root_weight, router_projections, why_left


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Store linear and expert weights as codes (E4M3, i8 or i4) with f32 scales per block, computed when first read.

    `linear.linear` becomes `quant.scaled_linear` on codes of its input, one `quant.quantize` per value however
    many use it, and `moe.experts` becomes `quant.scaled_experts`. Weight-only
    (`quantization.activations=None`): the weights are dequantised where they are used. Routers (what feeds
    `moe.route`), module paths in `quantization.keep`, biases, and everything that is no linear or expert weight (norms,
    embeddings) stay.

    Raises CompileError where less than `quantization.min_coverage` of the linear and expert weight bytes end up as
    codes, and, when a weight's data is first read, on a NaN or infinity in it.
    """

    quantization: Quantization = field(default_factory=Quantization)

    def run(self, graph: Graph) -> Graph:
        graph = graph.clone()
        for g in (graph, *graph.functions.values()):
            _Rewriter(g, self.quantization).run()
        coverage = quantized_coverage(graph, self.quantization)
        report(**coverage.to_dict())
        if coverage.share < self.quantization.min_coverage:
            raise CompileError(
                f"{coverage.share:.1%} of the linear and expert weight bytes can be quantised, "
                f"min_coverage asks for {self.quantization.min_coverage:.1%}",
                code="coverage",
                excerpt=str(coverage),
                hint="Quantization(min_coverage=…) allows less",
            )
        return graph


class _Rewriter:
    """One graph's rewriting; weights and inputs are quantised once, however many nodes use them."""

    def __init__(self, graph: Graph, quantization: Quantization):
        self.graph, self.q = graph, quantization
        self.weights: dict[tuple[Value, DType, bool], tuple[Value, Value]] = {}
        self.inputs: dict[Value, tuple[Value, Value]] = {}
        self.dense: dict[tuple[Value, DType], Value] = {}

    def run(self) -> None:
        routers = router_projections(self.graph)
        for node in list(self.graph.nodes):
            if node.op == "linear.linear" and why_left(node, node.operand("weight"), self.q, routers) is None:
                self._linear(node)
            elif node.op == "moe.experts" and why_left(node, node.operand("gate_up"), self.q, routers) is None:
                self._experts(node)
        self.graph.prune_weights()

    def _replace(self, node: Node, value: Value) -> None:
        value.name = node.result.name
        self.graph.replace_value(node.result, value)
        self.graph.erase(node)

    def _dtype(self, node: Node, *weights: Value) -> DType:
        """What the weights of a node are stored as."""
        wide = any(kept(node, root_weight(w), self.q.in_i8) for w in weights)
        return DType.I8 if wide else DType.of(self.q.weights)

    def _linear(self, node: Node) -> None:
        x, weight, bias = (node.operand(name) for name in ("x", "weight", "bias"))
        dtype = self._dtype(node, weight)
        codes, scale = self._quantised_weight(weight, dtype)
        b = Builder(self.graph, before=node, location=node.location)
        if self.q.activations is None:
            if (weight, dtype) not in self.dense:
                self.dense[weight, dtype] = b.dequantize(codes, scale, block=self.q.block, dtype=x.dtype)
            self._replace(node, b.op("linear.linear", [x, self.dense[weight, dtype], bias]))
            return
        if x not in self.inputs:
            self.inputs[x] = b.quantize(x, block=(1, self.q.group))
        attrs = {"block": self.q.block, "group": self.q.group, "dtype": x.dtype}
        self._replace(node, b.op("quant.scaled_linear", [*self.inputs[x], codes, scale, bias], attrs))

    def _experts(self, node: Node) -> None:
        dtype = self._dtype(node, node.operand("gate_up"), node.operand("down"))
        gate_up = self._quantised_weight(node.operand("gate_up"), dtype, node.attrs["interleaved"])
        down = self._quantised_weight(node.operand("down"), dtype)
        attrs = {n: node.attrs[n] for n in ("activation", "limit", "alpha", "up_offset")}
        attrs |= {"block": self.q.block, "group": None if self.q.activations is None else self.q.group}
        b = Builder(self.graph, before=node, location=node.location)
        routed = [node.operand("x"), node.operand("weights"), node.operand("experts")]
        biases = [node.operand("gate_up_bias"), node.operand("down_bias")]
        if node.attrs["interleaved"] and biases[0] is not None:
            width = biases[0].shape[1]
            biases[0] = b.concat(*(b.slice(biases[0], axis=1, start=i, end=width, step=2) for i in (0, 1)), axis=1)
        self._replace(node, b.op("quant.scaled_experts", [*routed, *gate_up, *down, *biases], attrs))

    def _quantised_weight(self, value: Value, dtype: DType, interleaved: bool = False) -> tuple[Value, Value]:
        """Codes and scales as new weights. `interleaved`: rows alternate gate, up; stored as gate rows, then up."""
        key = (value, dtype, interleaved)
        if key not in self.weights:
            weight = value.weight
            assert weight is not None
            pair = _BlockCodes(weight, dtype, self.q.block, interleaved)
            codes_type = weight.type.with_dtype(dtype)
            self.weights[key] = (
                self._add(weight, "codes", codes_type, pair, 0),
                self._add(weight, "scale", scale_type(codes_type, self.q.block), pair, 1),
            )
        return self.weights[key]

    def _add(self, weight: Weight, what: str, type: TensorType, pair: _BlockCodes, part: int) -> Value:
        source = None if weight.source is None else ComputedSource(lambda: pair.load()[part])
        return self.graph.add_weight(Weight(self.graph.fresh_weight_name(f"{weight.name}.{what}"), type, source))


class _BlockCodes:
    """Codes and scales of a weight, computed together when the first of them is read."""

    def __init__(self, weight: Weight, dtype: DType, block: tuple[int, int], interleaved: bool):
        self.weight, self.dtype, self.block, self.interleaved = weight, dtype, block, interleaved
        self._lock = threading.Lock()
        self._pair: tuple[torch.Tensor, torch.Tensor] | None = None

    def load(self) -> tuple[torch.Tensor, torch.Tensor]:
        with self._lock:
            if self._pair is None:
                self._pair = self._compute()
            return self._pair

    def _compute(self) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.weight.load().to(torch.float32)
        name = self.weight.name
        require_finite(name, x, block=self.block, hint=f"keep=({name!r},) leaves it as it is, unquantised")
        if self.interleaved:
            x = torch.cat([x[:, 0::2], x[:, 1::2]], dim=1)
        codes, scale = quantize_blocks(x.contiguous(), self.block, self.dtype)
        return codes, scale.contiguous()
