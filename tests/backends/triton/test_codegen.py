"""Generated elementwise kernels: every op and dtype against the reference, source text, layouts, limits."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch

from moec.backends.triton import run
from moec.backends.triton.codegen import expressible, literal, program
from moec.ir import CompileError, DType, Graph, TensorType, all_ops
from moec.ir.interpreter import evaluate_node
from moec.ir.sampling import Sampler, cases

ELEMENTWISE = [o for o in all_ops() if o.elementwise]
SPECIAL = [0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -2.5, 1.0, -1.0, 3.0, 1e-6, -30.0, 25.0, math.inf, -math.inf, math.nan]


def compare(got: torch.Tensor, want: torch.Tensor, what: str, operands: list[torch.Tensor]) -> None:
    """Floats to a few units of their last place at the value's size or 1; all else exactly; NaN where NaN is."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape), what
    if not want.dtype.is_floating_point:
        assert torch.equal(got, want), f"{what}: {got[got != want]} is not {want[got != want]}"
        return
    eps = torch.finfo(want.dtype).eps
    if what.startswith("math.pow") and want.dtype == torch.float64:
        eps *= 100  # exp(b ln a), where b ln a reaches 400
    close = torch.isclose(got.double(), want.double(), rtol=8 * eps, atol=2e-6 * min(1.0, eps / 1e-7), equal_nan=True)
    bad = [x.expand(want.shape)[~close] for x in operands]
    assert bool(close.all()), f"{what} of {bad}: {got[~close]} is not {want[~close]}"


def run_together(jobs: list) -> None:
    """Run (op, operands, attrs) jobs in few kernels: those of one result shape share one."""
    by_shape = defaultdict(list)
    for opdef, operands, attrs in jobs:
        g = Graph("one")
        values = [g.add_input(f"x{i}", TensorType.of(t)) for i, t in enumerate(operands)]
        node = g.create(opdef, values, attrs)
        shape = tuple(node.result.shape)
        by_shape[shape].append((node, values, operands))
    for shape, group in by_shape.items():
        for at in range(0, len(group), 24):
            part = group[at : at + 24]
            nodes = [node for node, _, _ in part]
            inputs = [v for _, values, _ in part for v in values]
            made = program(nodes, inputs, {}, [n.result for n in nodes])
            tensors = [t for _, _, operands in part for t in operands]
            results = run("elementwise", made.body, made.outputs, shape, *tensors)
            for (node, _, operands), got in zip(part, results, strict=True):
                compare(got, evaluate_node(node, operands, {})[0], f"{node.op} {node.attrs}", operands)


def test_every_elementwise_op_has_an_expression():
    for opdef in ELEMENTWISE:
        operands, attrs = next(iter(cases(opdef, Sampler())))
        g = Graph("one")
        values = [g.add_input(f"x{i}", TensorType.of(t)) for i, t in enumerate(operands)]
        assert expressible(g.create(opdef, values, attrs)), opdef.name


@pytest.mark.parametrize("size", [(0, 1, 5), (5, 3, 7)])
def test_ops_at_their_samples(size: tuple[int, int, int]):
    run_together([(o, operands, attrs) for o in ELEMENTWISE for operands, attrs in cases(o, Sampler(*size))])


def floats_of(opdef) -> int:
    """Number of float operands the op takes, 0 where it takes none."""
    try:
        operands = next(iter(cases(opdef, Sampler())))[0]
    except StopIteration:
        return 0
    return len(operands) if all(t.is_floating_point() for t in operands) else 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_special_values(dtype: torch.dtype):
    """Zeros, ties, infinities and NaN, in pairs; for `mod` finite operands only, `floordiv` of finite ones."""
    values = torch.tensor(SPECIAL, dtype=dtype)
    pairs = torch.cartesian_prod(values, values)
    jobs = []
    for opdef in ELEMENTWISE:
        if opdef.name == "math.cast":
            jobs += [(opdef, [values], {"dtype": d}) for d in ("f32", "bf16", "f16", "f8e4m3fn", "f64", "bool")]
        elif opdef.name == "math.clamp":
            jobs.append((opdef, [values], {"low": -0.3, "high": 1.1}))
        elif opdef.name in ("math.mod", "math.floordiv"):
            b = pairs[:, 1]
            finite = b.isfinite() if opdef.name == "math.mod" else ~b.isnan()
            jobs.append((opdef, list(pairs[pairs[:, 0].isfinite() & finite & (b.abs() > 0.1)].t()), {}))
        elif floats_of(opdef) == 1:
            jobs.append((opdef, [values], {}))
        elif floats_of(opdef) == 2:
            jobs.append((opdef, list(pairs.t()), {}))
    run_together(jobs)


