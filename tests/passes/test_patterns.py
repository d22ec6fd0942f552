"""The pattern language: repetitions, trees, sizes, types, alternatives at the root."""

import pytest
import torch

from moec.ir import Builder, CompileError, Graph, Weight, parse, run
from moec.passes.rewrite import RuleSet, limited
from moec.passes.rewriting.explain import explain

from .small_rules import TYPE, B, graph_of, ops, rule


def apply(r, graph):
    """The graph after the rule: verified, of the same meaning, and a fixed point."""
    after = r.run(graph)
    after.verify()
    inputs = [torch.randn(3, 4) for _ in graph.inputs]
    for a, b in zip(run(after, inputs), run(graph, inputs), strict=True):
        torch.testing.assert_close(a, b)
    assert r.run(after) == after
    return after


def scaled_sum(self, p, x):
    """Σ wᵢ · silu(x)"""
    act = p.bind("act", p.shared(p.silu(x)))
    return p.tree("add", p.repeat(lambda w: p.mul(act, w)), p.rest("others"))


def factored(self, b, m):
    total = m.w[0]
    for w in m.w[1:]:
        total = b.add(total, w)
    y = b.mul(m.act, total)
    for v in m.others:
        y = b.add(y, v)
    return y


def at_least_two(self, m):
    return m.no("one term") if len(m.w) < 2 else None


def weights(b, n):
    return [b.weight("w", torch.randn(4, generator=torch.Generator().manual_seed(i))) for i in range(n)]


