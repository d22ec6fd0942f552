"""The judge of rewrites judged: what it runs graphs on, and that small and rare mistakes do not pass."""

import math

import pytest
import torch

from moec.ir import Builder, CompileError, ComputedSource, Dim, Graph, TensorType, Weight, parse
from moec.ir.cases import index_bound, make_inputs, with_data
from moec.ir.equivalence import Oracle, bindings, compare, first_difference
from moec.ir.promote import promote
from moec.ir.routers import PINS, pinned, router_logits

T, S, B = Dim("T"), Dim("S"), Dim("B")


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def graph_of(body, *, dtype="f32", shape=(T, 8), weights=None, name="y"):
    graph = Graph()
    x = graph.add_input("x", TensorType(dtype, shape))
    values = [graph.add_weight(Weight.of(n, w)) for n, w in (weights or {}).items()]
    out = body(Builder(graph), x, *values)
    for i, v in enumerate(out if isinstance(out, tuple) else (out,)):
        graph.add_output(v, name if not i else f"{name}{i}")
    graph.verify()
    return graph


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


# -- what must not pass ---------------------------------------------------------------------------


def scaled(b, x):
    return b.mul(b.exp(x), 2.0)


def test_equal_graphs_are_equal():
    assert first_difference(graph_of(scaled), graph_of(lambda b, x: b.add(b.exp(x), b.exp(x)))) is None


@pytest.mark.parametrize("error", [1e-2, 1e-4, 1e-7])
def test_a_perturbed_output_is_seen(error):
    found = first_difference(graph_of(scaled), graph_of(lambda b, x: b.mul(b.mul(b.exp(x), 2.0), 1 + error)))
    assert found.output == "y"
    assert found.max_error == pytest.approx(abs(found.expected) * error, rel=1e-3)
    assert found.tolerance < found.max_error
    assert "expected" in str(found)
    assert "T=1" in str(found)


def test_a_perturbed_constant_is_seen():
    before = graph_of(lambda b, x: b.mul(b.tanh(b.mul(x, 0.7978845608)), 0.5))
    assert first_difference(before, graph_of(lambda b, x: b.mul(b.tanh(b.mul(x, 0.7978845)), 0.5))) is None
    found = first_difference(before, graph_of(lambda b, x: b.mul(b.tanh(b.mul(x, 0.80)), 0.5)))
    assert found is not None


def test_the_constants_slack_is_that_of_its_dtype():
    before = graph_of(lambda b, x: b.mul(x, 0.7978845608), dtype="bf16")
    assert first_difference(before, graph_of(lambda b, x: b.mul(x, 0.796875), dtype="bf16")) is None  # its nearest bf16
    assert first_difference(before, graph_of(lambda b, x: b.mul(x, 0.7978845608 * 1.01), dtype="bf16")) is not None


def linear(w):
    return graph_of(lambda b, x, v: b.linear_linear(x, v), weights={"w": w})


def with_computed(graph, name, compute):
    value = graph.weights[name]
    value.weight = Weight(name, value.type, ComputedSource(compute))
    return graph


def test_a_perturbed_weight_is_seen():
    w = seeded(5, 8)
    wrong = w.clone()
    wrong[3, 2] *= 1.01
    assert first_difference(linear(w), linear(w.clone())) is None
    assert first_difference(linear(w), linear(wrong)) is not None


def test_a_fold_of_weights_is_exact_and_a_wrong_one_is_seen():
    w, g = Weight.of("w", seeded(5, 8)), Weight.of("g", seeded(8, seed=1))
    before = graph_of(lambda b, x, v, s: b.linear_linear(b.mul(x, s), v), weights={"w": w.load(), "g": g.load()})

    def after(compute):
        return with_computed(linear(w.load()), "w", compute)

    assert first_difference(before, after(lambda: w.load() * g.load())) is None
    # computed in f32 whatever is loaded: the fold's own rounding is no error
    assert first_difference(before, after(lambda: w.load().float() * g.load().float())) is None
    assert first_difference(before, after(lambda: w.load() * g.load() * 1.01)) is not None
    assert first_difference(before, after(lambda: (w.load() * g.load()).to(torch.bfloat16))) is not None


def test_folding_in_f32_is_no_error():
    w = seeded(8)
    before = graph_of(lambda b, x, v: b.mul(x, b.cos(b.exp(v))), weights={"w": w})
    folded = graph_of(lambda b, x, v: b.mul(x, v), weights={"w": w.exp().cos()})
    assert first_difference(before, folded) is None
    wrong = graph_of(lambda b, x, v: b.mul(x, v), weights={"w": w.exp().cos() * 1.0001})
    assert first_difference(before, wrong) is not None


