"""Every backend's FP8 arithmetic against the oracle of `moec.ir.fp8`, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from moec.backends import Executable, get_backend
from moec.ir import Builder, CompileError, DType, Graph, TensorType, Weight
from moec.ir.fp8 import E4M3FN, FORMATS, codes_of, quantize_exactly
from moec.passes.legalise import Legalise

F8 = torch.float8_e4m3fn
ALL = torch.arange(256, dtype=torch.uint8)
SETUPS: dict[str, tuple[str, dict[str, Any]]] = {
    "reference": ("reference", {}),
    "onnxruntime": ("onnxruntime", {}),
    "portable": ("onnxruntime", {"portable": True}),
    "triton": ("triton", {}),
}
every_backend = pytest.mark.parametrize("setup", SETUPS)


def executable(setup: str, types: Sequence[TensorType], build: Callable[..., Any], **more: Any) -> Executable:
    """`build(b, *inputs)` as a backend compiles it."""
    g = Graph("fp8")
    inputs = [g.add_input(f"x{i}", t) for i, t in enumerate(types)]
    made = build(Builder(g), *inputs)
    for v in made if isinstance(made, tuple) else (made,):
        g.add_output(v)
    g.verify()
    name, options = SETUPS[setup]
    backend = get_backend(name)
    return backend.compile(Legalise(backend).run(backend.prepare(g)), threads=1, options=options | more)


def on(setup: str, tensors: Sequence[torch.Tensor], build: Callable[..., Any], **more: Any) -> list[torch.Tensor]:
    return executable(setup, [TensorType.of(t) for t in tensors], build, **more).run(tensors)


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal bits of one dtype, but that a NaN is any NaN."""
    assert got.shape == want.shape
    if got.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        fmt = FORMATS[DType.of(got.dtype)]
        got = codes_of(got)
        a, b = fmt.decode(got), fmt.decode(want)
    else:
        a, b = got.double(), want.double()
        got, want = a.view(torch.int64), b.view(torch.int64)
    differ = (got != want) & ~(a.isnan() & b.isnan())
    at = differ.nonzero()[:4].tolist()
    shown = [(i, a[*i].item(), b[*i].item()) for i in at]
    assert not differ.any(), f"{int(differ.sum())} of {differ.numel()} differ, at, got, want: {shown}"


def numbers(dtype: torch.dtype, target: torch.dtype) -> torch.Tensor:
    """All 16-bit floats; in f32 every code, midpoint, threshold and their neighbours, subnormals, ±0, ±∞ and NaN."""
    if dtype != torch.float32:
        return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    fmt = FORMATS[DType.of(target)]
    value = fmt.decode(torch.arange(fmt.largest_code + 1, dtype=torch.uint8))
    points = torch.cat([value, (value[1:] + value[:-1]) / 2, torch.tensor([fmt.overflow, 2 * fmt.largest, 1e30])])
    points = points.to(torch.float32)
    near = [torch.nextafter(points, torch.tensor(to)) for to in (torch.inf, -torch.inf)]
    x = torch.cat([points, *near, torch.tensor([torch.inf, torch.nan])])
    return torch.cat([x, -x])


