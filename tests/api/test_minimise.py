"""Parts of graphs, graphs at other sizes, and the smallest graph that still fails."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import moec
from moec.ir import CompileError, Graph, run
from moec.ir.cases import make_inputs, with_data
from moec.judging import Fault, Judge, attempt, fault_of
from moec.minimise import minimise
from moec.passes import Pass, Pipeline, Rewrite
from moec.subgraph import at_binding, extract, is_solvable, resize, solvable, without_data

from . import wrong_rules as wrong

LAYERS = """
graph(%x: f32[B, S, 64], %ids: i64[B, S]) -> (%y: f32[B*S, 64], %z: f32[B*S, 128]) {
  weight @norm: f32[64]
  weight @up: f32[128, 64]
  weight @down: f32[64, 128]
  %0: f32[B*S, 64] = tensor.reshape(%x) {shape=[B*S, 64]} loc("layers.0" "m.py":1)
  %1: f32[B*S, 64] = norm.rms(%0, @norm) loc("layers.0" "m.py":2)
  %2: f32[B*S, 128] = linear.linear(%1, @up, _) loc("layers.0" "m.py":3)
  %3: f32[] = tensor.constant() {value=[0.5], type=f32[]} loc("layers.0" "m.py":4)
  %4: f32[B*S, 128] = math.mul(%2, %3) loc("layers.0" "m.py":4)
  %5: f32[B*S, 128] = math.silu(%4) loc("layers.0" "m.py":5)
  %6: f32[B*S, 128] = math.tanh(%5) loc("layers.1" "m.py":6)
  %7: f32[B*S, 64] = linear.linear(%6, @down, _) loc("layers.1" "m.py":7)
  %8: f32[B*S, 64] = math.add(%7, %0) loc("layers.1" "m.py":8)
  return %8, %5
}
"""


@pytest.fixture
def graph() -> Graph:
    return moec.parse(LAYERS)


def nodes(graph: Graph, *ops: str):
    return [n for n in graph.nodes if n.op in ops]


# -- parts ---------------------------------------------------------------------------------------------


def test_a_part_has_what_it_needs_and_nothing_else(graph):
    part, mapping = extract(graph, nodes(graph, "linear.linear", "math.mul"))
    part.verify()
    assert [n.op for n in part.nodes] == ["linear.linear", "tensor.constant", "math.mul", "linear.linear"]
    assert [str(v.type) for v in part.inputs] == ["f32[B*S, 64]", "f32[B*S, 128]"]
    assert list(part.weights) == ["up", "down"]
    assert [str(v.type) for v in part.outputs] == ["f32[B*S, 128]", "f32[B*S, 64]"], "what others use"
    assert mapping[nodes(graph, "math.mul")[0].result] is part.outputs[0]
    assert len(graph) == 9, "the original stays"


def test_a_part_computes_what_the_whole_does(graph):
    graph = with_data(graph)
    inputs = make_inputs(graph, {"B": 2, "S": 3})
    seen = {}
    run(graph, inputs, tap=lambda v, t: seen.update({v: t}))
    part, mapping = extract(graph, [n for n in graph.nodes if n.location.under("layers.1")])
    back = {new: old for old, new in mapping.items()}
    part = solvable(part)
    assert is_solvable(part)
    given = [seen[n] for n in (nodes(graph, "math.silu")[0].result, nodes(graph, "tensor.reshape")[0].result)]
    torch.testing.assert_close(run(part, given)[0], seen[nodes(graph, "math.add")[0].result])
    assert back


def test_an_empty_part_and_unsolvable_sizes(graph):
    part, _ = extract(graph, [])
    assert (len(part), part.inputs, part.outputs) == (0, [], [])
    part, _ = extract(graph, nodes(graph, "math.silu"))
    assert not is_solvable(part)
    assert [str(v.type) for v in solvable(part).inputs] == ["f32[T, 128]"]
    both, _ = extract(graph, nodes(graph, "tensor.reshape", "math.silu"))
    assert is_solvable(both), "x gives B and S"
    assert solvable(both) is both


def test_sizes_change_everywhere(graph):
    small = resize(graph, lambda s: 2 if s == 128 else s)
    small.verify()
    assert [str(v.type) for v in small.weights.values()] == ["f32[64]", "f32[2, 64]", "f32[64, 2]"]
    fixed = at_binding(graph, {"B": 0, "S": 3})
    fixed.verify()
    assert str(fixed.outputs[0].type) == "f32[0, 64]"
    assert fixed.symbols == frozenset()
    with pytest.raises(CompileError):
        resize(graph, lambda s: 3 if s == 64 else s, attributes=False)  # the reshape still says 64
    assert all(v.weight.source is None for v in without_data(with_data(graph)).weights.values())


# -- minimising ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NeedsBoth(Pass):
    """Wrong where a graph has a silu and, anywhere, an add: negates the silu."""

    def run(self, graph: Graph) -> Graph:
        graph = graph.clone()
        if graph.find("math.add"):
            for node in graph.find("math.silu"):
                new = graph.create("math.neg", [node.result], before=node._next).result
                for user, i in list(node.result.uses):
                    if user is not new.producer:
                        graph.replace_operand(user, i, new)
        return graph


@dataclass(frozen=True)
class LooksAround(Rewrite):
    """Wrong where the operand is a product and the result meets a tanh: neither is matched."""

    def pattern(self, p, x):
        return p.silu(x)

    def when(self, m):
        if m.x.producer is None or m.x.producer.op != "math.mul":
            return m.no("no product")
        return None if any(u.op == "math.tanh" for u in m.root.users) else m.no("no tanh")

    def replace(self, b, m):
        return b.sigmoid(m.x)


@dataclass(frozen=True)
class WantsWeight(Rewrite):
    """Wrong where the second operand is a weight of 64 rows."""

    def pattern(self, p, x, w):
        return p.linear_linear(x, w, None)

    def when(self, m):
        return None if m.w.weight is not None and m.w.shape[0] == 64 else m.no("not that weight")

    def replace(self, b, m):
        return b.linear_linear(b.neg(m.x), m.w)


def smallest(graph: Graph, p: Pass, seeds=()):
    fault = fault_of(p, graph)
    assert fault is not None
    return minimise(graph, seeds, fault, lambda g, x: fault_of(p, g, x), None)


def test_nodes_far_apart_are_both_kept(graph):
    small = smallest(with_data(graph), NeedsBoth())
    assert [n.op for n in small.graph.nodes] == ["math.silu", "math.tanh", "math.add"], "and what shows the wrong value"
    assert small.inputs is None
    assert {s for v in small.graph.inputs for s in v.shape if isinstance(s, int)} == {2}


def test_a_rule_that_looks_beyond_its_match(graph):
    culprit = moec.bisect(graph, passes=Pipeline((LooksAround(),)))
    assert culprit.culprit == LooksAround()
    assert [n.op for n in culprit.minimised.graph.nodes if n.operands] == ["math.mul", "math.silu", "math.tanh"]


def test_sizes_stay_where_the_fault_needs_them(graph):
    culprit = moec.bisect(graph, passes=Pipeline((WantsWeight(),)))
    (node,) = culprit.minimised.graph.nodes
    assert node.op == "linear.linear"
    assert str(node.operand("weight").type) == "f32[64, 2]"
    assert len(culprit.minimised.graph.weights) == 1
    assert culprit.minimised.graph.weights["down"].weight.source is None


def test_seconds_limit_the_search(graph):
    fault = fault_of(NeedsBoth(), graph)
    small = minimise(graph, (), fault, lambda g, x: fault_of(NeedsBoth(), g, x), None, seconds=0)
    assert len(small.graph) == len(graph), "no time: the whole graph, which does show it"


def test_nothing_where_no_part_fails(graph):
    fault = Fault("numbers", "never seen again")
    assert minimise(graph, nodes(graph, "math.silu"), fault, lambda g, x: None, None) is None
    other = Fault("crash", "a crash of another kind")
    assert minimise(graph, (), fault, lambda g, x: other, None) is None


CALLS = """
graph(%x: f32[T, 8]) -> (%y: f32[T, 8]) {
  %0: f32[T, 8] = call.graph(%x) {callee="layer", dims=[["N", T]]}
  %1: f32[T, 8] = call.graph(%0) {callee="layer", dims=[["N", T]]}
  return %1
}