def moe(b, x, router, gate_up, down, *, k=2):
    weights, experts = b.route(b.linear_linear(x, router), k=k)
    return b.op("moe.experts", [x, weights, experts, gate_up, down])


MOE = {"router": seeded(6, 8), "gate_up": seeded(6, 10, 8, seed=1), "down": seeded(6, 8, 5, seed=2)}


@pytest.mark.parametrize("expert", range(6))
def test_one_experts_perturbed_weight_is_seen(expert):
    wrong = MOE["down"].clone()
    wrong[expert, 0, 0] *= 1.01
    assert first_difference(graph_of(moe, weights=MOE), graph_of(moe, weights={**MOE, "down": wrong})) is not None


def test_the_order_of_routing_is_seen():
    def swapped(b, x, router, gate_up, down):
        weights, experts = b.route(b.linear_linear(x, router), k=2)
        order = b.const([1, 0], "i64", (2,))
        return b.op("moe.experts", [x, weights, b.gather(experts, order, axis=1), gate_up, down])

    assert first_difference(graph_of(moe, weights=MOE), graph_of(swapped, weights=MOE)) is not None


def unfused(b, x, router, gate_up, down):
    """The routing of Mixtral by softmax and topk."""
    probabilities, experts = b.topk(b.softmax(b.linear_linear(x, router), axis=-1), k=2)
    return b.op("moe.experts", [x, b.div(probabilities, b.sum(probabilities, axes=(-1,), keepdim=True)), experts,
                                gate_up, down])  # fmt: skip


def test_routers_are_found_in_other_forms():
    for body in (moe, unfused):
        graph = promote(graph_of(body, weights=MOE))
        assert [v.producer.op for v in router_logits(graph)] == ["linear.linear"]
    oracle = Oracle(graph_of(unfused, weights=MOE))
    assert {c.pin for c in oracle.cases} == {None, *PINS}
    assert {"T": 0} in [dict(c.binding) for c in oracle.cases]
    assert oracle.difference(graph_of(moe, weights=MOE)) is None


def test_a_router_with_bias_is_pinned_where_both_forms_agree():
    bias = seeded(6, seed=5)

    def added(b, x, router, gate_up, down, v):
        weights, experts = b.route(b.add(b.linear_linear(x, router), v), k=2, scoring="topk_softmax")
        return b.op("moe.experts", [x, weights, experts, gate_up, down])

    def inside(b, x, router, gate_up, down, v):
        weights, experts = b.route(b.linear_linear(x, router, v), k=2, scoring="topk_softmax")
        return b.op("moe.experts", [x, weights, experts, gate_up, down])

    weights = {**MOE, "bias": bias}
    assert first_difference(graph_of(added, weights=weights), graph_of(inside, weights=weights)) is None


def test_a_score_bias_and_groups_lead_to_the_logits():
    def body(b, x, router, gate_up, down, v):
        scores = b.sigmoid(b.linear_linear(x, router))
        choice = b.add(scores, v)
        grouped = b.reshape(choice, shape=(T, 2, 3))
        best, _ = b.topk(grouped, k=2)
        _, group = b.topk(b.sum(best, axes=(-1,)), k=1)
        mask = b.scatter_elements(b.full(shape=(T, 2), value=0.0, dtype="f32"), group,
                                  b.full(shape=(T, 1), value=1.0, dtype="f32"), axis=1)  # fmt: skip
        keep = b.expand(b.reshape(mask, shape=(T, 2, 1)), shape=(T, 2, 3))
        _, experts = b.topk(b.mul(choice, b.reshape(keep, shape=(T, 6))), k=2)
        return b.op("moe.experts", [x, b.gather_elements(scores, experts, axis=1), experts, gate_up, down])

    graph = promote(graph_of(body, weights={**MOE, "bias": seeded(6, seed=5)}))
    assert [v.producer.op for v in router_logits(graph)] == ["linear.linear"]


def test_experts_may_come_first_in_the_scores():
    def body(b, x, router, gate_up, down):
        scores = b.softmax(b.transpose(b.linear_linear(x, router), perm=(1, 0)), axis=0)
        weights, experts = b.topk(scores, k=2, axis=0)
        chosen = (b.transpose(v, perm=(1, 0)) for v in (weights, experts))
        return b.op("moe.experts", [x, *chosen, gate_up, down])

    graph = promote(graph_of(body, weights=MOE))
    assert [v.producer.op for v in router_logits(graph)] == ["linear.linear"]


