"""Canonical forms, folding, CSE, dead code, legalisation, pipelines."""

import pytest
import torch

from moec.ir import Builder, CompileError, Dim, Graph, TensorType, Weight, run
from moec.passes.base import Pass
from moec.passes.clean.canonicalise import Canonicalise
from moec.passes.clean.cleanup import CommonSubexpressions, DeadCode, FoldConstants
from moec.passes.legalise import Legalise

B = Dim("B")


def graph_of(body, shape=(B, 6), dtype="f32"):
    graph = Graph()
    x = graph.add_input("x", TensorType(dtype, shape))
    out = body(Builder(graph), x)
    for v in out if isinstance(out, tuple) else (out,):
        graph.add_output(v)
    return graph


def same(p: Pass, graph, dtype=torch.float32):
    """Apply; the input stays, the result verifies, means the same, and is a fixed point."""
    before = str(graph)
    after = p.run(graph)
    after.verify()
    assert str(graph) == before
    for b in (0, 1, 3):
        shape = [b if s == B else s for s in graph.inputs[0].shape]
        x = torch.randn(shape).to(dtype) + 3
        for got, want in zip(run(after, [x]), run(graph, [x]), strict=True):
            torch.testing.assert_close(got, want)
    assert p.run(after) == after
    return [n.op.split(".")[1] for n in DeadCode().run(after).nodes]


CANONICAL = {
    "cast to same": (lambda b, x: b.cast(x, dtype="f32"), []),
    "cast there and back": (lambda b, x: b.cast(b.cast(x, dtype="f64"), dtype="f32"), []),
    "lossy cast stays": (lambda b, x: b.cast(b.cast(x, dtype="bf16"), dtype="f32"), ["cast", "cast"]),
    "reshapes": (lambda b, x: b.reshape(b.reshape(x, shape=(B, 2, 3)), shape=(B, 6)), []),
    "transposes": (lambda b, x: b.transpose(b.transpose(x, perm=(1, 0)), perm=(1, 0)), []),
    "one transpose stays": (lambda b, x: b.transpose(x, perm=(1, 0)), ["transpose"]),
    "square": (lambda b, x: b.pow(x, 2.0), ["mul"]),
    "cube stays": (lambda b, x: b.pow(x, 3.0), ["constant", "pow"]),
    "rsqrt": (lambda b, x: b.reciprocal(b.sqrt(b.abs(x))), ["abs", "rsqrt"]),
    "division by a root": (lambda b, x: b.div(x, b.sqrt(b.abs(x))), ["abs", "rsqrt", "mul"]),
    "neutral elements": (lambda b, x: b.sub(b.div(b.add(b.mul(x, 1.0), 0.0), 1.0), 0.0), []),
    "0 - x stays": (lambda b, x: b.sub(0.0, x), ["constant", "sub"]),
    "silu": (lambda b, x: b.mul(b.sigmoid(x), x), ["silu"]),
    "expand in a sum": (lambda b, x: b.add(b.expand(b.const(2.0), shape=(B, 6)), x), ["constant", "add"]),
    "expand that shapes": (lambda b, x: b.add(b.expand(b.const(2.0), shape=(3, 6)), b.const(1.0)), None),
    "full slice": (lambda b, x: b.slice(x, axis=1, start=0, end=6), []),
}


@pytest.mark.parametrize("name", CANONICAL)
def test_canonical_forms(name):
    body, expected = CANONICAL[name]
    got = same(Canonicalise(), graph_of(body))
    assert expected is None or got == expected


def test_axes_count_from_the_end_and_gather_from_the_front():
    graph = graph_of(lambda b, x: (b.sum(x, axes=(1,)), b.gather(x, b.const([0], "i64", (1,)), axis=-1)))
    after = Canonicalise().run(graph)
    assert after.find("sum")[0].attrs["axes"] == (-1,)
    assert after.find("gather")[0].attrs["axis"] == 1
    same(Canonicalise(), graph)


