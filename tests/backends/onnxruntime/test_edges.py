"""Sizes, numbers and dtypes at which ONNX Runtime's kernels and optimiser do something else than the op says."""

import pytest
import torch

import moec
from moec.backends.onnxruntime import backend
from moec.ir import CompileError, parse
from moec.passes import Pipeline
from moec.program import Settings, legalise, lower


def got(text, *inputs):
    graph = parse(text)
    graph.verify()
    settings = Settings(backend, Pipeline(()))
    return lower(legalise(graph, settings)[0], settings, []).run(inputs)


def both(text, *inputs):
    return got(text, *inputs), moec.ir.run(parse(text), inputs)


def test_an_expand_to_nothing_stays():
    """The optimiser drops an Expand of ones to a constant shape with zeros, unless its operand is an input."""
    text = (
        "graph(%x: f32[1, 5]) -> (%y: f32[0, 1]) {\n  %0: f32[1, 1] = tensor.slice(%x) {axis=1, start=0, end=1}\n"
        "  %1: f32[0, 1] = tensor.expand(%0) {shape=[0, 1]}\n  return %1\n}"
    )
    assert got(text, torch.ones(1, 5))[0].shape == (0, 1)


@pytest.mark.parametrize(
    "node",
    [
        "%0: f64[3, 4] = norm.rms(%x, _) {eps=1e-05}",
        "%0: f64[3, 4] = norm.layer(%x, _, _) {eps=1e-05}",
        "%0: f64[3, 4], %1: f64[3, 4] = norm.add_rms(%x, %x, _) {eps=1e-05}",
    ],
)
def test_eps_of_an_f64_norm_is_not_rounded_to_f32(node):
    text = f"graph(%x: f64[3, 4]) -> (%y: f64[3, 4]) {{\n  {node}\n  return %0\n}}"
    (a,), (b,) = both(text, 0.01 * torch.randn(3, 4, dtype=torch.float64))
    torch.testing.assert_close(a, b, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("factors", ["scale=0.5, softcap=1e-30", "scale=0.5, softcap=1e30", "scale=1e6", "scale=1e-9"])
def test_factors_of_f16_attention_that_f16_cannot_hold(factors):
    text = (
        "graph(%q: f16[1, 2, 3, 4], %k: f16[1, 2, 5, 4], %v: f16[1, 2, 5, 4]) -> (%y: f16[1, 2, 3, 4]) {\n"
        f"  %0: f16[1, 2, 3, 4] = attention.sdpa(%q, %k, %v, _, _) {{{factors}}}\n  return %0\n}}"
    )
    q, k, v = (torch.randn(1, 2, n, 4) for n in (3, 5, 5))
    q[0, 0, 0] = 0  # a score of 0, which an infinite factor would turn into NaN
    (a,), (b,) = both(text, (q / 1e3).half(), (k / 1e3).half() if "1e6" in factors else k.half(), v.half())
    torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def test_f64_routers_by_softplus():
    text = (
        "graph(%x: f64[3, 4]) -> (%w: f64[3, 2], %e: i64[3, 2]) {\n"
        '  %0: f64[3, 2], %1: i64[3, 2] = moe.route(%x, _) {k=2, scoring="sqrt_softplus"}\n  return %0, %1\n}'
    )
    (weights, experts), (want, chosen) = both(text, torch.randn(3, 4, dtype=torch.float64))
    torch.testing.assert_close(weights, want, rtol=1e-13, atol=0.0)
    assert torch.equal(experts, chosen)


@pytest.mark.parametrize(
    "node",
    [
        '%0: f64[3, 4] = moe.experts(%x, %w, %e, %gu, %dn, _, _) {activation="gelu"}',
        '%0: f64[3, 4] = math.glu(%x, %x) {activation="gelu"}',
    ],
)
def test_the_exact_gelu_of_f64_is_refused_not_approximated(node):
    text = (
        "graph(%x: f64[3, 4], %w: f64[3, 2], %e: i64[3, 2], %gu: f64[2, 6, 4], %dn: f64[2, 4, 3]) -> (%y: f64[3, 4])"
        f" {{\n  {node}\n  return %0\n}}"
    )
    with pytest.raises(CompileError, match="no f64 kernel"):
        got(text)


@pytest.mark.parametrize("dtype", ["f64", "f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "bool"])
@pytest.mark.parametrize("scalar", [False, True])
def test_nonzero_takes_every_dtype(dtype, scalar):
    x = torch.tensor(1.0 if scalar else [0.0, 1.0, 0.0]).to(getattr(torch, str(moec.ir.DType(dtype).torch)[6:]))
    shape, rank = ("", 0) if scalar else ("3", 1)
    text = (
        f"graph(%x: {dtype}[{shape}]) -> (%y: i64[n, {rank}]) {{\n"
        f"  %0: i64[n, {rank}] = tensor.nonzero(%x) {{count=n}}\n  return %0\n}}"
    )
    (a,), (b,) = both(text, x)
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    "node",
    [
        "%0: f16[2] = tensor.full() {shape=[2], value=1e+30, dtype=f16}",
        "%0: f16[2] = tensor.pad(%x) {before=[1], after=[0], value=1e+30}",
    ],
)
def test_numbers_are_rounded_to_the_dtype_they_fill(node):
    """Their carrier is f32, where 1e30 is finite: the reciprocal would not be 0."""
    text = (
        f"graph(%x: f16[1]) -> (%y: f16[2], %z: f32[2]) {{\n  {node}\n  %1: f16[2] = math.reciprocal(%0)\n"
        "  %2: f32[2] = math.cast(%1) {dtype=f32}\n  return %1, %2\n}"
    )
    a, b = both(text, torch.ones(1).half())
    assert torch.equal(a[1], b[1])
    assert a[1][0] == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 0.5])
@pytest.mark.parametrize("axis", [0, 1])
def test_log_softmax_of_f64_knows_nan_and_infinity(bad, axis):
    text = (
        "graph(%x: f64[2, 5]) -> (%y: f64[2, 5]) {\n"
        f"  %0: f64[2, 5] = math.log_softmax(%x) {{axis={axis}}}\n  return %0\n}}"
    )
    x = torch.randn(2, 5, dtype=torch.float64)
    x[0, 2] = bad
    (a,), (b,) = both(text, x)
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("reduce", ["max", "min"])
@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16"])
def test_scattered_extremes_keep_nan(reduce, dtype):
    text = (
        f"graph(%x: {dtype}[4], %i: i64[3], %s: {dtype}[3]) -> (%y: {dtype}[4]) {{\n"
        f'  %0: {dtype}[4] = tensor.scatter_elements(%x, %i, %s) {{axis=0, reduce="{reduce}"}}\n  return %0\n}}'
    )
    nan = float("nan")
    wide = moec.ir.DType.of(dtype).torch
    x, s = torch.tensor([nan, 1.0, 2.0, -1.0], dtype=wide), torch.tensor([5.0, nan, 0.5], dtype=wide)
    (a,), (b,) = both(text, x, torch.tensor([0, 1, 2]), s)
    torch.testing.assert_close(a, b, rtol=0.0, atol=0.0, equal_nan=True)
    assert a.isnan().tolist() == [True, True, False, False]