def test_integers_and_casts():
    wide = torch.tensor([-128, -7, -1, 0, 1, 7, 127])
    jobs = []
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8):
        x = wide.to(dtype)
        pairs = torch.cartesian_prod(x, x)
        pairs = pairs[(pairs[:, 1] != 0) & ~((pairs[:, 0] == -128) & (pairs[:, 1] == -1))]
        for name in ("add", "mul", "floordiv", "mod", "max", "min", "lt", "eq"):
            jobs.append((f"math.{name}", list(pairs.t()), {}))
        jobs += [("math.cast", [x], {"dtype": d}) for d in ("i64", "i8", "bool", "f32", "bf16", "u8")]
    run_together([(next(o for o in ELEMENTWISE if o.name == n), x, a) for n, x, a in jobs])


def test_a_wrong_expression_is_seen(monkeypatch: pytest.MonkeyPatch):
    from moec.backends.triton import codegen

    monkeypatch.setitem(codegen._UNARY, "neg", "{0}")
    neg = next(o for o in ELEMENTWISE if o.name == "math.neg")
    with pytest.raises(AssertionError):
        run_together([(neg, [torch.tensor([1.0, 2.0])], {})])


def test_strides_and_broadcasting():
    a = torch.randn(4, 6, 5).transpose(0, 2)  # [5, 6, 4], not contiguous
    b, c, d = torch.randn(6, 1), torch.randn(()), torch.randn(5, 1, 4)[:, :, ::2].expand(5, 6, 2).repeat(1, 1, 2)
    body = "v0 = x0 * x1 + x2 - x3"
    (got,) = run("elementwise", body, (("v0", torch.float32),), (5, 6, 4), a, b, c, d)
    torch.testing.assert_close(got, a * b + c - d)
    assert got.is_contiguous()


def test_bad_inputs_are_refused():
    out = (("x0", torch.float32),)
    with pytest.raises(ValueError, match=r"input 0, float32\[3\], does not broadcast to \[2, 4\]"):
        run("elementwise", "", out, (2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="needs an input"):
        run("elementwise", "", out, (2, 4))


@pytest.mark.parametrize(
    ("value", "dtype", "text"),
    [
        (0.1, DType.BF16, "0.10009765625"),
        (math.inf, DType.F32, 'float("inf")'),
        (3, DType.I64, "3"),
        (1, "bool", "True"),
    ],
)
def test_literals_are_rounded_to_their_dtype(value: float, dtype: DType, text: str):
    assert text in literal(value, DType.of(dtype))


@pytest.mark.parametrize("dtype", ["f32", "i64"])
def test_every_op_compiles_for_sm_90(dtype: str):
    """All ops of one dtype in one kernel, through Triton's real compiler, which is stricter than its interpreter.

    So many live values spill (and sin and cos use local memory anyway): `test_aot.py` looks at a group of usual size.
    """
    from moec.backends.triton import aot
    from moec.backends.triton.kernels.elementwise import elementwise
    from moec.backends.triton.launch import interpreted

    assert not interpreted(), "nothing compiles where triton interprets: run the tests without TRITON_INTERPRET=1"
    kind = DType.of(dtype)
    g = Graph("all")
    x, y = (g.add_input(n, TensorType(kind, (4096, 64))) for n in "xy")
    condition = g.add_input("c", TensorType(DType.BOOL, (64,)))
    nodes = []
    for opdef in ELEMENTWISE:
        names = [n for n, _ in opdef.operands]
        values = {1: [x], 2: [x, y], 3: [condition, x, y]}[len(names)]
        attrs = {"math.clamp": {"low": 0, "high": 1}, "math.cast": {"dtype": "f8e4m3fn"}}.get(opdef.name, {})
        try:
            nodes.append(g.create(opdef, values, attrs))
        except CompileError:  # the op does not take this dtype
            values = [condition, condition][: len(names)]
            if opdef.name in ("math.and", "math.or", "math.xor", "math.not"):
                nodes.append(g.create(opdef, values, attrs))
    assert len(nodes) >= 20
    made = program(nodes, [x, y, condition], {}, [n.result for n in nodes])
    tensors = [torch.empty((4096, 64), dtype=kind.torch, device="meta") for _ in "xy"]
    tensors.append(torch.empty(64, dtype=torch.bool, device="meta"))
    (launch,) = aot.launches_of(lambda: elementwise(made.body, made.outputs, (4096, 64), *tensors))
    report = aot.inspect_launch(launch)
    assert report.shared_bytes <= aot.SHARED_LIMIT
    assert report.registers > 0
