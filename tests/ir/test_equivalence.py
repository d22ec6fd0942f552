"""The judge of rewrites judged: small and rare mistakes do not pass, and rounding is no mistake."""

import math

import pytest
import torch

from moec.ir import ComputedSource, Weight
from moec.ir.equivalence import Oracle, compare, first_difference

from .samples import T, graph_of, seeded


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
