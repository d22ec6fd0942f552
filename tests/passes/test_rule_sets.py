"""Rule sets: when they end, and what an application costs where values have many uses."""

from moec.passes.rewrite import RuleSet
from moec.passes.rewriting import engine

from .small_rules import graph_of, ops, rule


def test_a_rule_set_ends_at_a_fixed_point():
    """What one rule does far from the root of another makes that match."""
    silu = rule(lambda s, p, x: p.relu(x), lambda s, b, m: b.abs(m.x))
    roots = rule(
        lambda s, p, x: (p.silu(p.neg(x)), p.exp(p.abs(x))), lambda s, b, m: (b.sin(m.x), b.cos(m.x))
    )  # fmt: skip

    def siblings(b, x, y):
        return b.mul(b.silu(b.neg(x)), b.exp(b.relu(x))), b.sigmoid(x), b.tanh(x), b.sqrt(x)

    def three_uses(s, p, x):
        t = p.silu(x)
        return p.mul(p.mul(p.exp(t), p.neg(t)), p.abs(t))

    def one_more_use(b, x, y):
        t = b.silu(x)
        return b.mul(b.mul(b.exp(t), b.neg(t)), b.abs(t)), b.sub(t, y)

    inner = rule(three_uses, lambda s, b, m: b.sin(m.x))
    drop = rule(lambda s, p, x, y: p.sub(p.shared(p.silu(x)), y), lambda s, b, m: m.y)

    def other_result(b, x, y):
        values, index = b.topk(x, k=2)
        return b.neg(values), b.sub(b.cast(index, dtype="f32"), b.topk(y, k=2)[0])

    one = rule(lambda s, p, x: p.neg(p.topk(x, k=2)[0]), lambda s, b, m: b.topk(b.sin(m.x), k=2)[0])
    free = rule(lambda s, p, x, y: p.sub(p.cast(x, dtype="f32"), y), lambda s, b, m: m.y)
    cases = ((roots, silu, siblings), (inner, drop, one_more_use), (one, free, other_result))
    for first, second, body in cases:
        rules = RuleSet((first, second))
        after = rules.run(graph_of(body))
        assert after.find("sin")
        assert rules.run(after) == after


def test_a_rebuilt_ladder_or_chain_is_compared_in_little_time_and_depth():
    def ladder(b, v):
        for _ in range(40):
            v = b.add(v, v)
        return v

    r = rule(lambda s, p, x: ladder(p, p.silu(x)), lambda s, b, m: ladder(b, b.exp(m.x)))
    assert len(r.run(graph_of(lambda b, x, y: ladder(b, b.silu(x))))) == 41

    def chain(b, x, y):
        v = b.neg(x)
        for _ in range(600):
            v = b.add(v, b.exp(y))
        return v

    def replace(s, b, m):
        v = b.abs(m.v[0])
        for other in m.others:
            v = b.add(v, other)
        return v

    tree = rule(lambda s, p: p.tree("add", p.repeat(lambda v: p.neg(v)), p.rest("others")), replace)
    assert len(tree.run(graph_of(chain)).find("abs")) == 1


WIDE = 12
ALL_OF_ONE = rule(  # an inner value that one node uses many times
    lambda self, p, x: p.concat(*[p.exp(x)] * WIDE, axis=0), lambda self, b, m: b.concat(*[b.abs(m.x)] * WIDE, axis=0)
)
LETS_GO = rule(  # sin(v + e) does not use e any more
    lambda self, p, v, e: p.sin(p.add(v, p.shared(p.exp(e)))), lambda self, b, m: b.cos(m.v)
)


def test_a_value_with_many_uses_that_becomes_an_inner_one():
    """Its users come before what makes it one, and it has more uses left than are looked at each time."""

    def body(b, x, y):
        e = b.exp(x)
        many = b.concat(*[e] * WIDE, axis=0)
        return many, b.sin(b.add(y, e))

    after = RuleSet((ALL_OF_ONE, LETS_GO)).run(graph_of(body))
    assert sorted(ops(after)) == ["math.abs", "math.cos", "tensor.concat"]


def test_what_an_application_affects_does_not_grow_where_all_layers_use_one_value(monkeypatch):
    affected = []
    above = engine._Engine._above

    def counted(self, frontier, known):
        found = above(self, frontier, known)
        affected.append(len(found))
        return found

    monkeypatch.setattr(engine._Engine, "_above", counted)
    many = rule(  # with it, a value may have hundreds of uses inside of a match
        lambda self, p, x: p.concat(*[p.exp(x)] * 500, axis=0), lambda self, b, m: b.concat(*[m.x] * 500, axis=0)
    )
    per_layer = {}
    for layers in (50, 400):

        def body(b, x, y, layers=layers):
            e = b.exp(x)
            for _ in range(layers):
                y = b.sin(b.add(b.mul(y, e), e))
            return y

        affected.clear()
        after = RuleSet((many, LETS_GO)).run(graph_of(body))
        assert ops(after) == ["math.exp", *["math.mul", "math.cos"] * layers]
        per_layer[layers] = sum(affected) / layers
    assert per_layer[400] < 1.2 * per_layer[50]
