"""What graphs are run on to be compared: sizes that fit them, inputs in their roles, weights."""

import pytest
import torch

from moec.ir import Builder, CompileError, Graph, TensorType, parse
from moec.ir.cases import index_bound, make_inputs, with_data
from moec.ir.equivalence import Oracle, bindings, first_difference

from .samples import B, S, T, graph_of, seeded

# -- sizes ----------------------------------------------------------------------------------------


def test_three_bindings_and_zero():
    found = bindings(graph_of(lambda b, x: b.exp(x), shape=(B, S, 4)))
    assert {"B": 1, "S": 1} in found
    assert {"B": 3, "S": 5} in found
    assert sum(0 not in b.values() for b in found) == 3
    assert {b["B"] for b in found if 0 in b.values()} == {0, 5}  # each symbol 0 in turn, the other odd
    assert all(b["B"] != b["S"] for b in found if 0 not in b.values() and 1 not in b.values())


def test_sizes_respect_slices():
    found = bindings(graph_of(lambda b, x: b.slice(x, axis=0, start=1, end=4)))
    assert len(found) >= 3
    assert all(b["T"] >= 4 for b in found)


def test_sizes_respect_tables():
    table = seeded(6, 2)

    def body(b, x, w):
        return b.add(b.sum(x, axes=(1,), keepdim=True), b.gather(w, b.arange(end=T)))

    found = bindings(graph_of(body, weights={"w": table}))
    assert len([b for b in found if b["T"]]) >= 3
    assert all(b["T"] <= 6 for b in found)


def test_sizes_respect_differences():
    found = bindings(graph_of(lambda b, x: b.slice(x, axis=0, start=S, end=T), shape=(T, S)))
    assert len([b for b in found if b["S"]]) >= 3
    assert all(b["S"] <= b["T"] for b in found)


def test_no_size_fits():
    graph = graph_of(lambda b, x: b.slice(x, axis=0, start=0, end=1000))
    with pytest.raises(CompileError, match="no sizes for T fit the graph"):
        bindings(graph)


def test_a_graph_that_cannot_run_says_why():
    graph = graph_of(lambda b, x, w: b.gather(w, b.const([7], "i64", (1,))), weights={"w": seeded(3, 2)})
    with pytest.raises(CompileError, match=r"tensor\.gather failed"):
        Oracle(graph)


def test_static_graphs_get_three_seeds():
    oracle = Oracle(graph_of(lambda b, x: b.exp(x), shape=(2, 3)))
    normal = [c for c in oracle.cases if c.label.startswith("seed") and "," not in c.label]
    assert len({float(c.inputs[0].sum()) for c in normal}) == len(normal) == 3


# -- inputs and weights ---------------------------------------------------------------------------


ROLES = """
graph(%ids: i64[B, S], %position_ids: i32[B, S], %mask: i64[B, S], %keep: bool[B, 1, S, S], %extra_mask: f32[S],
      %offsets: i32[4], %x: f32[B*S, 8]) -> (%a: f32[B*S, 16], %b: f32[B*S, 4], %c: bool[B, S], %d: bool[B, 1, S, S],
      %e: f32[S], %f: f32[B*S, 3]) {
  weight @embed: f32[11, 16]
  weight @table: f32[13, 4]
  weight @grouped: f32[4, 8, 3]
  %0: i64[B*S] = tensor.reshape(%ids) {shape=[B*S]}
  %1: f32[B*S, 16] = tensor.gather(@embed, %0)
  %2: i32[B*S] = tensor.reshape(%position_ids) {shape=[B*S]}
  %3: f32[B*S, 4] = tensor.gather(@table, %2)
  %4: bool[B, S] = math.cast(%mask) {dtype=bool}
  %5: bool[B, 1, S, S] = math.not(%keep)
  %6: f32[S] = math.exp(%extra_mask)
  %7: f32[B*S, 3] = linear.grouped_matmul(%x, @grouped, %offsets)
  return %1, %3, %4, %5, %6, %7
}
"""