def test_linear_with_bias():
    def body(b, x):
        w = b.graph.add_weight(Weight.of("w", torch.randn(5, 6)))
        bias = b.graph.add_weight(Weight.of("bias", torch.randn(5)))
        return b.add(bias, b.matmul(x, b.transpose(w, perm=(1, 0))))

    assert same(Canonicalise(), graph_of(body)) == ["linear"]


def test_a_residual_is_no_bias():
    def body(b, x):
        return b.add(b.linear_linear(x, b.graph.add_weight(Weight.of("w", torch.randn(6, 6)))), x)

    assert same(Canonicalise(), graph_of(body)) == ["linear", "add"]


def test_cse_merges_equal_nodes_only():
    def body(b, x):
        return b.add(b.mul(x, b.exp(x)), b.mul(b.exp(x), x)), b.softmax(x, axis=0), b.softmax(x, axis=1)

    assert same(CommonSubexpressions(), graph_of(body)) == ["exp", "mul", "add", "softmax", "softmax"]


def test_cse_tells_one_from_one_point_zero_and_minus_zero():
    graph = graph_of(lambda b, x: (b.const(0.0), b.const(-0.0), b.const(1, "i64"), b.cast(b.const(1.0), dtype="i64")))
    assert len(CommonSubexpressions().run(graph)) == 5


def test_dead_code_and_unused_weights_go():
    def body(b, x):
        b.exp(b.graph.add_weight(Weight.of("w", torch.ones(2))))
        return b.neg(x)

    after = DeadCode().run(graph_of(body))
    assert [n.op for n in after.nodes] == ["math.neg"]
    assert not after.weights


def test_folding_evaluates_constants_and_small_weights():
    def body(b, x):
        w = b.graph.add_weight(Weight.of("w", torch.arange(12.0).reshape(2, 6)))
        return b.add(x, b.gather(b.mul(w, 2.0), b.const(1, "i64")))

    graph = graph_of(body)
    same(FoldConstants(), graph)
    after = DeadCode().run(FoldConstants().run(graph))
    assert [n.op for n in after.nodes] == ["tensor.constant", "math.add"]


def test_folding_stops_at_its_limit_and_at_symbols():
    def body(b, x):
        w = b.graph.add_weight(Weight.of("w", torch.ones(1000, 6)))
        return b.neg(w), b.add(b.arange(end=B), 1)

    graph = graph_of(body)
    assert len(FoldConstants(limit=1000).run(graph)) == len(graph)
    assert "neg" not in [n.op.split(".")[1] for n in FoldConstants().run(graph).nodes]


def test_folding_does_not_build_large_results():
    graph = graph_of(lambda b, x: b.neg(b.expand(b.const(1.0), shape=(1 << 10, 1 << 10))))
    assert [n.op for n in FoldConstants().run(graph).nodes] == [n.op for n in graph.nodes]


def test_folding_does_not_read_large_weights():
    class Exploding:
        def load(self):
            raise AssertionError("the weight was read")

    def body(b, x):
        return b.neg(b.graph.add_weight(Weight("w", TensorType("f32", (1 << 20,)), Exploding())))

    FoldConstants().run(graph_of(body))


class Only:
    """A target that takes some ops."""

    name = "toy"

    def __init__(self, *ops):
        self.ops = ops

    def missing(self, node):
        return None if node.op in self.ops else "the toy target does not know it"

    def advice(self, node):
        return None


def test_legalise_decomposes_until_it_fits():
    toy = Only("math.mul", "math.mean", "math.add", "math.rsqrt", "tensor.constant")
    after = Legalise(toy).run(graph_of(lambda b, x: b.rms(x)))
    assert {n.op for n in after.nodes} == set(toy.ops)
    x = torch.randn(2, 6)
    torch.testing.assert_close(run(after, [x])[0], torch.nn.functional.rms_norm(x, (6,), eps=1e-6))


def test_legalise_names_what_does_not_fit():
    graph = graph_of(lambda b, x: b.exp(x))
    with pytest.raises(CompileError, match=r"math.exp cannot run on toy: the toy target does not know it"):
        Legalise(Only()).run(graph)
    assert Legalise(Only(), fallback="reference").run(graph) == graph