def test_pinned_logits():
    logits = torch.randn(13, 5)
    assert pinned(logits, "ties").unique().tolist() == [0]
    assert pinned(logits, "one expert").argmax(-1).unique().tolist() == [4]
    turn = pinned(logits, "experts in turn")
    assert turn.argmax(-1).tolist() == [r % 5 for r in range(13)]
    some = pinned(logits, "some ties")
    assert all(len(row.unique()) < 5 for row in some)
    assert len({tuple(row.tolist()) for row in some}) > 1
    for pin in PINS:
        assert pinned(torch.randn(0, 5), pin).shape == (0, 5)
        assert pinned(torch.randn(2, 3, 5), pin).shape == (2, 3, 5)


def only_where(condition):
    """x, but 1 more where a condition on T holds."""

    def body(b, x):
        wrong = b.cast(condition(b, b.dim(value=T)), dtype="f32")
        return b.add(b.sum(x, axes=(0,)), wrong)

    return graph_of(body)


@pytest.mark.parametrize(
    ("condition", "seen_at"),
    [
        (lambda b, t: b.eq(t, 1), "T=1"),
        (lambda b, t: b.eq(t, 0), "T=0"),
        (lambda b, t: b.and_(b.gt(t, 1), b.eq(b.mod(t, 2), 1)), "T=3"),
        (lambda b, t: b.gt(t, 7), "T=11"),
    ],
    ids=["one", "zero", "odd", "larger"],
)
def test_wrong_at_some_sizes_only(condition, seen_at):
    before = graph_of(lambda b, x: b.sum(x, axes=(0,)))
    found = first_difference(before, only_where(condition))
    assert found.case.label == seen_at
    assert found.max_error == pytest.approx(1)
    assert first_difference(before, only_where(lambda b, t: b.eq(t, 1000))) is None


def test_wrong_for_ties_only():
    def last_wins(b, x, router, gate_up, down):
        backwards = b.const([5, 4, 3, 2, 1, 0], "i64", (6,))
        weights, experts = b.route(b.gather(b.linear_linear(x, router), backwards, axis=1), k=2)
        return b.op("moe.experts", [x, weights, b.sub(5, experts), gate_up, down])

    # the logits are the graph's input, which the second graph sees only backwards
    graph = graph_of(lambda b, x, r: b.topk(x, k=2)[1], weights={"r": seeded(1)})

    def reversed_topk(b, x, r):
        backwards = b.const([7, 6, 5, 4, 3, 2, 1, 0], "i64", (8,))
        return b.sub(7, b.topk(b.gather(x, backwards, axis=1), k=2)[1])

    found = first_difference(graph, graph_of(reversed_topk, weights={"r": seeded(1)}))
    assert found is not None
    assert "ties" in found.case.label
    found = first_difference(graph_of(moe, weights=MOE), graph_of(last_wins, weights=MOE))
    assert found is not None
    assert "ties" in found.case.label


def test_another_signature():
    before = graph_of(scaled)
    assert "outputs are (z: f32[T, 8]), expected (y: f32[T, 8])" in str(
        first_difference(before, graph_of(scaled, name="z"))
    )
    other = first_difference(before, graph_of(lambda b, x: b.cast(scaled(b, x), dtype="f64")))
    assert "f64[T, 8]" in other.reason
    assert first_difference(before, graph_of(lambda b, x: (scaled(b, x), x))) is not None
    assert "inputs" in first_difference(before, graph_of(scaled, dtype="bf16")).reason


def test_a_graph_that_fails_at_some_size():
    before = graph_of(lambda b, x: b.sum(b.mul(x, x), axes=(0,)))

    def body(b, x, w):
        return b.sum(b.mul(b.mul(x, x), b.gather(w, b.arange(end=T))), axes=(0,))

    found = first_difference(before, graph_of(body, weights={"w": torch.ones(4, 1)}))
    assert found.output is None
    assert "fails" in found.reason
    assert found.case.label == "T=11"


