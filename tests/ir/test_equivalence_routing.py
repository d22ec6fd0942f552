"""The judge of rewrites on MoE layers: it finds routers, pins their choices, and sees what is wrong for ties only."""

import pytest
import torch

from moec.ir.equivalence import Oracle, first_difference
from moec.ir.promote import promote
from moec.ir.routers import PINS, pinned, router_logits

from .samples import MOE, T, graph_of, moe, seeded


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
