"""FP8: bit-exact codes, weights stored in FP8 and folded to f32 at load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from moec.backends.onnxruntime.session import session_options
from moec.ir import Dim, run
from moec.ir.ops.block_codes import quantize_blocks

from .conftest import agrees, compiled, graph_of, typed, weight

CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def awkward_values() -> torch.Tensor:
    """Every E4M3 value, every midpoint between two and its neighbours in f32, and what saturates."""
    values = CODES.float()
    ordered = values[values.isfinite()].unique().numpy()
    middle = (ordered[1:] + ordered[:-1]) / 2
    near = [np.nextafter(middle, np.float32(s) * np.inf) for s in (-1, 1)]
    beyond = np.array([448, 464, 465, 1e30, -1e30, np.inf, -np.inf, np.nan, 2**-10, -(2**-10), 1e-30], np.float32)
    return torch.from_numpy(np.concatenate([values.numpy(), middle, *near, beyond]).astype(np.float32))


def test_all_codes_and_midpoints():
    x = awkward_values()
    cast = graph_of({"x": typed("f32", "N")}, lambda b, x: b.cast(x, dtype="f8e4m3fn"))
    agrees(compiled(cast), [x])
    # the two half-way cases that tell the rounding modes apart, stated outright
    got = compiled(cast).run([torch.tensor([17.0, 19.0, -17.0, 464.0])])[0]
    assert got.float().tolist() == [16.0, 20.0, -16.0, 448.0]
    back = graph_of({"x": typed("f8e4m3fn", "N")}, lambda b, x: b.cast(x, dtype="f32"))
    agrees(compiled(back), [CODES])
    wide = graph_of({"x": typed("f32", "N")}, lambda b, x: b.cast(x, dtype="f8e5m2"))
    agrees(compiled(wide), [x])


@pytest.mark.parametrize("block", [(1, 128), (1, 4), (4, 3), (128, 128)])
def test_quantize(block: tuple[int, int], rng: torch.Generator):
    exe = compiled(graph_of({"x": typed("f32", "B", "R", "C")}, lambda b, x: b.quantize(x, block=block)))
    for shape in ((0, 3, 4), (2, 0, 5), (1, 1, 1), (2, 5, 130), (1, 9, 256)):
        x = torch.randn(shape, generator=rng) * torch.logspace(-30, 20, shape[-1])
        agrees(exe, [x])
        x.clamp_(-1e30, 1e30)[..., : shape[-1] // 2] = 0.0
        agrees(exe, [x])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_quantize_keeps_nan_and_infinity_in_their_block(bad: float, rng: torch.Generator):
    exe = compiled(graph_of({"x": typed("f32", "R", 8)}, lambda b, x: b.quantize(x, block=(1, 4))))
    x = torch.randn(3, 8, generator=rng)
    x[1, 2] = bad
    codes, scale = agrees(exe, [x])
    assert codes[1, :4].float().isnan().any()
    assert codes[0].float().isfinite().all()
    assert scale[1, 1].isfinite()


def test_midpoints_within_a_block():
    """amax 448 makes the scale 1, so that midpoints stay midpoints."""
    x = awkward_values()
    x = x[x.abs() <= 448].reshape(-1, 1)
    x = torch.cat([x, torch.full_like(x, 448.0)], 1)
    agrees(compiled(graph_of({"x": typed("f32", "N", 2)}, lambda b, x: b.quantize(x, block=(1, 2)))), [x])


def scaled_linear_graph(n: int, k: int, block: tuple[int, int], group: int, rng: torch.Generator) -> Any:
    w, ws = quantize_blocks(torch.randn(n, k, generator=rng), block)

    def build(b: Any, x: Any) -> Any:
        codes, scale = b.quantize(x, block=(1, group))
        return b.scaled_linear(codes, scale, weight(b, "w", w), weight(b, "ws", ws), block=block, group=group)

    return graph_of({"x": typed("f32", "T", k)}, build)


@pytest.mark.parametrize(("n", "k"), [(256, 128), (130, 200), (5, 100), (1, 1)])
def test_ragged_blocks(n: int, k: int, rng: torch.Generator):
    exe = compiled(scaled_linear_graph(n, k, (128, 128), 128, rng))
    for t in (0, 1, 5):
        agrees(exe, [torch.randn(t, k, generator=rng)])


def optimized_ops(path: Path, out: Path) -> list[str]:
    options = session_options(1)
    options.optimized_model_filepath = str(out)
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [n.op_type for n in onnx.load(out, load_external_data=False).graph.node]


def test_weights_are_stored_in_fp8_and_folded_at_load(tmp_path: Path, rng: torch.Generator):
    graph = scaled_linear_graph(300, 200, (128, 128), 128, rng)
    compiled(graph).save(tmp_path)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    kinds = {i.name: i.data_type for i in model.graph.initializer}
    assert onnx.TensorProto.FLOAT8E4M3FN in kinds.values()
    assert sum(f.stat().st_size for f in tmp_path.glob("model.onnx*")) < 300 * 200 * 1.2
    before = [n.op_type for n in model.graph.node]
    after = optimized_ops(tmp_path / "model.onnx", tmp_path / "optimized.onnx")
    assert "DequantizeLinear" in before
    assert "DequantizeLinear" not in after


def test_stored_dequantize_is_exact(rng: torch.Generator):
    """Of rank 2 and 3, every code, and cast to another dtype."""
    codes = CODES.reshape(2, 16, 8)
    scale = torch.rand(2, 6, 2, generator=rng) * torch.tensor(2.0) ** torch.arange(-20, 4).reshape(2, 6, 2)

    def build(b: Any, x: Any) -> Any:
        y = b.dequantize(weight(b, "c", codes), weight(b, "s", scale), block=(3, 5))
        return y, b.dequantize(weight(b, "c", codes), weight(b, "s", scale), block=(3, 5), dtype="f64"), b.neg(x)

    exe = compiled(graph_of({"x": typed("f32", "T")}, build))
    agrees(exe, [torch.zeros(1)], rtol=0.0)


@pytest.mark.parametrize("group", [8, None])
@pytest.mark.parametrize("form", ["unrolled", "loop"])
@pytest.mark.parametrize(("biases", "limit"), [(0, None), (1, 0.7), (2, 0.7), (2, None)])
def test_scaled_experts(group: int | None, form: str, biases: int, limit: float | None, rng: torch.Generator):
    e, d, f, k = 6, 20, 13, 3
    gu, gus = quantize_blocks(torch.randn(e, 2 * f, d, generator=rng), (8, 8))
    dn, dns = quantize_blocks(torch.randn(e, d, f, generator=rng), (8, 8))
    gate_up_bias, down_bias = torch.randn(e, 2 * f, generator=rng), torch.randn(e, d, generator=rng)

    def build(b: Any, x: Any, w: Any, i: Any) -> Any:
        stored = [weight(b, n, t) for n, t in (("gu", gu), ("gus", gus), ("dn", dn), ("dns", dns))]
        added = [weight(b, n, t) for n, t in (("db", down_bias), ("gb", gate_up_bias))[:biases]]
        added = [*added, None, None][:2][::-1]
        return b.scaled_experts(x, w, i, *stored, *added, block=(8, 8), group=group, limit=limit)

    types = {"x": typed("f32", "T", d), "w": typed("f32", "T", k), "i": typed("i64", "T", k)}
    exe = compiled(graph_of(types, build), experts=form)
    for t in (0, 1, 9):
        idx = torch.randint(0, e, (t, k), generator=rng)
        agrees(exe, [torch.randn(t, d, generator=rng), torch.rand(t, k, generator=rng), idx])


def test_token_result_does_not_depend_on_its_batch(rng: torch.Generator):
    """Scales and codes are per token: the codes of a row are the same alone and among others."""
    exe = compiled(graph_of({"x": typed("f32", "T", 256)}, lambda b, x: b.quantize(x, block=(1, 128))))
    x = torch.randn(7, 256, generator=rng)
    codes, scale = exe.run([x])
    for row in range(7):
        alone = exe.run([x[row : row + 1]])
        assert torch.equal(alone[0].view(torch.uint8)[0], codes.view(torch.uint8)[row])
        assert torch.equal(alone[1][0], scale[row])


def test_symbolic_rows_in_blocks_of_several(rng: torch.Generator):
    r = Dim("R")
    exe = compiled(
        graph_of(
            {"x": typed("f32", "R", 6)},
            lambda b, x: b.dequantize(*b.quantize(x, block=(4, 4)), block=(4, 4)),
        )
    )
    assert exe.graph.outputs[0].shape == (r, 6)
    for n in (0, 1, 4, 9):
        agrees(exe, [torch.randn(n, 6, generator=rng)])


def test_one_scale_serves_weights_of_other_heights_and_blocks(rng: torch.Generator):
    codes = torch.randn(4, 6, generator=rng).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2, generator=rng) + 0.5

    def build(b: Any, x: Any) -> Any:
        s, whole, low = weight(b, "s", scale), weight(b, "w", codes), weight(b, "low", codes[:3])
        found = [(whole, (2, 4)), (low, (2, 4)), (whole, (2, 5)), (whole, (3, 4)), (whole, (2, 4))]
        return tuple(b.dequantize(w, s, block=block) for w, block in found)

    exe = compiled(graph_of({"x": typed("f32", "T")}, build))
    for got, want in zip(exe.run([torch.ones(1)]), run(exe.graph, [torch.ones(1)]), strict=True):
        assert torch.equal(got, want)