def test_a_dropped_rounding_is_seen():
    before = graph_of(lambda b, x: b.cast(b.cast(x, dtype="f16"), dtype="f32"))
    assert first_difference(before, graph_of(lambda b, x: b.mul(x, 1.0))) is not None
    model = graph_of(lambda b, x: b.cast(b.exp(b.cast(x, dtype="f32")), dtype="bf16"), dtype="bf16")
    assert first_difference(model, graph_of(lambda b, x: b.exp(x), dtype="bf16")) is None


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
def test_nan_and_infinities_must_agree(dtype):
    clean = graph_of(lambda b, x: b.exp(x), dtype=dtype)
    nan = graph_of(lambda b, x: b.add(b.exp(x), b.log(b.neg(b.exp(x)))), dtype=dtype)
    infinite = graph_of(lambda b, x: b.div(b.exp(x), 0.0), dtype=dtype)
    for a, b in [(clean, nan), (nan, clean), (clean, infinite), (infinite, clean), (nan, infinite)]:
        assert first_difference(a, b) is not None
    for g in (nan, infinite):
        assert first_difference(g, g.clone()) is None


def test_integers_are_equal_or_not():
    before = graph_of(lambda b, x: b.argmax(x))
    assert first_difference(
        before, graph_of(lambda b, x: b.add(b.argmax(x), b.cast(b.eq(b.argmax(x), 7), dtype="i64")))
    )


def test_given_inputs_are_the_only_case():
    graph = graph_of(scaled)
    oracle = Oracle(graph, inputs=[torch.full((2, 8), 0.5)])
    assert [c.label for c in oracle.cases] == ["the given inputs"]
    assert oracle.difference(graph_of(lambda b, x: b.mul(b.exp(x), 2.02))).expected == pytest.approx(
        2 * 0.5**0 * 1.6487212707
    )


def test_a_tolerance_replaces_the_default():
    wrong = graph_of(lambda b, x: b.mul(b.exp(x), 2.002))
    assert first_difference(graph_of(scaled), wrong) is not None
    assert first_difference(graph_of(scaled), wrong, tolerance=1e-2) is None
    assert first_difference(graph_of(scaled), wrong, tolerance=1e-4) is not None


def test_f32_inside_quantised_ops_is_allowed_for_and_no_more():
    codes = {"w": seeded(6, 8).to(torch.float8_e4m3fn), "w_scale": seeded(3, 2).abs() + 0.1}

    def fused(b, x, w, s, factor=1.0):
        q, qs = b.quantize(x, block=(1, 4))
        y = b.scaled_linear(q, qs, w, s, block=(2, 4), group=4)
        return b.mul(y, factor)

    def split(b, x, w, s):
        q, qs = b.quantize(x, block=(1, 4))
        return b.linear_linear(b.dequantize(q, qs, block=(1, 4)), b.dequantize(w, s, block=(2, 4)))

    before = graph_of(fused, weights=codes)
    assert first_difference(before, graph_of(split, weights=codes)) is None
    assert first_difference(before, graph_of(lambda b, *v: fused(b, *v, factor=1.001), weights=codes)) is not None


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ([1.0, 2.0], [1.0, 2.0 + 1e-10], True),
        ([1.0, 2.0], [1.0, 2.0 + 1e-8], False),
        ([1e-30, 1.0], [0.0, 1.0], True),  # small against the largest
        ([0.0, 0.0], [0.0, 1e-30], False),  # nothing to be relative to
        ([float("nan"), 1.0], [float("nan"), 1.0], True),
        ([float("nan"), 1.0], [1.0, 1.0], False),
        ([1.0, 1.0], [float("nan"), 1.0], False),
        ([float("inf"), 1.0], [float("inf"), 1.0], True),
        ([float("inf"), 1.0], [-float("inf"), 1.0], False),
        ([float("inf"), 1.0], [1.0, 1.0], False),
        ([1.0, 1.0], [float("inf"), 1.0], False),
    ],
)
def test_compare(a, b, equal):
    found = compare(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64), 1e-9)
    assert (found is None) == equal


def test_slack_cannot_hide_one_percent():
    a = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert compare(a, a * 1.0039, 1e-9, slack=math.inf) is None
    assert compare(a, a * 1.01, 1e-9, slack=math.inf) is not None


def test_compare_other_kinds():
    assert compare(torch.tensor([1, 2]), torch.tensor([1, 3]), 1.0)[3] == (1,)
    assert compare(torch.tensor(True), torch.tensor(False), 1.0) is not None
    assert compare(torch.zeros(0, 3), torch.zeros(0, 3), 1e-9) is None
    assert compare(torch.zeros(0, 3), torch.zeros(3, 0), 1e-9) is not None
    codes = torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)
    assert compare(codes, torch.tensor([1.0, 2.25]).to(torch.float8_e4m3fn), 1.0) is not None
    assert compare(codes, codes.clone(), 0.0) is None
