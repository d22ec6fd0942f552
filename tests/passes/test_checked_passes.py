"""Passes that the default pipeline runs last or only on request, on fused graphs of real families."""

from pathlib import Path

import numpy as np
import pytest
import torch

import moec.backends.onnxruntime
import moec.backends.triton
from moec.checks import apply_checked, check_idempotent, describe
from moec.ir import Graph, Mesh, Placement, Quantization, Weight, opdef, parse, require
from moec.ir.cases import with_data
from moec.ir.equivalence import first_difference
from moec.ir.ops.block_codes import dequantize_blocks, quantize_blocks
from moec.passes import DropBroadcasts, Legalise, PlaceExperts, QuantizeWeights, default_pipeline
from moec.testing import check_pass, check_unchanged

GRAPHS = Path(__file__).parent.parent / "graphs"
# softmax and sigmoid routing, groups, shared experts; a cache; biases and clamps, interleaved
CHOSEN = ["mixtral.sdpa.grouped.prefill", "deepseek_v3.sdpa.grouped.decode", "gpt_oss.eager.batched.masked"]
BLOCK = Quantization(block=(16, 16), group=8, activations=None, min_coverage=0.0)


@pytest.fixture(scope="module")
def fused():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    for name in CHOSEN:
        graph = with_data(parse((GRAPHS / f"{name}.ir").read_text()))
        found[name], _ = default_pipeline().run(graph)
    yield found
    torch.set_num_threads(before)


def experts(graph: Graph) -> list:
    return graph.find("moe.experts")


def placement(layers: int, num_experts: int, extra: int) -> Placement:
    """Every expert once and `extra` copies, in an order of its own per layer."""
    r = np.random.default_rng(0)
    rows = [r.permutation([*range(num_experts), *r.integers(0, num_experts, extra)]) for _ in range(layers)]
    return Placement(Mesh(gpus_per_node=1, slots_per_gpu=num_experts + extra), np.stack(rows))


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("name", CHOSEN)
def test_placed_experts_mean_the_same(fused, name, extra):
    graph = fused[name]
    nodes = experts(graph)
    placed = PlaceExperts(placement(len(nodes), nodes[0].operand("gate_up").shape[0], extra))
    result = check_pass(placed, graph)
    assert len(result.find("moe.remap")) == len(nodes)


def test_a_wrong_placement_is_seen(fused):
    graph = fused[CHOSEN[0]]
    nodes = experts(graph)
    right, _ = apply_checked(PlaceExperts(placement(len(nodes), nodes[0].operand("gate_up").shape[0], 3)), graph)
    name = next(n for n in right.weights if n.endswith(".table"))
    table = right.weights[name].weight.load().clone()
    table[:2] = table[:2].flip(0)
    right.weights[name].weight = Weight.of(name, table)
    assert first_difference(graph, right) is not None


@pytest.mark.parametrize("name", CHOSEN)
def test_weight_only_fp8_is_the_graph_with_rounded_weights(fused, name):
    graph = fused[name]
    p = QuantizeWeights(BLOCK)
    result, _ = apply_checked(p, graph)
    check_idempotent(describe(p), [p], result)
    stored = {n.removesuffix(".codes") for n in result.weights if n.endswith(".codes")}
    assert stored
    rounded = graph.clone()
    gates = {n.operand("gate_up").weight.name for n in experts(graph) if n.attrs["interleaved"]}
    for n in stored:
        w = graph.weights[n].weight.load().clone()
        rows = torch.arange(w.shape[-2])
        rows = torch.cat([rows[0::2], rows[1::2]]) if n in gates else rows  # stored in this order
        w[..., rows, :] = dequantize_blocks(*quantize_blocks(w[..., rows, :], BLOCK.block), BLOCK.block)
        rounded.weights[n].weight = Weight.of(n, w)
    assert first_difference(rounded, result) is None
    # as quantised weights are no others than these
    assert first_difference(graph, result) is not None


@pytest.mark.parametrize("name", CHOSEN)
def test_w8a8_changes_nothing_twice_and_leaves_its_input(fused, name):
    p = QuantizeWeights(Quantization(block=(16, 16), group=8, min_coverage=0.0))
    result, record = apply_checked(p, fused[name])
    assert record.figures
    assert result.find("quant.quantize")
    check_idempotent(describe(p), [p], result)


@pytest.mark.parametrize("backend", ["onnxruntime", "triton"])
@pytest.mark.parametrize("name", CHOSEN)
def test_legalised_graphs_mean_the_same(fused, name, backend):
    target = getattr(moec.backends, backend).backend
    prepared = target.prepare(fused[name])
    result = check_pass(Legalise(target, "reference"), prepared)
    assert all(target.missing(n) is None or n.opdef.decompose is None for n in result.nodes)


def test_broadcasts_stay_where_a_users_op_takes_equal_shapes_only(monkeypatch):
    monkeypatch.setattr(opdef, "_OPS", dict(opdef._OPS))
    monkeypatch.setattr(opdef, "_BARE", {k: list(v) for k, v in opdef._BARE.items()})

    @opdef.op("own.pairwise", elementwise=True)
    class Pairwise:
        """a · b of one shape."""

        a: opdef.Operand
        b: opdef.Operand

        def infer(self):
            require(self.a == self.b, f"a is {self.a}, b is {self.b}")
            return self.a

        def reference(self):
            return self.a * self.b

    graph = """
graph(%x: f32[T, 4], %row: f32[4]) -> (%y: f32[T, 4]) {
  %0: f32[T, 4] = tensor.expand(%row) {shape=[T, 4]}
  %1: f32[T, 4] = own.pairwise(%x, %0)
  return %1
}
"""
    check_unchanged(DropBroadcasts(), graph)
