"""Latent attention: both of its spaces mean the same, and the one that takes fewer operations is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moec.ir import DType, Graph, run
from moec.ir.ops.block_codes import quantize_blocks

from .conftest import agrees, compiled, graph_of, typed, weight

H, DN, DR, R, DV = 3, 8, 4, 16, 6
# R (Dn + Dv) = 224 against 2 R − Dn − Dv = 18 for each key: fewer than 224 T / (224 + 18 T) queries pay


def latent_graph(
    s: Any = "S", t: Any = "T", *, dtype: str = "f32", mask: str | None = None, stored: str | None = "plain",
    causal: bool = True, dims: tuple[int, ...] = (DN, DR, R, DV),
) -> Graph:  # fmt: skip
    dn, dr, r, dv = dims
    wide = DType.of(dtype).torch

    def build(b: Any, q: Any, qr: Any, c: Any, k: Any, *more: Any) -> Any:
        rows = torch.randn(H * (dn + dv), r, generator=torch.Generator().manual_seed(1)) / 4
        if stored == "plain":
            w = weight(b, "kv_b.weight", rows.to(wide))
        elif stored is None:
            w, *more = more
        else:
            codes, scale = quantize_blocks(rows, (1, 16), DType.of(stored))
            w = b.dequantize(weight(b, "codes", codes), weight(b, "scale", scale), block=(1, 16))
        return b.op("attention.latent", [q, qr, c, k, w, *more], {"scale": 0.3, "causal": causal})

    types = {"q": typed(dtype, "B", s, H, dn), "qr": typed(dtype, "B", s, H, dr)}
    types |= {"c": typed(dtype, "B", 1, t, r), "k": typed(dtype, "B", 1, t, dr)}
    types |= {"w": typed(dtype, H * (dn + dv), r)} if stored is None else {}
    types |= {} if mask is None else {"mask": typed("bool", *mask.split())}
    return graph_of(types, build)


def inputs(graph: Graph, b: int, s: int, t: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(b + 7 * s + 31 * t)
    found = []
    for v in graph.inputs:
        shape = [n if isinstance(n, int) else n.evaluate({"B": b, "S": s, "T": t}) for n in v.shape]
        x = torch.randn(shape, generator=rng)
        found.append(x > 0 if v.dtype is DType.BOOL else x.to(v.dtype.torch))
    return found


SIZES = [(1, 1, 1), (2, 1, 9), (3, 4, 40), (1, 11, 30), (2, 12, 12), (2, 30, 31), (1, 70, 90), (0, 1, 5), (2, 0, 5)]


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("mask", [None, "B 1 S T", "1 1 1 T", "B 1 1 T"])
def test_any_lengths(mask: str | None, portable: bool):
    exe = compiled(latent_graph(mask=mask), portable=portable)
    for sizes in SIZES:
        agrees(exe, inputs(exe.graph, *sizes))


@pytest.mark.parametrize("dims", [(8, 4, 2, 6), (8, 4, 7, 6), (1, 1, 32, 1), (5, 4, 16, 1)])
def test_any_widths(dims: tuple[int, ...]):
    """Latents that are smaller than a head, too: then it never pays to leave their space."""
    exe = compiled(latent_graph(dims=dims))
    for sizes in SIZES:
        agrees(exe, inputs(exe.graph, *sizes))


@pytest.mark.parametrize(("dtype", "rtol"), [("bf16", 0.05), ("f64", 1e-12)])
def test_other_dtypes(dtype: str, rtol: float):
    exe = compiled(latent_graph(dtype=dtype, mask="B 1 S T"))
    for sizes in SIZES:
        agrees(exe, inputs(exe.graph, *sizes), rtol)


def test_rows_that_may_attend_to_nothing_are_zeros():
    exe = compiled(latent_graph(mask="B 1 S T", causal=False))
    for s, t in ((2, 20), (30, 20)):
        given = inputs(exe.graph, 2, s, t)
        given[4][1, :, 1] = False
        (y,) = agrees(exe, given)
        assert not y[1, 1].any()
        assert bool(y[0].any())
    exe = compiled(latent_graph(causal=True))
    (y,) = agrees(exe, inputs(exe.graph, 1, 5, 3))  # the first queries see no key
    assert not y[0, :2].any()


@pytest.mark.parametrize("stored", ["i8", "i4", "f8e4m3fn", None])
def test_weights_that_are_stored_otherwise_or_computed(stored: str | None):
    exe = compiled(latent_graph(stored=stored))
    for sizes in SIZES[:7]:
        given = inputs(exe.graph, *sizes)
        if stored in ("i8", "i4") and sizes[1] * (224 + 18 * sizes[2]) >= 224 * sizes[2]:
            got, want = exe.run(given)[0], run(exe.graph, given)[0]  # products with integers round their rows
            assert float((got - want).norm() / want.norm()) < 0.03
        else:
            agrees(exe, given, 1e-4)


def kinds(exe: Any, tmp_path: Any) -> list[str]:
    import onnx

    exe.save(tmp_path)
    return [n.op_type for n in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node]


@pytest.mark.parametrize(
    ("s", "t", "spaces"),
    [(1, 2, "latents"), (8, 29, "latents"), (9, 29, "keys"), (20, 20, "keys"), ("S", 20, "either"), (1, "T", "either")],
)
def test_the_space_is_chosen_by_the_number_of_operations(s: Any, t: Any, spaces: str, tmp_path: Any):
    """8 · (224 + 18 · 29) < 224 · 29 ≤ 9 · (224 + 18 · 29)."""
    found = kinds(compiled(latent_graph(s, t)), tmp_path)
    assert ("If" in found) == (spaces == "either")
    assert ("FusedMatMul" in found) == (spaces == "latents")


def test_layers_share_the_choice_and_the_masks(tmp_path: Any):
    """Two layers compute the condition, and where to attend, once."""

    def build(b: Any, q: Any, qr: Any, c: Any, k: Any, mask: Any) -> Any:
        for i in range(2):
            w = weight(b, f"w{i}", torch.randn(H * (DN + DN), R) / 4)
            q = b.op("attention.latent", [q, qr, c, k, w, mask], {"scale": 0.3, "causal": True})
        return q

    types = {"q": typed("f32", "B", "S", H, DN), "qr": typed("f32", "B", "S", H, DR), "c": typed("f32", "B", 1, "T", R)}
    types |= {"k": typed("f32", "B", 1, "T", DR), "mask": typed("bool", "B", 1, "S", "T")}
    exe = compiled(graph_of(types, build))
    for sizes in SIZES:
        agrees(exe, inputs(exe.graph, *sizes), 1e-4)
    found = kinds(exe, tmp_path)
    assert found.count("Less") == 1
    assert found.count("If") == 2
    assert found.count("And") == 1
