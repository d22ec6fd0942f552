"""Symbolic sizes: one session runs at every size, 0 and 1 included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moec.ir import CompileError, Dim
from moec.ir.dims import ceil_div

from .conftest import agrees, compiled, graph_of, typed

B, S, P, T = (Dim(n) for n in "BSPT")


def test_wrong_comparison_is_noticed():
    graph = graph_of({"x": typed("f32", "T")}, lambda b, x: b.mul(x, 1.0))
    exe = compiled(graph)
    exe.graph = graph_of({"x": typed("f32", "T")}, lambda b, x: b.mul(x, 1.01))
    with pytest.raises(AssertionError):
        agrees(exe, [torch.ones(4)])


SIZES = [(0, 0), (1, 1), (0, 3), (1, 0), (2, 1), (2, 7), (3, 40)]


@pytest.mark.parametrize(
    "build",
    [
        lambda b, x: b.reshape(x, shape=(B * S, 6)),
        lambda b, x: b.reshape(x, shape=(B, S, 2, 3)),
        lambda b, x: b.reshape(b.transpose(b.reshape(x, shape=(B, S, 2, 3)), perm=(0, 2, 1, 3)), shape=(B, 2 * S, 3)),
        lambda b, x: b.reshape(x, shape=(6 * B, S)),
        lambda b, x: b.reshape(b.reshape(x, shape=(B * S * 6,)), shape=(S, B, 6)),
        lambda b, x: b.expand(b.sum(x, axes=(1,), keepdim=True), shape=(B, S, 6)),
        lambda b, x: b.expand(b.dim(value=B * S + 1), shape=(S, B)),
        lambda b, x: b.concat(x, b.full(shape=(B, 2 * S, 6), value=2.0, dtype="f32"), axis=1),
        lambda b, x: b.slice(x, axis=1, start=S // 2, end=S),
        lambda b, x: b.slice(x, axis=1, start=0, end=S, step=2),
        lambda b, x: b.split(b.concat(x, x, axis=1), axis=1, sizes=(S, S)),
        lambda b, x: b.pad(x, before=(0, S, 0), after=(B, 0, 1)),
        lambda b, x: (b.arange(end=S), b.arange(end=2 * S + B, start=B, step=3, dtype="f32")),
        lambda b, x: b.mean(x, axes=(1,)),
        lambda b, x: b.mean(x, axes=(0, 1)),
        lambda b, x: b.sort(x, axis=1, descending=True),
        lambda b, x: b.norm_rms(x),
        lambda b, x: (b.dim(value=ceil_div(S, 4)), b.dim(value=(B + S) % 3), b.dim(value=(S - 5) // 2)),
    ],
)
def test_ops_with_symbolic_sizes(build: Callable[..., Any], rng: torch.Generator):
    exe = compiled(graph_of({"x": typed("f32", "B", "S", 6)}, build))
    for b, s in SIZES:
        agrees(exe, [torch.randn(b, s, 6, generator=rng)])


def test_sizes_of_expressions_are_solved():
    """No input has S or P itself as an axis."""
    types = {"x": typed("f32", "2*S"), "y": typed("f32", "S + P")}
    exe = compiled(graph_of(types, lambda b, x, y: (b.dim(value=S), b.dim(value=P * P + S))))
    for s, p in ((0, 0), (1, 0), (3, 4)):
        got = agrees(exe, [torch.zeros(2 * s), torch.zeros(s + p)])
        assert [int(v) for v in got] == [s, p * p + s]


def test_size_that_no_input_gives_is_an_error():
    types = {"x": typed("f32", "S*P")}
    with pytest.raises(CompileError, match="cannot be read from the shape"):
        compiled(graph_of(types, lambda b, x: b.dim(value=S)))


@pytest.mark.parametrize("past", [0, 1, 5])
def test_attention_with_a_cache(past: int, rng: torch.Generator):
    """Grouped heads, causal over past + new keys, values of another width."""

    def build(b: Any, q: Any, k: Any, v: Any, pk: Any, pv: Any) -> Any:
        keys, values = b.concat(pk, k, axis=2), b.concat(pv, v, axis=2)
        return b.sdpa(q, keys, values, scale=0.4, causal=True), keys, values

    exe = compiled(
        graph_of(
            {
                "q": typed("f32", "B", 4, "S", 8),
                "k": typed("f32", "B", 2, "S", 8),
                "v": typed("f32", "B", 2, "S", 5),
                "pk": typed("f32", "B", 2, "P", 8),
                "pv": typed("f32", "B", 2, "P", 5),
            },
            build,
        )
    )
    for b, s in ((0, 2), (1, 1), (2, 0), (2, 3)):
        shapes = [(b, 4, s, 8), (b, 2, s, 8), (b, 2, s, 5), (b, 2, past, 8), (b, 2, past, 5)]
        agrees(exe, [torch.randn(shape, generator=rng) for shape in shapes])


@pytest.mark.parametrize("kind", ["bool", "f32"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_masks(kind: str, causal: bool, rng: torch.Generator):
    """Padding masks with rows that see nothing."""
    exe = compiled(
        graph_of(
            {
                "q": typed("f32", "B", 2, "S", 4),
                "k": typed("f32", "B", 1, "T", 4),
                "v": typed("f32", "B", 1, "T", 4),
                "m": typed(kind, "B", 1, 1, "T"),
            },
            lambda b, q, k, v, m: b.sdpa(q, k, v, m, scale=0.5, causal=causal),
        )
    )
    for s, t in ((0, 0), (1, 1), (4, 4), (2, 5), (5, 2), (3, 0)):
        q, k, v = (torch.randn(3, h, n, 4, generator=rng) for h, n in ((2, s), (1, t), (1, t)))
        open_ = torch.rand(3, 1, 1, t, generator=rng) < 0.7
        open_[0] = False
        if t > 2:
            open_[1, ..., 1] = False
        mask = open_ if kind == "bool" else torch.where(open_, 0.5, float("-inf"))
        out = agrees(exe, [q, k, v, mask])[0]
        assert (out[0] == 0).all()


def test_causal_queries_without_keys(rng: torch.Generator):
    """More queries than keys: the first see none and give zeros."""
    types = {"q": typed("f32", "B", 2, "S", 4), "k": typed("f32", "B", 1, "T", 4), "v": typed("f32", "B", 1, "T", 4)}
    exe = compiled(graph_of(types, lambda b, q, k, v: b.sdpa(q, k, v, scale=0.5, causal=True)))
    for s, t in ((5, 2), (3, 0), (1, 1), (2, 6)):
        shapes = [(2, h, n, 4) for h, n in ((2, s), (1, t), (1, t))]
        out = agrees(exe, [torch.randn(shape, generator=rng) for shape in shapes])[0]
        assert (out[:, :, : max(s - t, 0)] == 0).all()


def test_called_functions_are_inlined_with_their_own_sizes(rng: torch.Generator):
    """One function called twice, with different sizes for its symbol."""
    from moec.ir import Builder, Graph

    inner = Graph("half")
    x = inner.add_input("x", typed("f32", "N", 4))
    ib = Builder(inner)
    inner.add_output(ib.reshape(ib.mul(x, 2.0), shape=(Dim("N") * 2, 2)))
    g = Graph("outer")
    g.functions["half"] = inner
    a, c = g.add_input("a", typed("f32", "B", 4)), g.add_input("c", typed("f32", "B*S", 4))
    g.add_input("s", typed("f32", "S"))
    b = Builder(g)
    first = b.op("call.graph", [a], {"callee": "half", "dims": (("N", B),)})
    second = b.op("call.graph", [c], {"callee": "half", "dims": (("N", B * S),)})
    g.add_output(first)
    g.add_output(second)
    g.verify()
    exe = compiled(g)
    for nb, ns in ((0, 0), (1, 1), (2, 3)):
        agrees(exe, [torch.randn(nb, 4), torch.randn(nb * ns, 4), torch.zeros(ns)])
