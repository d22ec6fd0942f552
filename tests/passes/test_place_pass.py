"""PlaceExperts changes where experts are and nothing else; expert loads are counted as routed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moec.ir import Builder, CompileError, ComputedSource, Graph, Mesh, Placement, Quantization, TensorType, Weight, run
from moec.passes.calibrate import expert_coactivation, expert_load
from moec.passes.place import PlaceExperts
from moec.passes.placement import place_experts
from moec.passes.quantize import QuantizeWeights

from .placement_cases import moe_graph

MESH = Mesh(1, 4, 2)
REPLICATED = [[3, 4, 4, 5, 0, 1, 1, 2], [5, 5, 5, 4, 3, 2, 1, 0]]


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(tokens, 16, generator=torch.Generator().manual_seed(7)).to(dtype)


def whole(tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return inputs(tokens).round().clamp(-2, 2).to(dtype)


def same_bits(a: Graph, b: Graph, x: torch.Tensor) -> bool:
    return torch.equal(run(a, [x])[0], run(b, [x])[0])


def assert_close(a: Graph, b: Graph, x: torch.Tensor) -> None:
    """Replicas split an expert's rows, and a matrix product of other row counts rounds differently."""
    torch.testing.assert_close(run(a, [x])[0], run(b, [x])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [0, 1, 7, 64])
@pytest.mark.parametrize("options", [{}, {"dtype": "bf16"}, {"biases": True}, {"k": 6}, {"k": 1, "interleaved": True}])
def test_outputs_are_bit_equal(tokens, options):
    g = moe_graph(exact=True, activation="relu", **options)
    text = str(g)
    placed = PlaceExperts(Placement(MESH, REPLICATED)).run(g)
    placed.verify()
    x = whole(tokens, torch.bfloat16 if "dtype" in options else torch.float32)
    assert same_bits(g, placed, x)
    assert str(g) == text
    assert len(placed.find("moe.remap")) == 2


@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"biases": True, "limit": 7.0, "interleaved": True}])
def test_any_weights_to_rounding(options):
    g = moe_graph(layers=1, **options)
    assert_close(g, PlaceExperts(Placement(MESH, REPLICATED[:1])).run(g), inputs(64))


@pytest.mark.parametrize("quantise", [False, True])
def test_a_permutation_is_bit_equal_on_any_weights(quantise):
    g = moe_graph(biases=True)
    g = QuantizeWeights().run(g) if quantise else g
    permuted = PlaceExperts(Placement(Mesh(1, 3, 2), [[5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]])).run(g)
    permuted.verify()
    assert same_bits(g, permuted, inputs(33))
    assert len(permuted.find("moe.remap")) == 1  # layer 1 stays where it is


def test_quantised_experts_are_replicated_with_their_scales():
    g = QuantizeWeights(Quantization(block=(8, 8), group=8)).run(moe_graph(layers=1))
    placed = PlaceExperts(Placement(MESH, REPLICATED[:1])).run(g)
    placed.verify()
    assert_close(g, placed, inputs(33))
    old, new = (
        h.weights[n].weight.load()
        for h, n in ((g, "layers.0.gate_up.scale"), (placed, "layers.0.gate_up.scale.placed"))
    )
    assert torch.equal(new, old[torch.tensor(REPLICATED[0])])


def test_the_test_can_fail():
    """A wrong table must show: the same placement with two experts exchanged."""
    g = moe_graph(exact=True, activation="relu")
    placed = PlaceExperts(Placement(MESH, REPLICATED)).run(g)
    table = placed.weights["placement.0.table"]
    table.weight = Weight.of("placement.0.table", table.weight.load()[[1, 0, 2, 3, 4, 5]])
    assert not same_bits(g, placed, whole(33))


def test_weights_are_built_when_read():
    g = moe_graph(layers=1)
    reads = []
    value = g.weights["layers.0.gate_up"]
    data = value.weight.load()
    value.weight = Weight(value.weight.name, value.type, ComputedSource(lambda: reads.append(1) or data))
    placed = PlaceExperts(Placement(MESH, REPLICATED[:1])).run(g)
    assert not reads
    got = placed.weights["layers.0.gate_up.placed"].weight.load()
    assert reads == [1]
    assert torch.equal(got, data[torch.tensor(REPLICATED[0])])
    assert "layers.0.gate_up" not in placed.weights
    assert "layers.0.gate_up" in g.weights


def test_weights_without_data_keep_their_types():
    g = moe_graph(layers=1)
    value = g.weights["layers.0.down"]
    value.weight = Weight("layers.0.down", value.type)
    placed = PlaceExperts(Placement(MESH, REPLICATED[:1])).run(g)
    new = placed.weights["layers.0.down.placed"]
    assert new.type == TensorType("f32", (8, 16, 8))
    assert new.weight.source is None


