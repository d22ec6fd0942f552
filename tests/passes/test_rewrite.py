"""The rewrite engine's guarantees (each one has a test that fails without it)."""

import re
from dataclasses import dataclass, field

import pytest
import torch

from moec.ir import Builder, CompileError, Graph, Location, TensorType, parse, run
from moec.passes.base import Record, active_record
from moec.passes.rewrite import Rewrite, RuleSet
from moec.passes.rewriting.explain import explain

from .small_rules import TYPE, graph_of, ops, rule


@dataclass(frozen=True)
class Swiglu(Rewrite):
    """mul(silu(gate), up) → swiglu(gate, up)"""

    def pattern(self, p, gate, up):
        return p.mul(p.silu(gate), up)

    def when(self, m):
        if m.gate.type != m.up.type:
            return m.no(f"gate is {m.gate.type}, up is {m.up.type}", at=m.up)

    def replace(self, b, m):
        return b.swiglu(m.gate, m.up)


def check(rules, graph, expected):
    """Apply, compare ops and meaning, and see that the input stayed as it was."""
    before = str(graph)
    after = RuleSet(tuple(rules)).run(graph)
    after.verify()
    assert str(graph) == before
    assert ops(after) == expected
    inputs = [torch.randn(3, 4) for _ in graph.inputs]
    for a, b in zip(run(after, inputs), run(graph, inputs), strict=True):
        torch.testing.assert_close(a, b)
    return after


def test_fires_and_keeps_meaning():
    check([Swiglu()], graph_of(lambda b, x, y: b.mul(b.silu(x), y)), ["math.swiglu"])


def test_commutative_operands_match_in_either_order():
    check([Swiglu()], graph_of(lambda b, x, y: b.mul(y, b.silu(x))), ["math.swiglu"])


def test_non_commutative_operands_do_not():
    r = rule(lambda self, p, x, y: p.sub(p.silu(x), y), lambda self, b, m: b.neg(m.x))
    graph = graph_of(lambda b, x, y: b.sub(y, b.silu(x)))
    assert RuleSet((r,)).run(graph) == graph


def test_inner_value_with_another_use_stops_a_match():
    def body(b, x, y):
        s = b.silu(x)
        return b.mul(s, y), s

    graph = graph_of(body)
    assert RuleSet((Swiglu(),)).run(graph) == graph
    assert "a graph output" in explain(Swiglu(), graph)


def test_inner_value_used_by_another_node_stops_a_match():
    def body(b, x, y):
        s = b.silu(x)
        return b.add(b.mul(s, y), b.exp(s))

    graph = graph_of(body)
    assert RuleSet((Swiglu(),)).run(graph) == graph
    assert "also used by math.exp" in explain(Swiglu(), graph)


def test_shared_parts_match_and_stay():
    def pattern(self, p, x, y):
        return p.mul(p.shared(p.silu(x)), y)

    def body(b, x, y):
        s = b.silu(x)
        return b.mul(s, y), s

    r = rule(pattern, lambda self, b, m: b.swiglu(m.x, m.y))
    check([r], graph_of(body), ["math.silu", "math.swiglu"])


@pytest.mark.parametrize(("number", "fires"), [(2.0, True), (2.0000002, False), (2.5, False)])
def test_constants_match_exactly(number, fires):
    r = rule(lambda self, p, x: p.pow(x, 2.0), lambda self, b, m: b.mul(m.x, m.x))
    graph = graph_of(lambda b, x, y: b.pow(x, number))
    assert ("math.mul" in ops(RuleSet((r,)).run(graph))) is fires


def test_constants_are_compared_in_their_dtype():
    r = rule(lambda self, p, x: p.add(x, 0.1), lambda self, b, m: b.neg(m.x))
    graph = graph_of(lambda b, x, y: b.add(x, float(torch.tensor(0.1))))
    assert "math.neg" in ops(RuleSet((r,)).run(graph))


def test_attributes_match_exactly_or_are_captured():
    exact = rule(lambda self, p, x: p.softmax(x), lambda self, b, m: b.neg(m.x))
    captured = rule(
        lambda self, p, x: p.softmax(x, axis=p.attr("axis")), lambda self, b, m: b.log_softmax(m.x, axis=m.axis)
    )
    graph = graph_of(lambda b, x, y: b.softmax(x, axis=0))
    assert RuleSet((exact,)).run(graph) == graph
    (node,) = RuleSet((captured,)).run(graph).nodes
    assert node.attrs == {"axis": 0}