@every_backend
@pytest.mark.parametrize("source", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("target", ["f8e4m3fn", "f8e5m2"])
def test_cast_to_codes(setup: str, source: str, target: str):
    to = DType.of(target)
    x = numbers(DType.of(source).torch, to.torch)
    if setup == "triton" and to is DType.F8E5M2:
        with pytest.raises(CompileError, match=r"math\.cast.*triton does not take f8e5m2"):
            on(setup, [x], lambda b, x: b.cast(x, dtype=to))
        return
    (got,) = on(setup, [x], lambda b, x: b.cast(x, dtype=to))
    same(got, FORMATS[to].encode(x, saturate=to is DType.F8E4M3))


@every_backend
def test_f64_is_rounded_by_way_of_f32(setup: str):
    """As torch and ml_dtypes do: next to a midpoint in float64 is on it in float32."""
    middle = numbers(torch.float32, F8).double()
    x = torch.cat([torch.nextafter(middle, torch.tensor(to, dtype=torch.float64)) for to in (torch.inf, -torch.inf)])
    (got,) = on(setup, [x], lambda b, x: b.cast(x, dtype="f8e4m3fn"))
    same(got, E4M3FN.encode(x.to(torch.float32), saturate=True))


@every_backend
@pytest.mark.parametrize("target", ["f32", "f16", "bf16", "f64"])
def test_cast_of_every_code(setup: str, target: str):
    (got,) = on(setup, [ALL.view(F8)], lambda b, x: b.cast(x, dtype=target))
    assert got.dtype == DType.of(target).torch
    same(got, E4M3FN.decode(ALL))


BLOCKS = {
    "token groups of 128": ((1, 128), (5, 300)),
    "token groups of 4": ((1, 4), (7, 10)),
    "whole rows": ((1, 96), (4, 96)),
    "128 × 128": ((128, 128), (130, 200)),
    "flat": ((3, 5), (7, 13)),
    "column": ((8, 1), (8, 3)),
    "whole tensor": ((6, 16), (6, 16)),
    "leading axes": ((2, 4), (2, 3, 5, 6)),
}


@every_backend
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("case", BLOCKS)
def test_quantize(setup: str, dtype: str, case: str):
    """Ordinary blocks, blocks of zeros, subnormals, huge values, and one NaN or infinity."""
    block, shape = BLOCKS[case]
    r = torch.Generator().manual_seed(len(case))
    x = torch.randn(shape, generator=r)
    for scale in (1.0, 2.0**-140, 2.0**120):
        given = (x * scale).to(DType.of(dtype).torch)
        codes, scales = on(setup, [given], lambda b, x: b.quantize(x, block=block))
        want_codes, want_scales = quantize_exactly(given, block)
        same(scales, want_scales)
        same(codes, want_codes)
    for bad in (torch.nan, torch.inf, -torch.inf):
        given = x.to(DType.of(dtype).torch)
        given[..., 1, 1 % shape[-1]] = bad
        given[..., : shape[-2] // 2, :] *= 0.0 if not math.isnan(bad) else 1.0
        codes, scales = on(setup, [given], lambda b, x: b.quantize(x, block=block))
        want_codes, want_scales = quantize_exactly(given, block)
        same(scales, want_scales)
        same(codes, want_codes)


def scales_of(codes: torch.Tensor, block: tuple[int, int], values: Sequence[float]) -> torch.Tensor:
    """Scales for codes [..., R, C], the given values over and over."""
    *lead, rows, columns = codes.shape
    shape = (*lead, -(-rows // block[0]), -(-columns // block[1]))
    return torch.tensor(values, dtype=torch.float32).repeat(math.prod(shape))[: math.prod(shape)].reshape(shape)


HOSTILE_SCALES = [1.0, 2.0**-130, 3e38, 0.0, -0.75, torch.nan, torch.inf, 1e-3, 2.0**-149]


@every_backend
@pytest.mark.parametrize("block", [(1, 128), (1, 4), (128, 128), (3, 5)], ids=str)
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "f64"])
@pytest.mark.parametrize("stored", [False, True])
def test_dequantize(setup: str, block: tuple[int, int], dtype: str, stored: bool):
    """Every code under every kind of scale, as inputs or weights: the product rounded to float32, then to `dtype`."""
    codes = ALL.repeat(12).reshape(24, 128).T.contiguous().reshape(16, 192)
    # stored scales that are not finite are refused
    scale = scales_of(codes, block, [s for s in HOSTILE_SCALES if math.isfinite(s) or not stored])
    given = [codes.view(F8), scale]

    def build(b: Any, *inputs: Any) -> Any:
        c, s = [b.graph.add_weight(Weight.of(f"w{i}", t)) for i, t in enumerate(given)] if stored else inputs
        return b.dequantize(c, s, block=block, dtype=dtype)

    (got,) = on(setup, [] if stored else given, build)
    wide = scale.double().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:16, :192]
    same(got, (E4M3FN.decode(codes) * wide).to(torch.float32).to(DType.of(dtype).torch))


def product(codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """codes · scale in float64, which holds it exactly."""
    wide = scale.double().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return E4M3FN.decode(codes) * wide[..., : codes.shape[-2], : codes.shape[-1]]


@every_backend
def test_scaled_linear_multiplies_every_pair_of_codes(setup: str):
    """256 × 256 products of one column, each exact in float32."""
    one = torch.tensor([[2.0]])
    x, w = ALL.reshape(256, 1), ALL.reshape(256, 1)
    xs = torch.tensor([[1.0], [0.5]]).repeat(128, 1)
    (got,) = on(
        setup,
        [x.view(F8), xs, w.view(F8), one],
        lambda b, *v: b.scaled_linear(*v, block=(256, 1), group=1),
    )
    want = product(x, xs, (1, 1)) @ product(w, one, (256, 1)).T
    same(got + 0.0, want.to(torch.float32) + 0.0)  # the sign of a zero sum depends on what it is added to


def exact_codes(r: torch.Generator, *shape: int) -> torch.Tensor:
    """Codes of the integers −8 … 8, whose sums of products are exact in float32."""
    return E4M3FN.encode(torch.randint(-8, 9, shape, generator=r).float(), saturate=True)


def powers(r: torch.Generator, *shape: int) -> torch.Tensor:
    """Scales 2^−2 … 2^2."""
    return torch.ldexp(torch.ones(shape), torch.randint(-2, 3, shape, generator=r))


GRANULARITIES = {
    "128 × 128": ((128, 128), 128, (5, 200, 300)),
    "ragged": ((4, 8), 8, (7, 10, 19)),
    "per channel": ((1, 32), 32, (3, 9, 64)),
    "tall": ((256, 16), 16, (4, 300, 40)),
    "other groups": ((4, 8), 4, (3, 6, 16)),
}


@every_backend
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("case", GRANULARITIES)
def test_scaled_linear(setup: str, case: str, biased: bool):
    """Sums that are exact in any order have one result, whichever way a kernel adds up and scales."""
    block, group, (m, n, k) = GRANULARITIES[case]
    r = torch.Generator().manual_seed(3)
    x, w = exact_codes(r, m, k), exact_codes(r, n, k)
    xs, ws = powers(r, m, -(-k // group)), powers(r, -(-n // block[0]), -(-k // block[1]))
    bias = torch.randint(-4, 5, (n,), generator=r).float()
    given = [x.view(F8), xs, w.view(F8), ws, *([bias] if biased else [])]
    (got,) = on(setup, given, lambda b, *v: b.scaled_linear(*v, block=block, group=group))
    want = product(x, xs, (1, group)) @ product(w, ws, block).T + (bias.double() if biased else 0)
    same(got + 0.0, want.to(torch.float32) + 0.0)


def experts_exactly(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    group: int | None,
) -> torch.Tensor:
    """ReLU-gated experts in float64, the rows going into both products quantised by the oracle."""

    def rounded(rows: torch.Tensor) -> torch.Tensor:
        if group is None:
            return rows.double()
        return product(*quantize_exactly(rows.to(torch.float32), (1, group)), (1, group)).to(torch.float32).double()

    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(len(x)):
        for j, e in enumerate(experts[t].tolist()):
            gate, up = (gate_up[e] @ rounded(x[t : t + 1])[0]).chunk(2)
            out[t] += (down[e] @ rounded((gate.relu() * up)[None])[0]) * weights[t, j].double()
    return out


@pytest.mark.parametrize("group", [8, None])
@pytest.mark.parametrize(
    ("setup", "form"),
    [(s, f) for s in SETUPS for f in (("unrolled", "loop") if SETUPS[s][0] == "onnxruntime" else (None,))],
)
def test_scaled_experts(setup: str, form: str | None, group: int | None):
    """Integers and powers of two: exact in any order, so that a wrong block, code or scale cannot hide."""
    block, (t, e, k, d, f) = (4, 8), (6, 5, 2, 19, 11)
    r = torch.Generator().manual_seed(5)
    gu, dn = exact_codes(r, e, 2 * f, d), exact_codes(r, e, d, f)
    gus, dns = powers(r, e, -(-2 * f // 4), -(-d // 8)), powers(r, e, -(-d // 4), -(-f // 8))
    x = torch.randint(-4, 5, (t, d), generator=r).float()
    x[:, ::8] = 7.0  # every group's scale is 7 / 448, a power of two
    weights, experts = powers(r, t, k), torch.randint(0, e, (t, k), generator=r)

    def build(b: Any, x: Any, w: Any, i: Any) -> Any:
        stored = [
            b.graph.add_weight(Weight.of(name, tensor))
            for name, tensor in (("gu", gu.view(F8)), ("gus", gus), ("dn", dn.view(F8)), ("dns", dns))
        ]
        return b.scaled_experts(x, w, i, *stored, block=block, group=group, activation="relu")

    (got,) = on(setup, [x, weights, experts], build, **({"experts": form} if form else {}))
    want = experts_exactly(x, weights, experts, product(gu, gus, block), product(dn, dns, block), group)
    if group is None:
        same(got + 0.0, want.to(torch.float32) + 0.0)
    else:  # the hidden rows' scales are no powers of two: their products are not exact
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