def test_inputs_fit_their_roles():
    graph = parse(ROLES)
    binding = {"B": 2, "S": 9}
    ids, positions, mask, keep, extra, offsets, x = make_inputs(graph, binding)
    assert 0 <= ids.min() <= ids.max() == 10  # 18 draws of 11
    steps = set(positions.diff(dim=-1).reshape(-1).tolist())
    assert 1 in steps
    assert min(steps) < 0
    assert set(mask.reshape(-1).tolist()) == {0, 1}
    assert mask[:, 0].all()
    assert keep.any(-1).all()
    assert not keep.all()
    assert set(extra.tolist()) == {0.0, -1e4}
    assert offsets.tolist() == sorted(offsets.tolist())
    assert offsets[-1] == 18
    assert x.shape == (18, 8)
    assert torch.equal(make_inputs(graph, binding)[6], x)
    assert not torch.equal(make_inputs(graph, binding, seed=1)[6], x)
    assert len(bindings(graph)) >= 3


def test_chosen_experts_are_distinct():
    graph = parse("""
graph(%weights: f32[T, 3], %experts: i64[T, 3]) -> (%y: f32[T, 5]) {
  %0: f32[T, 5] = tensor.full() {shape=[T, 5], value=0.0, dtype=f32}
  %1: f32[T, 5] = tensor.scatter_elements(%0, %experts, %weights) {axis=1}
  return %1
}
""")
    _, experts = make_inputs(graph, {"T": 50})
    assert all(len(set(row)) == 3 for row in experts.tolist())
    assert set(experts.reshape(-1).tolist()) == set(range(5))


def test_positions_beyond_the_table_start_again():
    graph = parse(ROLES)
    positions = make_inputs(graph, {"B": 1, "S": 29})[1]
    assert 0 <= positions.min() <= positions.max() == 12


def test_a_rule_that_takes_positions_for_a_range_is_seen():
    def cached(body):
        graph = Graph()
        positions = graph.add_input("position_ids", TensorType("i64", (B, S)))
        graph.add_output(body(Builder(graph), positions))
        return graph

    before = cached(lambda b, p: b.cast(p, dtype="f32"))
    after = cached(lambda b, p: b.expand(b.cast(b.arange(end=S), dtype="f32"), shape=(B, S)))
    assert first_difference(before, after) is not None


def test_indices_are_found_through_functions():
    graph = parse("""
graph(%ids: i64[S]) -> (%y: f32[S, 2]) {
  %0: f32[S, 2] = call.graph(%ids) {callee="embed", dims=[["N", S]]}
  return %0
}
function @embed(%i: i64[N]) -> (%o: f32[N, 2]) {
  weight @w: f32[3, 2]
  %0: f32[N, 2] = tensor.gather(@w, %i)
  return %0
}
""")
    assert index_bound(graph.inputs[0], {"S": 4}) == 3
    assert len(bindings(graph)) >= 3


def test_tables_of_placed_experts_fit():
    text = """
graph(%x: f32[T, 8], %weights: f32[T, 2], %experts: i64[T, 2]) -> (%y: f32[T, 8]) {
  weight @gate_up: f32[3, 6, 8]
  weight @down: f32[3, 8, 3]
  weight @table: i64[2, 2]
  weight @count: i64[2]
  %0: i64[T, 2] = moe.remap(%experts, @table, @count)
  %1: f32[T, 8] = moe.experts(%x, %weights, %0, @gate_up, @down)
  return %1
}
"""
    for seed in range(8):
        graph = with_data(parse(text), seed)
        table, count = (graph.weights[n].weight.load() for n in ("table", "count"))
        assert 0 <= table.min() <= table.max() < 3
        assert 1 <= count.min() <= count.max() <= 2
        Oracle(graph)


def test_weights_without_data_depend_on_their_name_only():
    text = "graph(%x: f32[T]) -> (%y: f32[T]) {{\n weight @{}: f32[4]\n %0: f32[T] = math.exp(%x)\n return %0\n}}"
    a, b = (with_data(parse(text.format(n))) for n in ("a", "b"))
    again = with_data(parse(text.format("a")))
    assert torch.equal(a.weights["a"].weight.load(), again.weights["a"].weight.load())
    assert not torch.equal(a.weights["a"].weight.load(), b.weights["b"].weight.load())
    graph = parse(text.format("a"))
    with_data(graph)
    assert graph.weights["a"].weight.source is None  # the given graph stays


def test_nan_everywhere_is_tried_again_with_positive_inputs():
    oracle = Oracle(graph_of(lambda b, x: b.log(b.amin(x, axes=(-1,)))))
    assert any("positive" in c.label for c in oracle.cases)
    assert oracle.vacuous() == []
    assert Oracle(graph_of(lambda b, x: b.log(b.neg(b.exp(x))))).vacuous() == ["y"]
