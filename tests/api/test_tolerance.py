"""That the comparison helpers can say no."""

from __future__ import annotations

import math

import pytest
import torch

import moec
from moec.difference import difference
from moec.ir import DType
from moec.tolerance import Bound, end_to_end, one_node, reduction_length, scale_of, unit

BINDING = {"T": 5}


def differ(a, b, relative=1e-5):
    return difference(a, b, Bound(relative, "test"), scale_of(a, None, {}))


def test_one_percent_is_seen(mlp):
    x = torch.randn(7, 9)
    for bound in (*end_to_end(mlp, BINDING).values(), *(one_node(n, n.result, BINDING) for n in mlp.nodes)):
        scale = scale_of(x, None, {})
        assert difference(x, x, bound, scale).ok
        assert not difference(x, x * 1.01, bound, scale).ok


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64, torch.bool])
def test_one_changed_element_is_seen(dtype):
    x = torch.ones(3, 4).to(dtype)
    y = x.clone()
    y[1, 2] = 0
    assert differ(x, x).ok
    assert not differ(x, y).ok


def test_integers_and_booleans_must_be_equal(mlp):
    bounds = end_to_end(mlp, BINDING)
    keep = mlp.inputs[1]
    assert bounds[keep].relative == 0.0
    assert not difference(torch.tensor([10**6]), torch.tensor([10**6 + 1]), bounds[keep], 1e6).ok


def test_one_percent_of_attention_is_seen():
    graph = moec.parse(
        "graph(%q: f32[T, 4, 6, 16], %k: f32[T, 2, 6, 16], %v: f32[T, 2, 6, 16]) -> (%y: f32[T, 4, 6, 16]) {\n"
        "  %0: f32[T, 4, 6, 16] = attention.sdpa(%q, %k, %v) {scale=0.25, causal=true}\n  return %0\n}"
    )
    q, k, v = torch.randn(5, 4, 6, 16), torch.randn(5, 2, 6, 16), torch.randn(5, 2, 6, 16)
    node = next(graph.nodes)
    (y,) = moec.ir.run(graph, [q, k, v])
    values = dict(zip(graph.inputs, (q, k, v), strict=True))
    bound, scale = one_node(node, node.result, BINDING), scale_of(y, node, values)
    assert scale > y.abs().max()
    assert not difference(y, y * 1.01, bound, scale).ok


def test_special_values():
    nan, inf = torch.tensor([math.nan, 1.0]), torch.tensor([math.inf, 1.0])
    assert differ(nan, nan).ok
    assert differ(inf, inf).ok
    assert not differ(nan, torch.tensor([0.0, 1.0])).ok
    assert not differ(torch.tensor([0.0, 1.0]), nan).ok
    assert not differ(inf, torch.tensor([1e38, 1.0])).ok
    assert not differ(inf, -inf).ok
    assert not differ(torch.tensor([1.0, 1.0]), inf).ok


def test_shapes_and_kinds_must_fit():
    assert not differ(torch.zeros(2, 3), torch.zeros(3, 2)).ok
    assert not differ(torch.zeros(2), torch.zeros(2, dtype=torch.int64)).ok
    assert differ(torch.zeros(0, 3), torch.zeros(0, 3)).ok


def test_codes_may_differ_by_one_step_rarely():
    x = torch.linspace(-400, 400, 1000).to(torch.float8_e4m3fn)
    bits = x.view(torch.uint8)
    one = bits.clone()
    one[500] += 1
    assert differ(x, one.view(torch.float8_e4m3fn)).ok
    two = bits.clone()
    two[500] += 2
    assert not differ(x, two.view(torch.float8_e4m3fn)).ok
    many = bits.clone()
    many[100:200] += 1
    assert not differ(x, many.view(torch.float8_e4m3fn)).ok
    zero, negative = torch.tensor([0.0]), torch.tensor([-0.0])
    assert differ(zero.to(torch.float8_e4m3fn), negative.to(torch.float8_e4m3fn)).max_error == 0


def test_tolerance_grows_with_the_reduction():
    small, large = (
        moec.parse(f"graph(%x: f32[T, {k}], %w: f32[3, {k}]) -> (%y: f32[T, 3]) {{\n"
                   f"  %0: f32[T, 3] = linear.linear(%x, %w)\n  return %0\n}}")
        for k in (16, 1024)
    )  # fmt: skip
    first, second = (next(g.nodes) for g in (small, large))
    assert reduction_length(second, BINDING) == 1024
    ratio = one_node(second, second.result, BINDING).relative / one_node(first, first.result, BINDING).relative
    assert ratio == pytest.approx(8.0)


def test_units():
    for dtype in (DType.F32, DType.F16, DType.BF16, DType.F64):
        assert unit(dtype) == torch.finfo(dtype.torch).eps / 2
    assert unit(DType.I64) == 0


def test_scale_counts_operands_of_sums():
    graph = moec.parse(
        "graph(%x: f32[T], %y: f32[T]) -> (%z: f32[T]) {\n  %0: f32[T] = math.sub(%x, %y)\n  return %0\n}"
    )
    node = next(graph.nodes)
    values = dict(zip(graph.inputs, (torch.full((2,), 1e4), torch.full((2,), 1e4)), strict=True))
    assert scale_of(torch.zeros(2), node, values) == 1e4
    assert scale_of(torch.tensor([math.inf, math.nan, -3.0]), None, {}) == 3.0


def test_relative_error_and_cosine():
    a = torch.tensor([3.0, 4.0, math.nan])
    d = differ(a, torch.tensor([3.0, 4.5, math.nan]), 0.2)
    assert d.ok
    assert d.relative_error == pytest.approx(0.1)
    assert d.cosine == pytest.approx((9 + 18) / (5 * math.sqrt(9 + 20.25)))
    assert differ(a, -a).cosine == pytest.approx(-1)
    zero = torch.zeros(3)
    assert differ(zero, zero).cosine == 1
    assert differ(zero, torch.ones(3)).relative_error == math.inf


def test_errors_are_found_in_every_chunk(monkeypatch):
    monkeypatch.setattr("moec.difference._CHUNK", 4)
    a = torch.ones(3, 5)
    whole = differ(a, a * 1.5)
    assert whole.max_error == whole.mean_error == whole.relative_error == 0.5
    for i in range(15):
        b = a.clone().reshape(-1)
        b[i] = 2.0
        assert not differ(a, b.reshape(3, 5)).ok


def test_neighbouring_large_integers_differ():
    big = torch.tensor([2**53])
    assert differ(big, big).ok
    assert not differ(big, big + 1).ok