def test_computed_expert_weights_are_gathered_in_the_graph():
    g = moe_graph(layers=1)
    node = g.find("moe.experts")[0]
    stored = g.add_weight(Weight.of("transposed", node.operands[3].weight.load().transpose(1, 2).contiguous()))
    g.replace_operand(node, 3, Builder(g, before=node).transpose(stored, perm=(0, 2, 1)))
    g.prune_weights()
    g.verify()
    placed = PlaceExperts(Placement(MESH, REPLICATED[:1])).run(g)
    placed.verify()
    assert len(placed.find("tensor.gather")) == 1
    assert_close(g, placed, inputs(20))


def test_layers_that_share_a_weight_share_it_placed_alike():
    g = moe_graph(exact=True, activation="relu")
    first, second = g.find("moe.experts")
    for i in (3, 4):
        g.replace_operand(second, i, first.operands[i])
    g.prune_weights()
    alike = PlaceExperts(Placement(MESH, [REPLICATED[0]] * 2)).run(g)
    differing = PlaceExperts(Placement(MESH, REPLICATED)).run(g)
    assert sum(".placed" in n for n in alike.weights) == 2
    assert sum(".placed" in n for n in differing.weights) == 4
    for placed in (alike, differing):
        placed.verify()
        assert same_bits(g, placed, whole(20))


def test_tokens_alternate_between_replicas():
    """Replica t mod count: the slots of an expert share its tokens evenly."""
    g = moe_graph(layers=1)
    placed = PlaceExperts(Placement(MESH, REPLICATED[:1])).run(g)
    slots = placed.find("moe.remap")[0].result
    seen = []
    run(placed, [inputs(400)], tap=lambda v, t: seen.append(t) if v is slots else None)
    per_slot = torch.bincount(seen[0].reshape(-1), minlength=8)
    logical = expert_load(g, [inputs(400)])[0]
    assert (per_slot > 0).all()
    assert int(per_slot[1] + per_slot[2]) == logical[4]
    assert abs(int(per_slot[1] - per_slot[2])) < 0.5 * logical[4]


def test_end_to_end_from_measured_load():
    g = moe_graph(experts=12, k=3, exact=True, activation="relu")
    load = expert_load(g, [inputs(300)])
    p = place_experts(load, Mesh(2, 2, 4), coactivation=expert_coactivation(g, [inputs(300)]))
    placed = PlaceExperts(p).run(g)
    assert same_bits(g, placed, whole(50))
    np.testing.assert_array_equal(expert_load(placed, [inputs(300)]), load)


@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_expert_load_counts_assignments(tokens):
    g = moe_graph(k=3)
    routes = [n.results[1] for n in g.find("moe.route")]
    seen = {}
    run(g, [inputs(tokens)], tap=lambda v, t: seen.update({v: t}) if v in routes else None)
    load, pairs = expert_load(g, [inputs(tokens)]), expert_coactivation(g, [inputs(tokens)])
    assert load.shape == (2, 6)
    assert pairs.shape == (2, 6, 6)
    for layer, value in enumerate(routes):
        ids = seen[value].tolist()
        for e in range(6):
            assert load[layer, e] == sum(row.count(e) for row in ids)
            for f in range(6):
                assert pairs[layer, e, f] == (0 if e == f else sum(e in row and f in row for row in ids))


def outlined() -> Graph:
    """The experts inside a called function."""
    inner, outer = moe_graph(layers=1), Graph()
    outer.functions["layer"] = inner
    x = outer.add_input("x", inner.inputs[0].type)
    node = outer.create("call.graph", [x], {"callee": "layer", "dims": tuple(("T", s) for s in x.shape[:1])})
    outer.add_output(node.result)
    return outer


@pytest.mark.parametrize(
    ("graph", "rows", "words"),
    [
        (moe_graph, REPLICATED[:1], ["1 layers", "2 grouped-experts nodes"]),
        (lambda: moe_graph(experts=5), REPLICATED, ["5 experts", "the placement 6"]),
        (lambda: moe_graph(experts=8), REPLICATED, ["8 experts", "the placement 6"]),
        (lambda: PlaceExperts(Placement(MESH, REPLICATED)).run(moe_graph()), REPLICATED, ["already placed"]),
        (outlined, REPLICATED[:1], ["called function", "before it is outlined"]),
        (Graph, REPLICATED, ["2 layers", "0 grouped-experts"]),
    ],
)
def test_errors(graph, rows, words):
    with pytest.raises(CompileError) as e:
        PlaceExperts(Placement(MESH, rows)).run(graph())
    assert all(w in str(e.value) for w in words), str(e.value)


def test_unequal_fractions_are_refused():
    fractions = np.full((1, 8), 1.0)
    fractions[0, 1:3], fractions[0, 5:7] = (0.7, 0.3), 0.5
    p = Placement(MESH, REPLICATED[:1], fractions=fractions)
    with pytest.raises(CompileError, match="unequally"):
        PlaceExperts(p).run(moe_graph(layers=1))


def test_load_errors():
    with pytest.raises(CompileError, match=r"no moe.experts"):
        expert_load(Graph(), [])
    with pytest.raises(CompileError, match="called function"):
        expert_load(outlined(), [inputs(3)])
