"""Attention: where it is one operator, that it means the same, and what runs where an axis is empty."""

from __future__ import annotations

import pytest
import torch

from moec.backends import get_backend
from moec.backends.onnxruntime.lower import lower
from moec.backends.onnxruntime.options import Options
from moec.ir import parse

LOWEST = torch.finfo(torch.float32).min


def graph(
    mask: str = "",
    attrs: str = "scale=0.5",
    length: str = "S",
    keys: str = "T",
    kv_heads: int = 4,
    around: bool = False,
):
    """q [B, 4, S, 8], k [B, kv, T, 8], v [B, kv, T, 6]; `around`: heads are next to their channels before and after."""
    named = f", %m: {mask}" if mask else ""
    q, k, v = f"[B, 4, {length}, 8]", f"[B, {kv_heads}, {keys}, 8]", f"[B, {kv_heads}, {keys}, 6]"
    call = f"attention.sdpa(%q, %k, %v, {'%m' if mask else '_'}, _) {{{attrs}}}"
    if not around:
        return parse(
            f"""graph(%q: f32{q}, %k: f32{k}, %v: f32{v}{named}) -> (%y: f32[B, 4, {length}, 6]) {{
  %0: f32[B, 4, {length}, 6] = {call}
  return %0
}}"""
        )
    call = call.replace("%q, %k, %v", "%0, %1, %2")
    return parse(
        f"""graph(
  %q: f32[B, {length}, 4, 8], %k: f32[B, {keys}, {kv_heads}, 8], %v: f32[B, {keys}, {kv_heads}, 6]{named})
  -> (%y: f32[B, {length}, 24], %z: f32[B, 4, {length}, 6]) {{
  %0: f32{q} = tensor.transpose(%q) {{perm=[0, 2, 1, 3]}}
  %1: f32{k} = tensor.transpose(%k) {{perm=[0, 2, 1, 3]}}
  %2: f32{v} = tensor.transpose(%v) {{perm=[0, 2, 1, 3]}}
  %3: f32[B, 4, {length}, 6] = {call}
  %4: f32[B, {length}, 4, 6] = tensor.transpose(%3) {{perm=[0, 2, 1, 3]}}
  %5: f32[B, {length}, 24] = tensor.reshape(%4) {{shape=[B, {length}, 24]}}
  return %5, %3
}}"""
    )


def operators(g) -> list[str]:
    return [n.op_type for n in lower(g, Options(), get_backend("onnxruntime")).model.graph.all_nodes()]


def inputs(g, sizes: dict[str, int], mask: torch.Tensor | None = None) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [[s if isinstance(s, int) else s.evaluate(sizes) for s in v.shape] for v in g.inputs]
    given = [torch.randn(shape) for shape in shapes]
    return given if mask is None else [*given[:3], mask.expand(shapes[3]).contiguous()]


def agree(g, given: list[torch.Tensor], executable=None) -> None:
    executable = executable or get_backend("onnxruntime").compile(g, threads=1)
    for got, want in zip(executable.run(given), get_backend("reference").compile(g).run(given), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", ["", ", causal=true"])
@pytest.mark.parametrize("keys", ["S", "T", "P + S"])
def test_without_a_mask(keys, causal, kv_heads, around):
    g = graph(attrs="scale=0.5" + causal, keys=keys, kv_heads=kv_heads, around=around)
    assert "Attention" in operators(g)
    executable = get_backend("onnxruntime").compile(g, threads=1)
    for b, s, other in ((2, 5, 9), (1, 1, 1), (1, 300, 310), (2, 7, 3), (0, 4, 4), (2, 0, 3), (2, 3, 0), (0, 0, 0)):
        sizes = {"B": b, "S": s, "T": other, "P": other}
        agree(g, inputs(g, sizes), executable)


MASKS = {
    "padding": ("bool[B, 1, 1, T]", lambda b, s, t: torch.rand(b, 1, 1, t) < 0.6),
    "per query": ("bool[B, 1, S, T]", lambda b, s, t: torch.rand(b, 1, s, t) < 0.6),
    "per head": ("bool[B, 4, S, T]", lambda b, s, t: torch.rand(b, 4, s, t) < 0.6),
    "rank 2": ("bool[S, T]", lambda b, s, t: torch.rand(s, t) < 0.6),
    "rank 1": ("bool[T]", lambda b, s, t: torch.rand(t) < 0.6),
    "none may": ("bool[B, 1, 1, T]", lambda b, s, t: torch.zeros(b, 1, 1, t, dtype=torch.bool)),
    "added": ("f32[B, 1, S, T]", lambda b, s, t: torch.randn(b, 1, s, t)),
    "added -inf": ("f32[B, 1, 1, T]", lambda b, s, t: torch.where(torch.rand(b, 1, 1, t) < 0.6, 0.5, -torch.inf)),
    "added lowest": ("f32[B, 1, 1, T]", lambda b, s, t: torch.where(torch.rand(b, 1, 1, t) < 0.3, 0.0, LOWEST)),
    "all lowest": ("f32[B, 1, 1, T]", lambda b, s, t: torch.full((b, 1, 1, t), LOWEST)),
}


@pytest.mark.parametrize("causal", ["", ", causal=true"])
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, square, causal):
    typed, make = MASKS[name]
    keys = "S" if square else "T"
    g = graph(typed.replace("T", keys), "scale=0.5" + causal, keys=keys, kv_heads=2)
    assert ("Attention" in operators(g)) == typed.startswith("bool")
    executable = get_backend("onnxruntime").compile(g, threads=1)
    for b, s, t in ((3, 5, 9), (2, 1, 1), (1, 40, 70), (2, 6, 3), (2, 0, 4), (1, 3, 0)):
        t = s if square else t
        torch.manual_seed(1)
        mask = make(b, s, t)
        agree(g, inputs(g, {"B": b, "S": s, "T": t}, mask), executable)


@pytest.mark.parametrize("attrs", ["scale=0.0", "scale=-0.5", "scale=0.5, softcap=2.0"])
def test_what_the_operator_does_otherwise_is_composed(attrs):
    g = graph(attrs=attrs)
    assert "Attention" not in operators(g)
    agree(g, inputs(g, {"B": 2, "S": 3, "T": 5}))


def test_values_inside_are_the_same_for_empty_axes_too():
    g = graph(keys="S")
    executable = get_backend("onnxruntime").compile(g, threads=1)
    (result,) = (node.result for node in g.nodes)
    for s in (0, 3, 0):
        given = inputs(g, {"B": 2, "S": s})
        (tapped,) = executable.tap(given, [result]).values()
        assert torch.equal(tapped, executable.run(given)[0])


def test_a_shifted_mask_is_seen():
    """The comparisons above fail where a mask is another's."""
    g = graph("bool[B, 1, S, T]")
    mask = torch.rand(2, 1, 4, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    given = inputs(g, {"B": 2, "S": 4, "T": 6}, mask)
    (got,) = get_backend("onnxruntime").compile(g).run([*given[:3], mask.roll(1, -1)])
    (want,) = get_backend("reference").compile(g).run(given)
    assert not torch.allclose(got, want, rtol=1e-2, atol=1e-2)
