"""Routing rules, ties and NaN; the forms of grouped experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moec.ir import ArgumentValueError, CompileError, Weight

from .conftest import agrees, compiled, graph_of, typed, weight

GROUPS = {"n_group": 4, "topk_group": 2}


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "topk_softmax"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "attrs",
    [
        {"k": 1, "normalize": False},
        {"k": 16},
        {"k": 4, "normalize_eps": 1e-20, "scale": 2.5},
        {"k": 3, **GROUPS},
        {"k": 5, **GROUPS, "group_score": "max", "masked_score": 0.0},
    ],
)
def test_route(scoring: str, biased: bool, attrs: dict[str, Any], rng: torch.Generator):
    bias = torch.randn(16, generator=rng)
    graph = graph_of(
        {"x": typed("f32", "T", 16)},
        lambda b, x: b.route(x, weight(b, "bias", bias) if biased else None, scoring=scoring, **attrs),
    )
    exe = compiled(graph)
    for t in (0, 1, 33):
        agrees(exe, [torch.randn(t, 16, generator=rng)])


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_small_scores_keep_their_proportions(dtype: str):
    """ONNX Runtime's Sigmoid ends at 2⁻²⁶ in f32 and at 0 in f64."""
    exe = compiled(graph_of({"x": typed(dtype, "T", 4)}, lambda b, x: b.route(x, scoring="sigmoid", k=2)))
    x = torch.tensor([[-20.0, -25.0, -40.0, -50.0], [-60.0, -61.0, -70.0, -80.0]]).to(typed(dtype).dtype.torch)
    weights, _ = agrees(exe, [x])
    torch.testing.assert_close(
        weights[:, 0], torch.tensor([1 / (1 + 2.718281828**-5), 1 / (1 + 2.718281828**-1)]).to(x.dtype)
    )


@pytest.mark.parametrize("attrs", [{"k": 5}, {"k": 3, **GROUPS}, {"k": 3, **GROUPS, "group_score": "max"}])
def test_ties_go_to_the_lower_index(attrs: dict[str, Any], rng: torch.Generator):
    exe = compiled(graph_of({"x": typed("f32", "T", 16)}, lambda b, x: b.route(x, scoring="sigmoid", **attrs)))
    x = torch.randint(-1, 2, (200, 16), generator=rng).float()
    _, chosen = agrees(exe, [x])
    assert agrees(exe, [torch.zeros(1, 16)])[1][0].tolist() == list(range(attrs["k"]))
    assert chosen.shape == (200, attrs["k"])


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "topk_softmax"])
def test_nan_logits_rank_first(scoring: str, rng: torch.Generator):
    exe = compiled(graph_of({"x": typed("f32", "T", 8)}, lambda b, x: b.route(x, k=3, scoring=scoring)))
    x = torch.randn(4, 8, generator=rng)
    x[1, 5] = x[1, 2] = x[2, 7] = torch.nan
    agrees(exe, [x])


def test_many_tied_experts_as_in_large_models(rng: torch.Generator):
    """ONNX Runtime's TopK takes different algorithms for different sizes."""
    exe = compiled(graph_of({"x": typed("f32", "T", 256)}, lambda b, x: b.topk(x, k=8)))
    agrees(exe, [torch.randint(0, 4, (64, 256), generator=rng).float()])
    exe = compiled(graph_of({"x": typed("i64", "N")}, lambda b, x: b.sort(x, axis=0)))
    for n in (0, 1, 3000):
        agrees(exe, [torch.randint(0, 7, (n,), generator=rng)])


E, D, F, K = 6, 10, 7, 2


def experts_graph(
    rng: torch.Generator, *, routed: bool = True, biases: bool = False, dtype: str = "f32", **attrs: Any
) -> Any:
    def stored(b: Any, name: str, *shape: int) -> Any:
        return weight(b, name, torch.randn(*shape, generator=rng).to(weight_dtype))

    weight_dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f64": torch.float64}[dtype]

    def build(b: Any, x: Any, *routing: Any) -> Any:
        w, i = b.route(routing[0], k=K, scoring="sigmoid", scale=2.5) if routed else routing
        extra = [stored(b, "gb", E, 2 * F), stored(b, "db", E, D)] if biases else []
        return b.experts(x, w, i, stored(b, "gu", E, 2 * F, D), stored(b, "dn", E, D, F), *extra, **attrs)

    types = {"x": typed(dtype, "T", D)}
    types |= {"l": typed(dtype, "T", E)} if routed else {"w": typed(dtype, "T", K), "i": typed("i64", "T", K)}
    return graph_of(types, build)


SWIGLU: list[dict[str, Any]] = [
    {},
    {"interleaved": True},
    {"biases": True},
    {"interleaved": True, "biases": True, "limit": 0.7, "alpha": 1.3},
    {"limit": 7.0},
]
OTHERS: list[dict[str, Any]] = [
    {"activation": "gelu"},
    {"activation": "gelu_tanh", "interleaved": True},
    {"activation": "relu", "biases": True},
]


@pytest.mark.parametrize(
    ("form", "attrs"),
    [(form, a) for form in ("unrolled", "if", "loop", "dense") for a in SWIGLU + OTHERS] + [("moe", a) for a in SWIGLU],
    ids=str,
)
def test_forms_agree(form: str, attrs: dict[str, Any], rng: torch.Generator):
    exe = compiled(experts_graph(rng, **attrs), experts=form)
    assert exe.stats["forms"] == {f"experts.{form}": 1}
    for t in (0, 1, 2, 31):
        agrees(exe, [torch.randn(t, D, generator=rng), torch.randn(t, E, generator=rng)])


