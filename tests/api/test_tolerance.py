"""That the comparison helpers can say no."""

from __future__ import annotations

import math

import pytest
import torch

import moec
from moec.difference import difference
from moec.ir import ArgumentTypeError, ArgumentValueError, DType, all_ops, run
from moec.ir.sampling import Sampler
from moec.op_cases import single
from moec.tolerance import (
    Bound,
    check_tolerance,
    end_to_end,
    given_bound,
    one_node,
    reduction_length,
    scale_of,
    unit,
)

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


COMPUTES = [o for o in all_ops() if o.samples is not None and o.family not in ("tensor", "call", "extern")]
LARGE = Sampler(64, 64, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("opdef", COMPUTES, ids=lambda o: o.name)
def test_one_percent_of_any_op_is_seen(opdef, dtype):
    """Up or down, of all of a result (where it is not a handful of numbers)."""
    seen, taken = 0, 0
    for operands, attrs in opdef.samples(LARGE):
        given = [t.to(dtype) if t is not None and t.dtype == torch.float32 else t for t in operands]
        try:
            graph = single(opdef, given, attrs)
        except moec.CompileError:  # the op does not take this dtype
            continue
        taken += 1
        inputs = [t for t in given if t is not None]
        node = next(iter(graph.nodes))
        operand_values = dict(zip(graph.inputs, inputs, strict=True))
        for value, y in zip(node.results, run(graph, inputs), strict=True):
            if not y.is_floating_point() or y.dtype.itemsize == 1 or (y.isfinite() & (y != 0)).sum() < 64:
                continue
            bound, scale = one_node(node, value, {}), scale_of(y, node, operand_values)
            assert difference(y, y, bound, scale).ok
            for factor in (1.01, 1 / 1.01):
                d = difference(y, (y.double() * factor).to(y.dtype), bound, scale)
                assert not d.ok, f"{attrs} {d}"
                assert d.max_error > d.tolerance
                assert d.badness > 1
            seen += 1
    assert seen or not taken or opdef.name in NOT_FLOATS


NOT_FLOATS = {
    o.name for o in COMPUTES if o.name.split(".")[1] in ("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "xor")
} | {"math.any", "math.all", "math.argmax", "moe.remap", "math.isnan", "math.isinf"}


@pytest.mark.parametrize("width", [64, 512, 7168])
def test_another_eps_is_seen(width):
    x, w = torch.randn(32, width), torch.rand(width) + 0.5
    results = []
    for eps in (1e-6, 1e-5):
        graph = moec.parse(
            f"graph(%x: f32[T, {width}], %w: f32[{width}]) -> (%y: f32[T, {width}]) {{\n"
            f"  %0: f32[T, {width}] = norm.rms(%x, %w) {{eps={eps}}}\n  return %0\n}}"
        )
        results += run(graph, [x, w])
    node = next(iter(graph.nodes))
    bound, scale = one_node(node, node.result, {"T": 32}), scale_of(results[0], node, {})
    assert not difference(*results, bound, scale).ok
    double = [x.double(), w.double()]
    exact = double[0] * (double[0].square().mean(-1, keepdim=True) + 1e-6).rsqrt() * double[1]
    assert difference(exact, results[0].double(), bound, scale).ok


def test_the_typical_error_decides_where_no_element_is_far_off():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    bound = Bound(1e-3, "test", typical=1e-4)
    one, all_of_it = x.clone(), x * (1 + 2e-4)
    one[3, 4] += 9e-4 * float(x.abs().max())
    scale = scale_of(x, None, {})
    assert difference(x, one, bound, scale).ok
    d = difference(x, all_of_it, bound, scale)
    assert not d.ok
    assert d.max_error > d.tolerance
    assert "relative error 0.0002, at most" in d.why


def test_what_cancels_counts_for_one_node_with_f32_s_errors_only():
    """x + y of large operands in bf16: both sides round the small sum, and nothing else."""
    text = "graph(%x: bf16[T], %y: bf16[T]) -> (%z: bf16[T]) {\n  %0: bf16[T] = math.sub(%x, %y)\n  return %0\n}"
    graph = moec.parse(text)
    node = next(iter(graph.nodes))
    x = torch.full((256,), 256.0, dtype=torch.bfloat16)
    y = torch.full((256,), 254.0, dtype=torch.bfloat16)
    (z,) = run(graph, [x, y])
    scale = scale_of(z, node, dict(zip(graph.inputs, (x, y), strict=True)))
    assert scale == 256
    assert not difference(z, z * 1.02, one_node(node, node.result, {"T": 256}), scale).ok


def test_narrow_roundings_reach_what_is_computed_from_them():
    graph = moec.parse(
        "graph(%x: bf16[T, 16], %w: bf16[3, 16]) -> (%y: f32[T, 3]) {\n"
        "  %0: bf16[T, 3] = linear.linear(%x, %w)\n  %1: f32[T, 3] = math.cast(%0) {dtype=f32}\n  return %1\n}"
    )
    cast = list(graph.nodes)[1]
    assert end_to_end(graph, BINDING)[cast.result].relative > unit(DType.BF16)
    assert one_node(cast, cast.result, BINDING).relative < 1e-5


def test_given_tolerances(mlp):
    up = next(n for n in mlp.nodes if n.location.under("up"))
    derived = one_node(up, up.result, BINDING)
    assert given_bound(derived, None, up) is derived
    assert given_bound(derived, 0.25, up) == Bound(0.25, "given")
    exact = Bound(0.0, "i64 must be equal")
    assert given_bound(exact, 0.25, up) is exact
    named = {"": 1.0, "linear": 2.0, "linear.linear": 3.0, "up": 4.0, "y": 5.0}
    for expected, output in ((5.0, "y"), (4.0, None)):
        assert given_bound(derived, named, up, output).relative == expected
    for key in ("up", "linear.linear", "linear"):
        assert given_bound(derived, named, up).relative == named.pop(key)
    assert given_bound(derived, named, up).relative == 1.0
    assert given_bound(derived, {"norm": 1.0, "u": 1.0}, up) is derived


def test_a_longer_path_is_nearer():
    graph = moec.parse(
        "graph(%x: f32[T]) -> (%y: f32[T]) {\n"
        '  %0: f32[T] = math.neg(%x) loc("model.layers.1.mlp" "m.py":1)\n  return %0\n}'
    )
    node = next(iter(graph.nodes))
    bound = one_node(node, node.result, BINDING)
    assert given_bound(bound, {"model": 1.0, "model.layers.1": 2.0, "math.neg": 3.0}, node).relative == 2.0
    assert given_bound(bound, {"model.layers.10": 1.0, "model.layers.": 1.0}, node) is bound


@pytest.mark.parametrize(
    ("tolerance", "kind", "message"),
    [
        ("1e-3", ArgumentTypeError, "tolerance must be a relative error, got str '1e-3'"),
        (True, ArgumentTypeError, "got bool True"),
        (-1e-3, ArgumentValueError, "tolerance must be a finite number of at least 0, got -0.001"),
        (math.nan, ArgumentValueError, "got nan"),
        (math.inf, ArgumentValueError, "got inf"),
        ({"norm.rms": "small"}, ArgumentTypeError, r"tolerance\['norm.rms'\] must be a relative error, got str"),
        ({3: 1.0}, ArgumentTypeError, "a key of tolerance must be an op, a family, a module path or an output, got 3"),
        ({"norm.rms": -1}, ArgumentValueError, r"tolerance\['norm.rms'\] must be a finite number"),
    ],
)
def test_bad_tolerances(tolerance, kind, message):
    with pytest.raises(kind, match=message):
        check_tolerance(tolerance)
    check_tolerance(None)
    check_tolerance(0.5)
    check_tolerance({"": 1})


def test_coarse_sums_loosen_a_bound_by_what_they_add():
    """Half the terms of a linear layer in units of 2⁻¹⁶: a 1% perturbation is still seen."""
    graph = moec.parse(
        "graph(%x: f32[T, 256]) -> (%y: f32[T, 32]) {\n  weight @w: f32[32, 256]\n"
        "  %0: f32[T, 32] = linear.linear(%x, @w)\n  return %0\n}"
    )
    node = next(graph.nodes)
    fine, coarse = one_node(node, node.result, BINDING), one_node(node, node.result, BINDING, (2.0**-16, 128))
    added = 2.0**-16 * 128**0.5
    assert coarse.relative == pytest.approx(fine.relative + 8 * added)
    assert coarse.typical == pytest.approx(fine.typical + 2 * added)
    y = torch.randn(5, 32)
    scale = scale_of(y, None, {})
    assert difference(y, y * (1 + 1e-4), coarse, scale).ok
    assert not difference(y, y * (1 + 1e-4), fine, scale).ok
    assert not difference(y, y * 1.01, coarse, scale).ok


def test_coarse_sums_of_quantised_experts_still_show_one_percent():
    text = (
        "graph(%x: f32[T, 64], %w: f32[T, 2], %e: i64[T, 2]) -> (%y: f32[T, 64]) {\n"
        "  weight @gu: f8e4m3fn[4, 192, 64]\n  weight @gs: f32[4, 2, 1]\n"
        "  weight @d: f8e4m3fn[4, 64, 96]\n  weight @ds: f32[4, 1, 1]\n"
        "  %0: f32[T, 64] = quant.scaled_experts(%x, %w, %e, @gu, @gs, @d, @ds) {group=128}\n  return %0\n}"
    )
    node = next(moec.parse(text).nodes)
    bound = one_node(node, node.result, BINDING, (2.0**-16, 256))
    y = torch.randn(400, 64)
    flipped = y.clone()
    flipped[::7] += 0.01 * torch.randn(58, 64)  # one inner code of every seventh row
    assert difference(y, flipped, bound, scale_of(y, None, {})).ok
    assert not difference(y, y * 1.01, bound, scale_of(y, None, {})).ok


def test_sizes_that_only_a_called_function_knows_are_bounded_by_what_it_counts():
    graph = moec.parse(
        "graph(%x: f32[T, 4]) -> (%y: f32[]) {\n"
        '  %0: f32[] = call.graph(%x) {callee="f", dims=[["F", T]]}\n  return %0\n}\n\n'
        "function @f(%a: f32[F, 4]) -> (%out: f32[]) {\n  %0: i64[R0, 2] = tensor.nonzero(%a) {count=R0}\n"
        "  %1: f32[R0, 2] = math.cast(%0) {dtype=f32}\n  %2: f32[] = math.sum(%1) {axes=[0, 1]}\n  return %2\n}"
    )
    (y,) = graph.outputs
    assert end_to_end(graph, {"T": 5})[y].why.endswith("ΣK = 42")  # 20 rows of two, a cast
    assert end_to_end(graph, {"T": 0})[y].relative > 0
