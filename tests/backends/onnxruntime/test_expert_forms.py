"""Which form experts take: by predicted cost, among those that compute the same; and what the report says of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moec
from moec.backends.onnxruntime import expert_cost
from moec.backends.onnxruntime.expert_cost import TOKENS, Cost, Layer, best, cost
from moec.backends.onnxruntime.options import EXPERTS
from moec.ir import ArgumentValueError, CompileError, Graph

from .conftest import agrees, compiled, graph_of, typed, weight

FORMS = EXPERTS[1:]


def experts_graph(
    num: int, k: int, d: int, f: int, *, layers: int = 1, tokens: Any = "T", routed: bool = True
) -> Graph:
    def build(b: Any, x: Any, w: Any = None, i: Any = None) -> Any:
        for layer in range(layers):
            gate_up, down = (
                weight(b, f"{name}{layer}", torch.randn(shape) / shape[-1] ** 0.5)
                for name, shape in (("gate_up", (num, 2 * f, d)), ("down", (num, d, f)))
            )
            routing = b.route(b.slice(x, axis=1, start=0, end=num), k=k) if routed else (w, i)
            x = b.add(x, b.experts(x, *routing, gate_up, down))
        return x

    types = {"x": typed("f32", tokens, d)}
    types |= {} if routed else {"w": typed("f32", tokens, k), "i": typed("i64", tokens, k)}
    return graph_of(types, build)


def chosen(shape: tuple[int, int, int, int], layers: int = 1, but: tuple[str, ...] = (), **more: Any) -> str:
    layer = Layer(*shape, **more)
    return best({f: cost(f, layer, TOKENS, layers, 200 * layers) for f in FORMS if f not in but})


def test_what_is_chosen():
    """As measured (bench/RESULTS.md), and beyond what fits on the machine that measured."""
    assert chosen((64, 8, 1024, 512)) == "unrolled"
    assert chosen((32, 4, 512, 256), layers=4) == "unrolled"
    assert chosen((256, 8, 7168, 2048), layers=3) == "unrolled"
    assert chosen((256, 8, 7168, 2048), layers=61) == "moe"  # 33,000 nodes would take 11 s to load
    assert chosen((256, 8, 64, 32), layers=61) == "moe"
    assert chosen((256, 8, 64, 32), layers=61, but=("moe",)) == "loop"
    assert chosen((2, 2, 64, 64)) == "dense"


def test_loading_is_part_of_the_cost(monkeypatch: pytest.MonkeyPatch):
    shape = (32, 4, 512, 256)
    assert chosen(shape) == "unrolled"
    monkeypatch.setattr(expert_cost, "LOAD", 0.1)
    assert chosen(shape) == "moe"


def test_a_known_number_of_tokens_is_the_only_one_that_counts():
    layer = Layer(32, 4, 512, 256)
    costs = {f: cost(f, layer, (1,), 1) for f in FORMS}
    assert best(costs) == min(costs, key=lambda f: costs[f].seconds[1]) == "moe"
    (entry,) = compiled(experts_graph(8, 2, 16, 16, tokens=3)).stats["experts"]
    assert list(entry["costs"]["unrolled"]["ms"]) == [3]


@given(
    st.sampled_from(FORMS), st.integers(1, 256), st.integers(1, 16), st.integers(1, 4096), st.integers(1, 2048),
    st.integers(1, 1000), st.integers(1, 1000),
)  # fmt: skip
def test_costs_grow(form: str, num: int, k: int, d: int, f: int, tokens: int, more: int):
    layer = Layer(num, min(k, num), d, f)
    assert 0 <= layer.used_twice(tokens) <= layer.used(tokens) + 1e-9 <= num + 1e-6
    assert expert_cost.seconds(form, layer, tokens) <= expert_cost.seconds(form, layer, tokens + more) * (1 + 1e-9)
    assert cost(form, layer, (1,), 1).load < cost(form, layer, (1,), 2).load


def test_of_equal_costs_the_first_is_taken():
    same = Cost({1: 1.0}, 1, 0.0)
    assert best({"unrolled": same, "dense": same}) == "unrolled"


def test_the_report_says_what_was_chosen_and_what_else_there_was():
    entries = compiled(experts_graph(8, 2, 16, 16, layers=2)).stats["experts"]
    assert len(entries) == 2
    entry = entries[0]
    assert entry["experts"] == [8, 2, 16, 16]
    assert not entry["asked"]
    assert set(entry["costs"]) | set(entry["refused"]) == set(FORMS)
    assert entry["form"] == best({f: cost(f, Layer(8, 2, 16, 16), TOKENS, 2, 0) for f in FORMS})
    assert json.loads(json.dumps(entry))["costs"]["moe"]["nodes"] == 9
    (entry,) = compiled(experts_graph(8, 2, 16, 16, routed=False)).stats["experts"]
    assert entry["form"] != "moe"
    assert "behind moe.route" in entry["refused"]["moe"]
    (entry,) = compiled(experts_graph(8, 2, 16, 16), experts="loop").stats["experts"]
    assert entry["form"] == "loop"
    assert entry["asked"]


class Layered(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = torch.nn.Linear(16, 4)
        self.up = torch.nn.Parameter(torch.randn(4, 16, 24) / 4)
        self.down = torch.nn.Parameter(torch.randn(4, 12, 16) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w, i = self.router(x).softmax(-1).topk(2, -1)
        share = torch.zeros(x.shape[0], 4).scatter(1, i, w)
        gate, up = (x @ self.up).chunk(2, -1)
        return ((torch.nn.functional.silu(gate) * up) @ self.down * share.T[..., None]).sum(0)


def test_the_table_of_the_report(tmp_path):
    report = moec.compile(Layered(), (torch.randn(3, 16),), backend="onnxruntime", threads=1).report
    text = str(report)
    assert "1 layer of 4 experts (16 × 12, 2 a token)" in text
    assert text.count(", chosen") == 1
    assert "dense" in text
    report.save(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text("utf-8")
    assert "1 layer of 4 experts" in page
    assert "predicted ms on one core" in page


@pytest.mark.parametrize("form", FORMS)
def test_every_form_at_every_count(form: str):
    """Few tokens, so that most experts have none; no tokens; one expert; each token all experts."""
    for num, k in ((1, 1), (5, 5), (40, 2)):
        exe = compiled(experts_graph(num, k, max(num, 8), 4), experts=form)
        assert exe.stats["forms"] == {f"experts.{form}": 1}
        for tokens in (0, 1, 2, 17):
            agrees(exe, [torch.randn(tokens, max(num, 8))])


@pytest.mark.parametrize("form", ["unrolled", "if", "loop", "dense"])
def test_what_is_not_chosen_does_not_matter(form: str):
    """Weights of an expert that nobody chose may be infinite or NaN."""
    graph = experts_graph(4, 2, 8, 4, routed=False)
    for name in ("gate_up0", "down0"):
        bad = graph.weights[name].weight.load().clone()
        bad[2] = torch.tensor([torch.nan, torch.inf]).repeat(bad[2].numel() // 2).reshape(bad[2].shape)
        graph.bind_weights({name: bad})
    exe = compiled(graph, experts=form)
    ids = torch.tensor([[0, 1], [3, 0], [1, 3]])
    (got,) = agrees(exe, [torch.randn(3, 8), torch.rand(3, 2), ids])
    assert bool(got.isfinite().all())


def test_forms_that_are_not_possible():
    with pytest.raises(ArgumentValueError, match="experts='loop' needs all experts in f32"):
        compiled(experts_graph(4, 2, 8, 4), experts="loop", memory="fp8")
    with pytest.raises(ArgumentValueError, match="one of auto, unrolled, if, moe, loop, dense"):
        compiled(experts_graph(4, 2, 8, 4), experts="best")
    with pytest.raises(CompileError, match=r"experts='moe' is not possible: it takes positive weights"):
        compiled(experts_graph(4, 2, 8, 4, routed=False), experts="moe")
    assert compiled(experts_graph(4, 2, 8, 4), memory="fp8").stats["forms"] == {"experts.if": 1}