@pytest.mark.parametrize("form", ["unrolled", "if", "loop", "dense"])
def test_all_tokens_to_one_expert_or_twice_to_the_same(form: str, rng: torch.Generator):
    exe = compiled(experts_graph(rng, routed=False), experts=form)
    x, w = torch.randn(9, D, generator=rng), torch.randn(9, K, generator=rng)
    for idx in (torch.full((9, K), E - 1), torch.zeros(9, K, dtype=torch.int64), torch.arange(18).reshape(9, K) % E):
        agrees(exe, [x, w, idx])


@pytest.mark.parametrize("bad", [-1, E, 2**40])
def test_expert_out_of_range_names_op_and_module(bad: int, rng: torch.Generator):
    exe = compiled(experts_graph(rng, routed=False))
    idx = torch.zeros(3, K, dtype=torch.int64)
    idx[1, 1] = bad
    with pytest.raises(CompileError, match=r"moe\.experts failed while running") as caught:
        exe.run([torch.zeros(3, D), torch.zeros(3, K), idx])
    assert caught.value.code == "onnxruntime"


@pytest.mark.parametrize("memory", ["fast", "fp8"])
@pytest.mark.parametrize(("dtype", "rtol"), [("bf16", 0.05), ("f64", 1e-13)])
def test_experts_in_other_dtypes(dtype: str, rtol: float, memory: str, rng: torch.Generator):
    exe = compiled(experts_graph(rng, routed=False, dtype=dtype), memory=memory)
    x, w = torch.randn(5, D, generator=rng), torch.randn(5, K, generator=rng)
    like = {"bf16": torch.bfloat16, "f64": torch.float64}[dtype]
    agrees(exe, [x.to(like), w.to(like), torch.randint(0, E, (5, K), generator=rng)], rtol=rtol)


def test_moe_operator_is_refused_where_it_computes_something_else(rng: torch.Generator):
    with pytest.raises(CompileError, match="its activation is silu, not gelu"):
        compiled(experts_graph(rng, activation="gelu"), experts="moe")
    with pytest.raises(CompileError, match=r"known only behind moe\.route"):
        compiled(experts_graph(rng, routed=False), experts="moe")
    with pytest.raises(ArgumentValueError, match="not a standard operator"):
        compiled(experts_graph(rng), experts="moe", portable=True)


def test_weights_are_read_once_each_and_only_at_lowering(rng: torch.Generator):
    reads: list[str] = []

    class Source:
        def __init__(self, name: str, tensor: torch.Tensor):
            self.name, self.tensor = name, tensor

        def load(self) -> torch.Tensor:
            reads.append(self.name)
            return self.tensor

    graph = experts_graph(rng)
    for name, v in graph.weights.items():
        v.weight = Weight(name, v.type, Source(name, v.weight.load()))
    graph.verify()
    assert not reads
    exe = compiled(graph)
    assert sorted(reads) == ["dn", "gu"]
    exe.run([torch.zeros(2, D), torch.zeros(2, E)])
    assert len(reads) == 2


def test_remap_then_experts(rng: torch.Generator):
    """Replicated experts compute what one copy does."""
    gu, dn = torch.randn(E, 2 * F, D, generator=rng), torch.randn(E, D, F, generator=rng)
    physical = torch.tensor([0, 1, 2, 3, 4, 5, 1, 3])
    table = torch.tensor([[0, 0], [1, 6], [2, 2], [3, 7], [4, 4], [5, 5]])
    count = torch.tensor([1, 2, 1, 2, 1, 1])

    def build(b: Any, x: Any, logits: Any) -> Any:
        w, i = b.route(logits, k=K)
        slots = b.remap(i, weight(b, "table", table), weight(b, "count", count))
        once = b.experts(x, w, i, weight(b, "gu", gu), weight(b, "dn", dn))
        return once, b.experts(x, w, slots, weight(b, "gu2", gu[physical]), weight(b, "dn2", dn[physical]))

    exe = compiled(graph_of({"x": typed("f32", "T", D), "l": typed("f32", "T", E)}, build))
    for t in (0, 1, 20):
        once, replicated = agrees(exe, [torch.randn(t, D, generator=rng), torch.randn(t, E, generator=rng)])
        torch.testing.assert_close(once, replicated)


@pytest.mark.parametrize("form", ["unrolled", "if", "loop", "dense"])
def test_one_bias_for_both_products(form: str, rng: torch.Generator):
    """Interleaved, so that it is reordered for the first and left for the second."""
    f, d, e = 3, 6, 4
    gate_up, down = torch.randn(e, 2 * f, d, generator=rng), torch.randn(e, d, f, generator=rng)
    bias = torch.randn(e, d, generator=rng)

    def build(b: Any, x: Any, w: Any, i: Any) -> Any:
        shared = weight(b, "bias", bias)
        given = [x, w, i, weight(b, "gate_up", gate_up), weight(b, "down", down), shared, shared]
        return b.op("moe.experts", given, {"interleaved": True})

    types = {"x": typed("f32", "T", d), "w": typed("f32", "T", 2), "i": typed("i64", "T", 2)}
    exe = compiled(graph_of(types, build), experts=form)
    ids = torch.tensor([[0, 1], [2, 3], [3, 0]])
    agrees(exe, [torch.randn(3, d, generator=rng), torch.rand(3, 2, generator=rng), ids])
