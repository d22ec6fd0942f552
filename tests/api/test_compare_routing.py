"""`moec.compare` where tokens are routed: near ties are followed, other choices and wrong weights are faults."""

from __future__ import annotations

import pytest
import torch

import moec
from moec.testing import assert_backends_agree

from .faulty import FaultyBackend
from .samples import bind

ROUTED = """
graph(%x: f32[T, 16]) -> (%y: f32[T, 16], %experts: i64[T, 2]) {
  weight @gate: f32[8, 16]
  weight @bias: f32[8]
  weight @gate_up: f32[8, 24, 16]
  weight @down: f32[8, 16, 12]
  %0: f32[T, 8] = linear.linear(%x, @gate) loc("gate" "m.py":1) origin("logits")
  %1: f32[T, 2], %2: i64[T, 2] = moe.route(%0, @bias) {k=2, scoring="sigmoid", n_group=4, topk_group=2} loc("" "m.py":2)
  %3: f32[T, 16] = moe.experts(%x, %1, %2, @gate_up, @down) loc("experts" "m.py":3) origin("experts")
  %4: f32[T, 16] = math.add(%x, %3) loc("add" "m.py":4) origin("sum")
  return %4, %2
}
"""


@pytest.fixture
def routed():
    graph = bind(moec.parse(ROUTED))
    return graph, torch.randn(6, 16, generator=torch.Generator().manual_seed(3))


def swap(value, tensor):
    """Another choice of experts for token 2: its second expert becomes one that it does not have."""
    tensor = tensor.clone()
    if value.index == 1:
        tensor[2, 1] = next(e for e in range(8) if e not in tensor[2].tolist())
    return tensor


def test_routing_agrees(routed):
    graph, x = routed
    assert_backends_agree(graph, (x,))
    assert_backends_agree(graph, (x,), isolated=True)


def test_a_routing_flip_without_a_tie_is_an_error(routed):
    graph, x = routed
    comparison = moec.compare(graph, (x,), backends=("reference", FaultyBackend("moe.route", swap)))
    flip = comparison.routing_flips[0]
    assert flip.token == 2
    assert flip.margin > 0
    assert not flip.near_tie
    assert not comparison.ok
    assert "NOT a near tie" in str(comparison)


def test_a_near_tie_is_reported_and_the_comparison_goes_on(routed):
    graph, x = routed
    gate = graph.weights["gate"].weight.load().clone()
    bias = torch.zeros(8)
    gate[1] = gate[0]  # experts 0 and 1 tie for every token
    bias[:2] = 9.0  # and are chosen with certainty, one of them second
    graph.bind_weights({"gate": gate, "bias": bias})

    def reorder(value, tensor):
        return tensor.flip(1) if value.producer.op == "moe.route" else tensor

    comparison = moec.compare(graph, (x,), backends=("reference", FaultyBackend("moe.route", reorder)))
    assert comparison.routing_flips == []  # the same sets of experts, in another order
    assert comparison.first_divergence is None
    assert comparison.ok

    node = graph.find("moe.route")[0]
    tied = dict(node.attrs) | {"k": 1, "n_group": 1, "topk_group": 1}
    graph = _with_one_expert(graph, tied)

    def other(value, tensor):
        if value.index != 1:
            return tensor
        return torch.where(tensor == 0, 1, tensor)

    comparison = moec.compare(graph, (x,), backends=("reference", FaultyBackend("moe.route", other)))
    assert len(comparison.routing_flips) == 6
    assert all(f.near_tie and f.margin < 1e-6 for f in comparison.routing_flips)
    assert comparison.first_divergence is None  # the reference was run again with the other's experts
    assert comparison.ok


def _with_one_expert(graph, attrs):
    text = str(graph).replace('k=2, scoring="sigmoid", n_group=4, topk_group=2', 'k=1, scoring="sigmoid"')
    text = text.replace("f32[T, 2]", "f32[T, 1]").replace("i64[T, 2]", "i64[T, 1]")
    changed = moec.parse(text)
    changed.bind_weights({n: v.weight.load() for n, v in graph.weights.items()})
    return changed


def test_weights_of_the_router_are_judged_where_its_choice_is_pinned(routed):
    """Near-tied tokens go on with the other's experts, not with its weights."""
    graph, x = routed
    gate = graph.weights["gate"].weight.load().clone()
    gate[1::2] = gate[::2]  # pairs of experts tie for every token
    graph.bind_weights({"gate": gate, "bias": torch.zeros(8)})
    graph = _with_one_expert(graph, {})

    def swapped(value, tensor):
        if value.index == 0:
            return tensor * 1.01
        return tensor ^ 1  # the other of each pair

    found = moec.compare(graph, (x,), backends=("reference", FaultyBackend("moe.route", swapped)))
    assert found.routing_flips
    assert all(f.near_tie for f in found.routing_flips)
    assert not found.ok
    assert found.first_divergence.node.op == "moe.route"
    healthy = moec.compare(
        graph, (x,), backends=("reference", FaultyBackend("moe.route", lambda v, t: t ^ 1 if v.index else t))
    )
    assert healthy.ok, str(healthy)


def test_routing_in_processes_of_their_own(routed):
    graph, x = routed
    gate = graph.weights["gate"].weight.load().clone()
    gate[:] = gate[0] * (1 + 1e-7 * torch.arange(8))[:, None]  # all experts nearly tie
    graph.bind_weights({"gate": gate})
    here, there = (moec.compare(graph, (x,), processes=apart) for apart in (False, True))
    assert here.ok
    assert there.ok
    assert here.to_dict()["routing_flips"] == there.to_dict()["routing_flips"]