def test_constants_that_only_the_match_used_go():
    r = rule(lambda self, p, x: p.mul(x, 2.0), lambda self, b, m: b.add(m.x, m.x))
    graph = graph_of(lambda b, x, y: b.mul(x, 2.0))
    assert ops(r.run(graph)) == ["math.add"]

    def used_twice(b, x, y):
        two = b.const(2.0)
        return b.mul(x, two), b.sub(y, two), two

    assert ops(r.run(graph_of(used_twice))) == ["tensor.constant", "math.add", "math.sub"]


def test_the_same_capture_must_be_the_same_value():
    r = rule(lambda self, p, x: p.mul(x, p.sigmoid(x)), lambda self, b, m: b.silu(m.x))
    graph = graph_of(lambda b, x, y: b.mul(y, b.sigmoid(x)))
    assert RuleSet((r,)).run(graph) == graph
    check([r], graph_of(lambda b, x, y: b.mul(b.sigmoid(x), x)), ["math.silu"])


def test_locations_merge_and_origins_move():
    def body(b, x, y):
        b.location = Location.at("mlp.act", "m.py", 3)
        s = b.silu(x)
        b.location = Location.at("mlp", "m.py", 4)
        out = b.mul(s, y)
        out.origins = frozenset({"mul_7"})
        return out

    (node,) = RuleSet((Swiglu(),)).run(graph_of(body)).nodes
    assert node.location.describe() == "mlp, mlp.act m.py:3 and 1 more"
    assert node.result.origins == {"mul_7"}


def test_several_roots():
    def pattern(self, p, x, y, w):
        total = p.add(x, y)
        return p.rms(total, w, eps=p.attr("eps")), total

    def replace(self, b, m):
        return b.add_rms(m.x, m.y, m.w, eps=m.eps)

    def body(b, x, y):
        total = b.add(x, y)
        early = b.neg(total)  # a user of the second root that stands before the first
        w = b.const([1.0, 2.0, 3.0, 4.0], "f32", (4,))
        return b.mul(b.rms(total, w), early)

    check([rule(pattern, replace)], graph_of(body), ["tensor.constant", "norm.add_rms", "math.neg", "math.mul"])


def test_refusals_are_recorded_with_reason_and_place():
    graph = Graph()
    x, y = graph.add_input("x", TYPE), graph.add_input("y", TensorType("f32", (4,)))
    graph.add_output(Builder(graph, location=Location.at("layers.0.mlp", "m.py", 9)).mul(Builder(graph).silu(x), y))
    record = Record("r")
    token = active_record.set(record)
    try:
        assert Swiglu().run(graph) == graph
    finally:
        active_record.reset(token)
    (refusal,) = record.refused
    assert (refusal.rule, refusal.reason) == ("swiglu", "gate is f32[B, 4], up is f32[4]")
    assert "refused at layers.0.mlp m.py:9: gate is f32[B, 4], up is f32[4]" in explain(Swiglu(), graph)


def test_rewriting_reaches_a_fixed_point_and_is_idempotent():
    r = rule(lambda self, p, x: p.neg(p.neg(x)), lambda self, b, m: m.x)
    graph = graph_of(lambda b, x, y: b.add(b.neg(b.neg(b.neg(b.neg(b.neg(x))))), y))
    after = check([r], graph, ["math.neg", "math.add"])
    assert RuleSet((r,)).run(after) == after


def test_an_escaping_inner_value_is_reported_with_the_rule_and_its_line():
    """The mistake that elsewhere means that nothing happens."""

    def body(b, x, y):
        b.location = Location.at("layers.0.mlp", "m.py", 7)
        s = b.silu(x)
        return b.mul(s, y), b.exp(s)

    record = Record("r")
    token = active_record.set(record)
    try:
        Swiglu().run(graph_of(body))
    finally:
        active_record.reset(token)
    (refusal,) = record.refused
    assert re.fullmatch(
        r"rule swiglu \(.*test_rewrite\.py:\d+\) refused at layers\.0\.mlp m\.py:7: "
        r"math\.silu inside the match is also used by math\.exp at layers\.0\.mlp m\.py:7",
        str(refusal),
    )


