"""Integer weights: MatMulNBits and QMoE on stored codes, standard operators where the model is to be portable.

Rows whose blocks hold whole numbers up to exactly ±127 are not rounded on the way in, so that products of stored
integers are exact up to f32 and every misplaced code or scale shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from moec.backends import get_backend
from moec.ir import DType, Graph, run
from moec.ir.ops.block_codes import quantize_blocks

from .conftest import agrees, compiled, graph_of, typed, weight

INTEGERS = ["i8", "i4"]


def whole(rows: int, k: int, rng: torch.Generator) -> torch.Tensor:
    """Whole numbers, ±127 in every 16 of a row."""
    x = torch.randint(-126, 127, (rows, k), generator=rng).float()
    x[:, ::16] = 127.0
    return x


def stored(n: int, k: int, dtype: str, block: tuple[int, int], rng: torch.Generator, *lead: int) -> Any:
    """Codes and scales of all magnitudes, so that no scale can stand for its neighbour."""
    codes, scale = quantize_blocks(torch.randn(*lead, n, k, generator=rng), block, DType.of(dtype))
    scale = scale * 4.0 ** torch.randint(-4, 5, scale.shape, generator=rng)
    return codes, scale


def linear_graph(
    n: int, k: int, dtype: str, block: tuple[int, int], rng: torch.Generator, *, bias: bool = False, of: str = "f32"
) -> Graph:
    codes, scale = stored(n, k, dtype, block, rng)

    def build(b: Any, x: Any) -> Any:
        w = b.dequantize(weight(b, "c", codes), weight(b, "scale", scale), block=block, dtype=of)
        added = weight(b, "bias", torch.randn(n, generator=rng).to(DType.of(of).torch)) if bias else None
        return b.linear(x, w, added)

    return graph_of({"x": typed(of, "T", k)}, build)


SHAPES = [(1, 1), (5, 15), (64, 16), (7, 33), (3, 100), (40, 300)]
BLOCKS = [(1, 16), (1, 32), (1, 128), (4, 32), (128, 128), (1, 48), (2, 512)]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_linear(dtype: str, n: int, k: int, block: tuple[int, int], rng: torch.Generator):
    exe = compiled(linear_graph(n, k, dtype, block, rng, bias=n % 2 == 1))
    assert exe.stats["forms"] == {"linear.nbits": 1}
    for rows in (0, 1, 3, 40):
        agrees(exe, [whole(rows, k, rng)])


def test_one_wrong_scale_is_seen(rng: torch.Generator):
    """These comparisons are not blind: a scale 1% off, and scales along the wrong axis."""
    graph = linear_graph(64, 64, "i4", (1, 16), rng)
    exe, x = compiled(graph), whole(5, 64, rng)
    agrees(exe, [x])
    scale = graph.weights["scale"].weight.load()
    for wrong in (scale * torch.where(torch.arange(64)[:, None] == 3, 1.01, 1.0), scale.T.reshape(64, 4)):
        other = linear_graph(64, 64, "i4", (1, 16), torch.Generator().manual_seed(0))
        other.bind_weights({"c": graph.weights["c"].weight.load(), "scale": wrong.contiguous()})
        exe.graph = other
        with pytest.raises(AssertionError):
            agrees(exe, [x])


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("of", ["bf16", "f16"])
def test_narrow_models(dtype: str, of: str, rng: torch.Generator):
    """Weights are not rounded to bf16 here, as they are in the reference."""
    exe = compiled(linear_graph(8, 40, dtype, (1, 32), rng, bias=True, of=of))
    agrees(exe, [whole(3, 40, rng).to(DType.of(of).torch)], rtol=2e-2)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_rows_are_rounded_to_8_bits(dtype: str, rng: torch.Generator):
    """By about 0.5%, which is what `coarse_sums` says, and each by itself: a row alone gives what it gives among
    others."""
    graph = linear_graph(64, 256, dtype, (1, 32), rng)
    exe, x = compiled(graph), torch.randn(50, 256, generator=rng)
    got, want = exe.run([x])[0], run(graph, [x])[0]
    error = float((got - want).norm() / want.norm())
    unit, terms = get_backend("onnxruntime").coarse_sums(graph.outputs[0].producer)
    assert 1e-3 < error < 2 * unit * terms**0.5
    for i in (0, 17, 49):
        torch.testing.assert_close(exe.run([x[i : i + 1]])[0][0], got[i], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_odd_blocks_are_dequantised(dtype: str, rng: torch.Generator):
    """Which no plan makes, but a graph may hold."""
    exe = compiled(linear_graph(8, 60, dtype, (1, 24), rng))
    assert exe.stats["forms"] == {"linear.dequantised": 1}
    x = torch.randn(3, 60, generator=rng)
    agrees(exe, [x])
    assert get_backend("onnxruntime").coarse_sums(exe.graph.outputs[0].producer) is None


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("block", [(1, 16), (1, 32), (4, 32)])
def test_portable_is_exact(dtype: str, n: int, k: int, block: tuple[int, int], rng: torch.Generator, tmp_path: Path):
    exe = compiled(linear_graph(n, k, dtype, block, rng), portable=True)
    agrees(exe, [torch.randn(3, k, generator=rng)])
    exe.save(tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    assert {n.domain for n in model.graph.node} == {""}
    assert "DequantizeLinear" in {n.op_type for n in model.graph.node}
    kind = onnx.TensorProto.INT4 if dtype == "i4" else onnx.TensorProto.INT8
    assert kind in {i.data_type for i in model.graph.initializer}


@pytest.mark.parametrize("memory", ["fast", "fp8", "mapped"])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_weights_stay_integers(dtype: str, memory: str, tmp_path: Path, rng: torch.Generator):
    exe = compiled(linear_graph(512, 512, dtype, (1, 32), rng), memory=memory)
    bits = DType.of(dtype).bits
    most = 512 * 512 * (bits + 32 / 32) / 8
    assert exe.stats["memory"]["weight_bytes_resident"] == {"fast": most, "fp8": most, "mapped": 0}
    exe.save(tmp_path)
    assert sum(f.stat().st_size for f in tmp_path.glob("model.onnx*")) < most + 4096
    x = whole(3, 512, rng)
    agrees(exe, [x])
    again = get_backend("onnxruntime").load(exe.graph, tmp_path, threads=1)
    assert torch.equal(again.run([x])[0], exe.run([x])[0])


@pytest.mark.parametrize("dtype", INTEGERS)
def test_codes_that_are_computed(dtype: str, rng: torch.Generator):
    """As inputs: multiplied out in the graph."""
    codes, scale = stored(6, 40, dtype, (1, 32), rng)
    types = {"x": typed("f32", "T", 40), "c": typed(dtype, 6, 40), "scale": typed("f32", 6, 2)}
    exe = compiled(graph_of(types, lambda b, x, c, s: b.linear(x, b.dequantize(c, s, block=(1, 32)))))
    agrees(exe, [torch.randn(3, 40, generator=rng), codes, scale])


FORMS = ["unrolled", "moe", "loop", "portable"]
CASES = [
    {},
    {"biases": 2, "limit": 0.7},
    {"biases": 1},
    {"num": 1, "k": 1},
    {"d": 70, "f": 20},
    {"block": (4, 128)},
    {"of": "bf16", "biases": 2},
]


def experts_graph(
    dtype: str,
    rng: torch.Generator,
    *,
    num: int = 5,
    d: int = 64,
    f: int = 32,
    k: int = 2,
    biases: int = 0,
    limit: float | None = None,
    block: tuple[int, int] = (1, 32),
    of: str = "f32",
) -> Graph:
    """Routed, as QMoE wants it: router logits come from outside."""
    gate_up = quantize_blocks(torch.randn(num, 2 * f, d, generator=rng) / d**0.5, block, DType.of(dtype))
    down = quantize_blocks(torch.randn(num, d, f, generator=rng) / f**0.5, block, DType.of(dtype))
    added = torch.randn(num, 2 * f, generator=rng), torch.randn(num, d, generator=rng)

    def build(b: Any, x: Any, logits: Any) -> Any:
        named = {"gu": gate_up[0], "gus": gate_up[1], "dn": down[0], "dns": down[1]}
        given = [weight(b, n, t) for n, t in named.items()]
        wide = DType.of(of).torch
        given += [weight(b, n, t.to(wide)) for n, t in zip(("gb", "db"), added, strict=True)][:biases]
        return b.scaled_experts(x, *b.route(logits, k=k), *given, block=block, group=None, limit=limit)

    return graph_of({"x": typed(of, "T", d), "logits": typed(of, "T", num)}, build)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts(dtype: str, form: str, case: dict[str, Any], rng: torch.Generator):
    graph = experts_graph(dtype, rng, **case)
    options = {"portable": True} if form == "portable" else {"experts": form}
    if form == "moe" and case.get("d") == 70:
        with pytest.raises(Exception, match="blocks of 32 do not divide rows of 70 and 20"):
            compiled(graph, **options)
        return
    exe = compiled(graph, **options)
    d, num = graph.inputs[0].shape[1], graph.inputs[1].shape[1]
    for rows in (0, 1, 3, 40):
        wide = graph.inputs[0].dtype.torch
        x, logits = (torch.randn(rows, n, generator=rng).to(wide) for n in (d, num))
        if form in ("loop", "portable") and wide is torch.float32:  # activations stay as they are
            agrees(exe, [x, logits])
            continue
        got, want = exe.run([x, logits])[0].float(), run(graph, [x, logits])[0].float()
        assert got.shape == want.shape
        assert not rows or float((got - want).norm() / want.norm()) < 0.03


@pytest.mark.parametrize("form", ["unrolled", "moe"])
@pytest.mark.parametrize("name", ["gus", "dns"])
def test_a_wrong_scale_of_experts_is_seen(form: str, name: str, rng: torch.Generator):
    graph = experts_graph("i4", rng)
    exe = compiled(graph, experts=form)
    x, logits = torch.randn(40, 64, generator=rng), torch.randn(40, 5, generator=rng)
    scale = graph.weights[name].weight.load()
    graph.bind_weights({name: scale.flip(-1) if scale.shape[-1] > 1 else scale.flip(-2)})
    got, want = exe.run([x, logits])[0], run(graph, [x, logits])[0]
    assert float((got - want).norm() / want.norm()) > 0.05


@pytest.mark.parametrize("form", ["unrolled", "moe"])
def test_experts_keep_nan_of_a_router(form: str, rng: torch.Generator):
    exe = compiled(experts_graph("i4", rng), experts=form)
    x, logits = torch.randn(4, 64, generator=rng), torch.randn(4, 5, generator=rng)
    logits[2] = torch.nan
    got = exe.run([x, logits])[0]
    assert got.isnan().all(-1).tolist() == [False, False, True, False]
    assert bool(got[[0, 1, 3]].isfinite().all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_leaves_the_graph(bad: float, rng: torch.Generator):
    """MatMulNBits makes numbers of NaN: what comes out of the graph has it again."""
    codes, scale = stored(32, 32, "i4", (1, 32), rng)

    def build(b: Any, x: Any) -> Any:
        w = b.dequantize(weight(b, "c", codes), weight(b, "scale", scale), block=(1, 32))
        h = b.add(x, b.linear(x, w))
        return b.slice(b.linear(h, w), axis=1, start=0, end=5)

    x = torch.randn(4, 32, generator=rng)
    x[1, 3] = bad
    got = compiled(graph_of({"x": typed("f32", "T", 32)}, build)).run([x])[0]
    assert got.isnan().all(-1).tolist() == [False, True, False, False]
    assert bool(got[[0, 2, 3]].isfinite().all())


def test_the_form_of_integer_experts(rng: torch.Generator):
    assert compiled(experts_graph("i4", rng)).stats["forms"] == {"experts.moe": 1}
    assert compiled(experts_graph("i4", rng), memory="fp8").stats["forms"] == {"experts.moe": 1}
    assert compiled(experts_graph("i4", rng, d=70)).stats["forms"] == {"experts.unrolled": 1}
    assert compiled(experts_graph("i4", rng), portable=True).stats["forms"] == {"experts.dense": 1}


def test_experts_with_weights_of_any_sign(rng: torch.Generator):
    """Not behind a router: QMoE leaves out what is not positive."""
    codes, scale = stored(64, 32, "i8", (1, 32), rng, 4)
    down, down_scale = stored(32, 32, "i8", (1, 32), rng, 4)

    def build(b: Any, x: Any, w: Any, i: Any) -> Any:
        named = {"gu": codes, "gus": scale / 100, "dn": down, "dns": down_scale}
        return b.scaled_experts(x, w, i, *[weight(b, n, t) for n, t in named.items()], block=(1, 32), group=None)

    types = {"x": typed("f32", "T", 32), "w": typed("f32", "T", 2), "i": typed("i64", "T", 2)}
    graph = graph_of(types, build)
    exe = compiled(graph)
    assert exe.stats["forms"] == {"experts.unrolled": 1}
    inputs = [torch.randn(9, 32, generator=rng), torch.randn(9, 2, generator=rng), torch.randint(0, 4, (9, 2))]
    got, want = exe.run(inputs)[0], run(graph, inputs)[0]
    assert float((got - want).norm() / want.norm()) < 0.03