@pytest.mark.parametrize("n", [2, 3, 8, 41])
@pytest.mark.parametrize("nesting", ["left", "right", "balanced"])
def test_a_tree_of_repetitions_in_any_nesting(n, nesting):
    def body(b, x, y):
        act = b.silu(x)
        terms = [b.mul(act, w) if i % 2 else b.mul(w, act) for i, w in enumerate(weights(b, n))]
        terms.insert(n // 2, y)
        while len(terms) > 1:
            if nesting == "left":
                terms[:2] = [b.add(*terms[:2])]
            elif nesting == "right":
                terms[-2:] = [b.add(*terms[-2:])]
            else:
                terms = [b.add(*terms[i : i + 2]) if i + 1 < len(terms) else terms[i] for i in range(0, len(terms), 2)]
        return terms[0]

    r = rule(scaled_sum, factored, at_least_two)
    graph = graph_of(body)
    after = apply(r, graph)
    assert ops(after).count("math.mul") == 1
    assert ops(after).count("math.add") == n


def test_repetitions_share_what_comes_from_outside():
    def body(b, x, y):
        w = weights(b, 4)
        return b.add(b.add(b.mul(b.silu(x), w[0]), b.mul(b.silu(y), w[1])), b.mul(b.silu(x), w[2]))

    graph = graph_of(body)
    seen = []
    r = rule(scaled_sum, factored, lambda self, m: seen.append((m.x.name, len(m.w), len(m.others))) or m.no("look"))
    assert r.run(graph) == graph
    # three silu of which two are of x but different nodes: each is its own group
    assert seen == [("x", 1, 2), ("y", 1, 2), ("x", 1, 2)]


def test_a_tree_stops_at_values_with_other_uses_and_at_broadcasts():
    def body(b, x, y):
        act = b.silu(x)
        w = weights(b, 3)
        inner = b.add(b.mul(act, w[0]), b.mul(act, w[1]))
        return b.add(inner, b.mul(act, w[2])), b.neg(inner)

    sizes = []
    r = rule(scaled_sum, factored, lambda self, m: sizes.append((len(m.w), len(m.others))) or m.no("look"))
    r.run(graph_of(body))
    assert sizes == [(2, 0), (1, 1)]
    narrow = graph_of(lambda b, x, y: b.add(x, b.add(*weights(b, 2))))
    r = rule(
        lambda self, p: p.tree("add", p.repeat(lambda v: p.either(p.silu(v), p.neg(v))), p.rest("others")),
        lambda self, b, m: m.others[0],
    )
    assert r.run(narrow) == narrow


def test_a_tree_without_rest_takes_all_leaves_or_none():
    def pattern(self, p, x):
        return p.tree("add", p.repeat(lambda w: p.mul(x, w), least=2))

    def replace(self, b, m):
        return b.mul(m.x, b.add(*m.w))

    r = rule(pattern, replace)
    fires = graph_of(lambda b, x, y: b.add(*[b.mul(x, w) for w in weights(b, 2)]))
    assert ops(apply(r, fires)) == ["math.add", "math.mul"]
    other = graph_of(lambda b, x, y: b.add(b.mul(x, weights(b, 1)[0]), b.neg(y)))
    assert r.run(other) == other
    text = explain(r, other)
    assert "expected math.mul" in text
    assert "found    math.neg" in text


def test_a_tree_is_seen_again_when_a_use_deep_inside_goes_away():
    """Another use of an inner value of the deepest leaf stops the tree, until a rule behind the tree removes it."""

    def body(b, x, y):
        w = weights(b, 7)
        acts = [b.silu(b.mul(x, float(i + 2))) for i in range(7)]
        total = b.mul(acts[0], w[0])
        for act, weight in zip(acts[1:], w[1:], strict=True):
            total = b.add(total, b.mul(act, weight))
        return total, b.add(y, b.sub(acts[0], acts[0]))

    nothing = rule(
        lambda self, p, x, y: p.add(y, p.sub(x, x)),
        lambda self, b, m: m.y,
        lambda self, m: m.no("not all rows") if m.y.type != m.root.type else None,
    )
    pattern = lambda self, p: p.tree("add", p.repeat(lambda v, w: p.mul(p.silu(v), w), least=7))  # noqa: E731

    def replace(self, b, m):
        total = b.swiglu(m.v[0], b.expand(m.w[0], shape=m.v[0].shape))
        for v, w in zip(m.v[1:], m.w[1:], strict=True):
            total = b.sub(b.swiglu(v, b.expand(w, shape=v.shape)), b.neg(total))
        return total

    after = apply(RuleSet((rule(pattern, replace), nothing)), graph_of(body))
    assert ops(after).count("math.swiglu") == 7


@pytest.mark.parametrize(("least", "fires"), [(2, True), (3, False)])
def test_a_repetition_has_the_size_that_is_asked_for(least, fires):
    tree = rule(
        lambda self, p: p.tree("add", p.repeat(lambda v: p.neg(v), least=least), p.rest("others")),
        lambda self, b, m: b.sub(b.sub(m.others[0], m.v[0]), m.v[1]),
    )
    graph = graph_of(lambda b, x, y: b.add(b.add(b.neg(x), b.neg(y)), x))
    assert (ops(tree.run(graph)).count("math.sub") == 2) is fires
    many = rule(
        lambda self, p: p.concat(p.repeat(lambda v: p.neg(v), least=least), axis=-1),
        lambda self, b, m: b.neg(b.concat(*m.v, axis=-1)),
    )
    joined = graph_of(lambda b, x, y: b.concat(b.neg(x), b.neg(y), axis=-1))
    assert (ops(many.run(joined))[-1] == "math.neg") is fires


def test_leaves_of_a_tree():
    """A sum of another shape, and one that is an output, are leaves, not parts."""
    seen = []
    r = rule(
        lambda self, p: p.tree("add", p.repeat(lambda v: p.neg(v)), p.rest("others")),
        lambda self, b, m: m.v[0],
        lambda self, m: seen.append([o.producer.op for o in m.others if o.producer]) or m.no("look"),
    )
    r.run(graph_of(lambda b, x, y: b.add(b.neg(x), b.add(*weights(b, 2)))))
    assert seen.pop() == ["math.add"]

    def body(b, x, y):
        inner = b.add(x, y)
        return inner, b.add(b.neg(x), inner)

    r.run(graph_of(body))
    assert seen == [["math.add"]]


def test_repetitions_as_operands_of_a_variadic_op():
    def pattern(self, p, x):
        return p.concat(p.repeat(lambda w, bias: p.linear_linear(x, w, bias), least=2), axis=-1)

    def replace(self, b, m):
        return b.linear_linear(m.x, b.concat(*m.w, axis=0), b.concat(*m.bias, axis=0))

    def body(b, x, y):
        parts = [b.linear_linear(x, b.weight("w", torch.randn(n, 4)), b.weight("b", torch.randn(n))) for n in (2, 3)]
        return b.concat(*parts, axis=-1)

    after = apply(rule(pattern, replace), graph_of(body))
    assert ops(after) == ["tensor.concat", "tensor.concat", "linear.linear"]

    def two_inputs(b, x, y):
        w, bias = b.weight("w", torch.randn(2, 4)), b.weight("b", torch.randn(2))
        return b.concat(b.linear_linear(x, w, bias), b.linear_linear(y, w, bias), axis=-1)

    graph = graph_of(two_inputs)
    assert rule(pattern, replace).run(graph) == graph


def test_rest_and_repeat_before_other_operands():
    def pattern(self, p, x):
        return p.concat(p.rest("before"), p.neg(x), axis=-1)

    r = rule(pattern, lambda self, b, m: b.concat(*m.before, m.x, axis=-1))
    graph = graph_of(lambda b, x, y: b.concat(x, y, b.neg(x), axis=-1))
    (node,) = r.run(graph).nodes
    assert [v.name for v in node.operands] == ["x", "y", "x"]


def test_captures_of_repetitions_name_constants_attributes_and_values():
    def pattern(self, p, x):
        return p.tree("add", p.repeat(lambda c, h: p.bind(h, p.mul(x, p.const(c))), least=2))

    r = rule(pattern, lambda self, b, m: b.mul(m.x, sum(m.c)))
    graph = graph_of(lambda b, x, y: b.add(b.add(b.mul(x, 2.0), b.mul(x, 3.0)), b.mul(5.0, x)))
    after = apply(r, graph)
    assert after.find("constant")[-1].attrs["value"] == (10.0,)


def test_sizes_in_attributes_and_types():
    def pattern(self, p, x):
        inner = p.reshape(p.typed(x, ("f32", "bf16"), (p.dim("n"), ...)), shape=(p.dim("n"), 2, p.dim()))
        return p.reshape(inner, shape=(p.dim("n"), p.dim("d")))

    r = rule(pattern, lambda self, b, m: m.x, lambda self, m: m.no(f"{m.n} {m.d}") if m.d != 4 else None)
    fires = graph_of(lambda b, x, y: b.reshape(b.reshape(x, shape=(B, 2, 2)), shape=(B, 4)))
    assert ops(apply(r, fires)) == []
    other = graph_of(lambda b, x, y: b.reshape(b.reshape(x, shape=(2, 2, B)), shape=(B, 4)))
    assert r.run(other) == other
    assert "expected tensor.reshape with shape=[B, 2, _]" in explain(r, other)
    assert "found    shape=[2, 2, B]" in explain(r, other)


@pytest.mark.parametrize(("dtype", "shape", "fires"), [
    ("f32", (..., 4), True), ("f32", (B, 4), True), ("bf16", (..., 4), False), ("f32", (..., 5), False),
    ("f32", (B,), False), (("bf16", "f32"), None, True), (None, (..., B, 4), True), (None, (..., 1, B, 4), False),
    (None, (B, 4, ..., 4), False), (None, (B, 4, ...), True),
])  # fmt: skip
def test_typed_captures(dtype, shape, fires):
    r = rule(lambda self, p, x: p.silu(p.typed(x, dtype, shape)), lambda self, b, m: b.mul(m.x, b.sigmoid(m.x)))
    graph = graph_of(lambda b, x, y: b.silu(x))
    assert (r.run(graph) != graph) is fires
    if not fires:
        assert "f32" in explain(r, graph) or "[B, 4]" in explain(r, graph)


def test_alternatives_at_the_root():
    def pattern(self, p, x):
        return p.maybe(lambda v: p.cast(v, dtype="f32"), p.either(p.exp(p.neg(x)), p.sqrt(x)))

    with pytest.raises(CompileError, match=r"must return the result of an op, got Either|unused|root"):
        rule(lambda self, p, x: (p.either(p.exp(x), p.neg(x)), p.abs(x)), None).run(graph_of(lambda b, x, y: x))
    r = rule(pattern, lambda self, b, m: b.abs(m.x))
    for body in (lambda b, x, y: b.exp(b.neg(x)), lambda b, x, y: b.sqrt(x)):
        assert ops(r.run(graph_of(body))) == ["math.abs"]


def test_max_limits_the_applications_of_a_rule():
    r = rule(lambda self, p, x: p.silu(x), lambda self, b, m: b.mul(m.x, b.sigmoid(m.x)), max=2)
    graph = graph_of(lambda b, x, y: b.silu(b.silu(b.silu(b.silu(x)))))
    assert ops(r.run(graph)).count("math.silu") == 2


def test_limited_counts_over_rules_and_passes():
    neg = rule(lambda self, p, x: p.neg(p.neg(x)), lambda self, b, m: m.x)
    silu = rule(lambda self, p, x: p.silu(x), lambda self, b, m: b.mul(m.x, b.sigmoid(m.x)))
    graph = graph_of(lambda b, x, y: b.silu(b.neg(b.neg(b.silu(b.neg(b.neg(x)))))))
    with limited() as everything:
        full = silu.run(neg.run(graph))
    assert [a.root for a in everything.applications] == ["math.neg"] * 2 + ["math.silu"] * 2
    for n in range(5):
        with limited(n) as some:
            part = silu.run(neg.run(graph))
        assert len(some.applications) == n
        part.verify()
    assert part == full


def test_a_computed_weight():
    def replace(self, b, m):
        doubled = b.weight("doubled", lambda: m.w.weight.load() * 2, m.w.type)
        return b.mul(m.x, doubled)

    r = rule(lambda self, p, x, w: p.mul(p.mul(x, w), 2.0), replace)
    graph = graph_of(lambda b, x, y: b.mul(b.mul(x, b.weight("w", torch.randn(4))), 2.0))
    after = apply(r, graph)
    assert "doubled" in after.weights
    with pytest.raises(CompileError, match="needs its type"):
        Builder(Graph()).weight("w", lambda: torch.zeros(1))


def test_results_come_from_the_op():
    r = rule(lambda self, p, x: p.route(x, k=2)[0], lambda self, b, m: b.neg(m.x))
    graph = parse("graph(%x: f32[T, 4]) -> (%w: f32[T, 2]) {\n  %0: f32[T, 2], %1: i64[T, 2] = moe.route(%x) {k=2}\n"
                  "  return %0\n}\n")  # fmt: skip
    with pytest.raises(CompileError, match=r"returned f32\[T, 4\] for f32\[T, 2\]"):
        r.run(graph)


def test_a_weight_of_another_graph_is_refused():
    other = Graph().add_weight(Weight.of("w", torch.ones(4)))
    r = rule(lambda self, p, x: p.silu(x), lambda self, b, m: b.mul(m.x, other))
    with pytest.raises(CompileError, match=r"value of another graph: weight @w.*\n.*b\.weight"):
        r.run(graph_of(lambda b, x, y: b.silu(x)))


def test_explain_a_rule_set_and_wrong_arguments():
    neg = rule(lambda self, p, x: p.neg(p.neg(x)), lambda self, b, m: m.x)
    graph = graph_of(lambda b, x, y: b.neg(x))
    text = explain(RuleSet((neg,)), graph)
    assert "expected math.neg" in text
    assert "found    input %x" in text
    assert "test_patterns.py:" in text
    with pytest.raises(TypeError, match=r"write RuleSet\(\)"):
        explain(RuleSet, graph)
    assert "did you mean" in explain(neg, _located(), at="layers.0.mlq")


def _located():
    from moec.ir import Location

    graph = Graph()
    b = Builder(graph, location=Location.at("layers.0.mlp", "m.py", 1))
    graph.add_output(b.neg(graph.add_input("x", TYPE)))
    return graph


def test_a_part_used_by_many_is_looked_at_once():
    """A ladder of sums of a value with itself has 2^60 paths."""

    def pattern(self, p, x):
        v = p.silu(x)
        for _ in range(60):
            v = p.add(v, v)
        return v

    def body(b, x, y):
        v = b.silu(x)
        for _ in range(60):
            v = b.add(v, v)
        return v

    r = rule(pattern, lambda self, b, m: b.mul(b.silu(m.x), 2.0**60))
    graph = graph_of(body)
    with limited(None) as applied:
        r.run(graph)
    assert len(applied.applications) == 1


def test_operands_of_a_repetition_in_either_order():
    def pattern(self, p, x):
        return p.concat(p.repeat(lambda w: p.mul(x, w), least=2), axis=-1)

    r = rule(pattern, lambda self, b, m: b.mul(m.x, b.add(*m.w)), lambda self, m: m.no(f"common {m.x.name}"))
    for order in (1, -1):
        graph = graph_of(lambda b, x, y, o=order: b.concat(b.mul(*(x, y)[::o]), b.mul(x, b.exp(x)), axis=-1))
        assert "common x" in explain(r, graph)


def test_parameters_name_captures_of_every_kind():
    def pattern(self, p, x, w, bias, others):
        return p.concat(p.linear_linear(x, w, p.optional(bias)), p.rest(others), axis=-1)

    r = rule(pattern, lambda self, b, m: b.neg(m.root), lambda self, m: m.no(f"{m.bias} {m.others[0].name}"))
    graph = graph_of(lambda b, x, y: b.concat(b.linear_linear(x, b.weight("w", torch.randn(4, 4))), y, axis=-1))
    assert "None y" in explain(r, graph)


def test_a_parameter_with_a_default_keeps_it():
    r = rule(lambda self, p, x, n=2.0: p.mul(x, n), lambda self, b, m: b.add(m.x, m.x))
    graph = graph_of(lambda b, x, y: b.mul(x, 3.0))
    assert r.run(graph) == graph
    assert ops(r.run(graph_of(lambda b, x, y: b.mul(x, 2.0)))) == ["math.add"]


def writes(self, p, start):
    link = lambda below, v: p.either(p.sub(below, p.silu(v)), p.sub(below, p.mul(below, v)))  # noqa: E731
    return p.chain(p.repeat(link), "below", start)


def test_a_chain_is_matched_whole_from_the_top_down():
    def body(b, x, y):
        link = b.sub(b.sub(b.relu(x), b.silu(y)), b.silu(x))
        return b.relu(b.sub(link, b.mul(link, b.exp(y))))

    seen = []

    def replace(self, b, m):
        seen.append((m.start.producer.op, [v.name or v.producer.op for v in m.v]))
        return b.abs(m.start)

    graph = rule(writes, replace).run(graph_of(body))
    assert ops(graph) == ["math.relu", "math.exp", "math.abs", "math.relu"]
    assert seen == [("math.relu", ["math.exp", "x", "y"])]


def test_a_chain_ends_where_a_link_has_another_use():
    def body(b, x, y):
        inner = b.sub(x, b.silu(y))
        return b.sub(inner, b.silu(x)), b.neg(inner)

    found = []
    rule(writes, None, lambda self, m: found.append(len(m.v)) or m.no("look")).run(graph_of(body))
    assert found == []  # as a whole it is not closed, and a part of it is no chain


def test_a_chain_goes_on_through_one_op():
    both = lambda self, p, x: p.chain(p.repeat(lambda v: p.either(p.silu(v), p.neg(v))), "v", x)  # noqa: E731
    graph = graph_of(lambda b, x, y: b.silu(x))
    with pytest.raises(CompileError, match="of one op"):
        rule(both, None).run(graph)