def test_a_loop_ends_early_in_a_large_graph():
    def body(b, x, y):
        for _ in range(500):
            x = b.exp(x)
        return b.silu(x)

    loops = rule(lambda s, p, x: p.silu(x), lambda s, b, m: b.silu(b.neg(m.x)))
    with pytest.raises(CompileError, match="do not terminate") as error:
        loops.run(graph_of(body))
    fired = int(re.search(r"fired (\d+) times", str(error.value))[1])
    assert fired < 2000


def test_a_rule_that_multiplies_ends():
    grows = rule(lambda s, p, x: p.silu(x), lambda s, b, m: b.add(b.silu(b.neg(m.x)), b.silu(b.exp(m.x))))
    with pytest.raises(CompileError, match="do not terminate"):
        grows.run(graph_of(lambda b, x, y: b.silu(x)))


def test_a_shared_part_lends_neither_its_location_nor_its_life():
    def body(b, x, y):
        b.location = Location.at("tables", "m.py", 1)
        s = b.silu(x)
        b.location = Location.at("mlp", "m.py", 2)
        return b.mul(s, y)

    r = rule(lambda s, p, x, y: p.mul(p.shared(p.silu(x)), y), lambda s, b, m: b.swiglu(m.x, m.y))
    after = r.run(graph_of(body))
    assert ops(after) == ["math.silu", "math.swiglu"]
    assert after.find("swiglu")[0].location == Location.at("mlp", "m.py", 2)


def test_two_rules_that_undo_each_other_are_both_named():
    a = rule(lambda s, p, x: p.silu(x), lambda s, b, m: b.mul(m.x, b.sigmoid(m.x)))
    b = Unsilu()
    with pytest.raises(CompileError, match=r"do not terminate: (rule|unsilu), (rule|unsilu) fired"):
        RuleSet((a, b)).run(graph_of(lambda b, x, y: b.silu(x)))


@dataclass(frozen=True)
class Unsilu(Rewrite):
    def pattern(self, p, x):
        return p.mul(x, p.sigmoid(x))

    def replace(self, b, m):
        return b.silu(m.x)


def test_swapping_commutative_operands_is_no_change():
    swap = rule(lambda s, p, x, y: p.mul(p.silu(x), y), lambda s, b, m: b.mul(m.y, b.silu(m.x)))
    with pytest.raises(CompileError, match="would fire forever"):
        swap.run(graph_of(lambda b, x, y: b.mul(b.silu(x), y)))
    turn = rule(lambda s, p, x, y: p.sub(x, y), lambda s, b, m: b.neg(b.sub(m.y, m.x)), max=1)
    assert ops(turn.run(graph_of(lambda b, x, y: b.sub(x, y)))) == ["math.sub", "math.neg"]


@pytest.mark.parametrize(("typo", "meant"), [("wehn", "when"), ("repalce", "replace"), ("patern", "pattern"),
                                             ("wen", "when"), ("replce", "replace")])  # fmt: skip
def test_a_misspelt_method_is_refused_where_it_is_written(typo, meant):
    with pytest.raises(
        CompileError, match=rf"rule Typo \(.*test_rewrite\.py:\d+\): {typo}\(\) is no method.*\n.*{meant}"
    ):
        type("Typo", (Swiglu,), {typo: lambda self, m: None})
    type("Fine", (Swiglu,), {"where": lambda self: 1, "patterns": lambda self: 2, "reason": lambda self: 3})


def test_a_square_matches_both_ways_of_writing_it():
    both = rule(lambda s, p, x: p.mul(p.relu(x), p.relu(x)), lambda s, b, m: b.abs(m.x))

    def once(s, p, x):
        r = p.relu(x)
        return p.mul(r, r)

    def square(b, x, y):
        r = b.relu(x)
        return b.mul(r, r)

    for r in (both, rule(once, lambda s, b, m: b.abs(m.x))):
        assert ops(r.run(graph_of(square))) == ["math.abs"]
    assert ops(both.run(graph_of(lambda b, x, y: b.mul(b.relu(x), b.relu(x))))) == ["math.abs"]
    assert ops(both.run(graph_of(lambda b, x, y: b.mul(b.relu(x), b.relu(y)))))[-1] == "math.mul"