function @layer(%h: f32[N, 8]) -> (%out: f32[N, 8]) {
  weight @w: f32[8, 8]
  %0: f32[N, 8] = linear.linear(%h, @w, _) loc("layer" "m.py":1)
  %1: f32[N, 8] = math.silu(%0) loc("layer" "m.py":2)
  %2: f32[N, 8] = math.add(%1, %h) loc("layer" "m.py":3)
  return %2
}
"""


def test_inside_a_called_function(tmp_path):
    culprit = moec.bisect(moec.parse(CALLS), passes=Pipeline((wrong.WrongSilu(),)), out=tmp_path)
    assert culprit.culprit == wrong.WrongSilu()
    assert culprit.location.under("layer")
    assert [n.op for n in culprit.minimised.graph.nodes] == ["math.silu"]
    assert "math.silu" in str(culprit)
    assert moec.bisect(moec.parse(culprit.path.read_text()), passes=Pipeline((wrong.WrongSilu(),)), seconds=0)


# -- judging -------------------------------------------------------------------------------------------


def test_faults_alike():
    a = Fault("crash", "replace() returned f32[T, 16] for f32[T, 8]", wrong.WrongDType())
    assert a.like(Fault("crash", "replace() returned f32[2, 4] for f32[2, 2]"))
    assert not a.like(Fault("crash", "replace() returned nothing"))
    assert not a.like(Fault("crash", a.message, wrong.Raises()))
    assert not a.like(Fault("invalid", a.message))


def test_the_judge_keeps_to_the_given_inputs_where_seeded_ones_do_not_run():
    text = """
graph(%x: f32[4], %i: i64[2]) -> (%y: f32[2]) {
  %0: i64[2] = math.mul(%i, %i)
  %1: f32[2] = tensor.gather(%x, %0) {axis=0}
  %2: f32[2] = math.silu(%1)
  return %2
}
"""
    graph, notices = moec.parse(text), []
    given = (torch.ones(4), torch.tensor([0, 1]))
    judge = Judge(graph, given, notices)
    result, fault = attempt(wrong.WrongSilu(), graph)
    assert fault is None
    assert judge.examine(graph.clone()) is None
    assert judge.examine(result).kind == "numbers"
    assert "judged on the given inputs only" in notices[0]
    with pytest.raises(CompileError):
        Judge(graph, None).examine(graph)


def test_one_percent_is_seen_and_rounding_is_not(graph):
    graph = with_data(graph)
    judge = Judge(graph, None)
    off = graph.clone()
    off.weights["up"].weight = moec.ir.Weight.of("up", graph.weights["up"].weight.load() * 1.01)
    assert judge.examine(off).kind == "numbers"
    reordered = graph.clone()
    (add,) = nodes(reordered, "math.add")
    a, b = add.operands
    reordered.replace_operand(add, 0, b)
    reordered.replace_operand(add, 1, a)
    assert judge.examine(reordered) is None