def test_explain_tells_the_same_axis_counted_from_the_other_end():
    back = rule(lambda s, p, x: p.softmax(x, axis=-1), lambda s, b, m: b.neg(m.x))
    assert "the same axis from the other end" in explain(back, graph_of(lambda b, x, y: b.softmax(x, axis=1)))
    assert "the same axis" not in explain(back, graph_of(lambda b, x, y: b.softmax(x, axis=0)))


def test_what_is_no_rule_is_refused():
    with pytest.raises(CompileError, match=r"not a Rewrite.*\n.*write Swiglu\(\)"):
        RuleSet((Swiglu,)).run(graph_of(lambda b, x, y: b.silu(x)))


def test_mistakes_in_a_file_name_file_and_line():
    @dataclass(frozen=True)
    class Broken(Rewrite):
        def pattern(self, p, x):
            return p.silu(x)

        def replace(self, b, m):
            return None

    with pytest.raises(CompileError, match=r"rule broken \(.*test_rewrite\.py:\d+\): replace\(\) returned nothing"):
        Broken().run(graph_of(lambda b, x, y: b.silu(x)))


def test_explain_names_the_first_node_that_failed():
    graph = graph_of(lambda b, x, y: b.mul(b.sigmoid(x), y))
    text = explain(Swiglu(), graph)
    assert "best partial match: 1 of 2 nodes" in text
    assert "expected math.silu" in text
    assert "found    math.sigmoid" in text
    assert "no math.mul" in explain(Swiglu(), graph_of(lambda b, x, y: b.add(x, y)))
    assert "fires at" in explain(Swiglu(), graph_of(lambda b, x, y: b.mul(b.silu(x), y)))


def test_either_and_maybe():
    def pattern(self, p, x):
        return p.neg(p.either(p.silu(x), p.relu(p.maybe(lambda v: p.exp(v), x))))

    r = rule(pattern, lambda self, b, m: b.abs(m.x))
    for body in (
        lambda b, x, y: b.neg(b.silu(x)),
        lambda b, x, y: b.neg(b.relu(x)),
        lambda b, x, y: b.neg(b.relu(b.exp(x))),
    ):
        assert ops(RuleSet((r,)).run(graph_of(body))) == ["math.abs"]


def test_rules_reach_into_functions():
    graph = parse("""graph(%x: f32[N, 4]) -> (%y: f32[N, 4]) {
  %0: f32[N, 4] = call.graph(%x) {callee="block", dims=[["T", N]]}
  return %0
}

function @block(%h: f32[T, 4]) -> (%out: f32[T, 4]) {
  %0: f32[T, 4] = math.silu(%h)
  %1: f32[T, 4] = math.mul(%0, %h)
  return %1
}
""")
    after = Swiglu().run(graph)
    after.verify()
    assert len(after.find("swiglu")) == 1


@dataclass(frozen=True)
class Negated(Rewrite):
    """op(x) → −x"""

    op: str = "silu"

    def pattern(self, p, x):
        return p.op(self.op, (x,))

    def replace(self, b, m):
        return b.neg(m.x)


def test_a_pattern_is_its_rules_own():
    """Options may be unhashable, and rules that compare equal may have other patterns."""

    class Equal(Negated):
        __eq__ = lambda self, other: True  # noqa: E731
        __hash__ = lambda self: 0  # noqa: E731

    @dataclass(frozen=True)
    class Listed(Negated):
        names: list = field(default_factory=list)

    graph = graph_of(lambda b, x, y: b.mul(b.silu(x), b.exp(y)))
    for cls in (Equal, Listed):
        assert ops(cls("silu").run(graph)) == ["math.neg", "math.exp", "math.mul"]
        assert ops(cls("exp").run(graph)) == ["math.silu", "math.neg", "math.mul"]


def test_max_counts_each_rule_of_a_name():
    graph = graph_of(lambda b, x, y: b.mul(b.mul(b.silu(x), b.exp(y)), b.silu(y)))
    after = RuleSet((Negated("silu", max=1), Negated("exp", max=1))).run(graph)
    assert ops(after) == ["math.neg", "math.neg", "math.mul", "math.silu", "math.mul"]


def test_one_rule_is_a_set():
    assert ops(RuleSet(Negated()).run(graph_of(lambda b, x, y: b.silu(x)))) == ["math.neg"]
