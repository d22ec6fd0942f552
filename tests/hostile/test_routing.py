"""Hostile routing: no tokens, every tie, NaN and infinite logits, all groups masked, sums of zero, ids out of range.

What a router has to choose is computed here in plain Python over float32 numbers, so that the reference is judged too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moec
from moec.ir import CompileError, Dim, DType, TensorType, parse, run
from moec.ir.fp8 import E4M3FN, quantize_exactly
from moec.ir.ops.block_codes import quantize_blocks
from moec.passes.pipeline import run_pass
from moec.passes.spec import parse_passes
from moec.text_cases import read_cases

from .limits import limited
from .setups import SETUPS, compiled, graph_of, no_worker_left, same, weight

INF, NAN = math.inf, math.nan
every_setup = pytest.mark.parametrize("setup", SETUPS)


def logits_of(e: int) -> dict[str, torch.Tensor]:
    """Rows of E logits by what is wrong with them."""
    r = torch.Generator().manual_seed(e)
    random = torch.randn(9, e, generator=r)
    number = torch.arange(e)
    rows = {
        "random": random[0],
        "all zero": torch.zeros(e),
        "zeros of both signs": torch.where(number % 2 == 0, 0.0, -0.0),
        "ties": torch.randint(-1, 2, (e,), generator=r).float(),
        "all NaN": torch.full((e,), NAN),
        "all inf": torch.full((e,), INF),
        "all -inf": torch.full((e,), -INF),
        "subnormal": random[1] * 1e-40,
        "huge": random[2] * 1e38,
        "scores underflow": -200.0 - number * 0.5,
        "one dominates": torch.where(number == e - 1, 300.0, -300.0),
    }
    for name, value in (("NaN", NAN), ("inf", INF), ("-inf", -INF)):
        rows[f"one {name}"] = random[3].clone().index_fill_(0, torch.tensor([e // 2]), value)
        rows[f"every other {name}"] = random[4].clone().index_fill_(0, number[::2], value)
    for name, first, last in (("inf … NaN", INF, NAN), ("NaN … inf", NAN, INF), ("inf … -inf", INF, -INF)):
        rows[name] = random[5].clone()
        rows[name][0], rows[name][-1] = first, last
    return rows


def chosen(keys: list[float], k: int) -> list[int]:
    """The k greatest: NaN first, then by value, equal ones by number."""
    order = sorted(range(len(keys)), key=lambda i: (0, 0.0, i) if math.isnan(keys[i]) else (1, -keys[i], i))
    return order[:k]


def route_plainly(row: torch.Tensor, bias: torch.Tensor | None, a: dict[str, Any]) -> tuple[list[float], list[int]]:
    """The definition of moe.route for one token, with the roundings of float32."""
    x, f = row.numpy(), np.float32
    with np.errstate(all="ignore"):
        peak = np.max(x)
        scores = {
            "softmax": lambda: np.exp(x - peak) / np.sum(np.exp(x - peak)),
            "sigmoid": lambda: f(1) / (f(1) + np.exp(-x)),
            "sqrt_softplus": lambda: np.sqrt(np.maximum(x, f(0)) + np.log1p(np.exp(-np.abs(x)))),
        }.get(a["scoring"], lambda: x)()
        choice = (scores if bias is None else scores + bias.numpy()).tolist()
        groups = a.get("n_group", 1)
        if groups > 1:
            size = len(choice) // groups
            members = [choice[g * size : (g + 1) * size] for g in range(groups)]
            count = 1 if a["group_score"] == "max" else 2
            sums = [float(np.sum([f(m[i]) for i in chosen(m, count)], dtype=f)) for m in members]
            kept = chosen(sums, a["topk_group"])
            masked = a.get("masked_score", -INF)
            choice = [c if i // size in kept else masked for i, c in enumerate(choice)]
        experts = chosen(choice, a["k"])
        weights = scores[experts].astype(np.float64)
        if a["scoring"] == "topk_softmax":
            weights = np.exp(weights - np.max(weights))
            return (weights / np.sum(weights) * a.get("scale", 1.0)).tolist(), experts
        if a["scoring"] == "topk_sigmoid":
            weights = (f(1) / (f(1) + np.exp(-scores[experts]))).astype(np.float64)
        if a.get("normalize", True):
            weights = weights / max(np.sum(weights) + a.get("normalize_eps", 0.0), a.get("normalize_min", 0.0))
        return (weights * a.get("scale", 1.0)).tolist(), experts


def configurations() -> Iterator[tuple[int, dict[str, Any]]]:
    for scoring in ("softmax", "sigmoid", "sqrt_softplus", "topk_softmax", "topk_sigmoid"):
        yield 1, {"k": 1, "scoring": scoring}
        for k in (1, 3, 8):
            yield 8, {"k": k, "scoring": scoring}
        yield 512, {"k": 8, "scoring": scoring, "normalize_eps": 1e-20, "scale": 2.5}
    yield 8, {"k": 3, "scoring": "sigmoid", "normalize": False}
    yield 8, {"k": 3, "scoring": "sigmoid", "normalize_min": 0.5}
    for scoring in ("softmax", "sigmoid", "topk_softmax"):
        for group_score in ("max", "top2_sum"):
            groups = {"scoring": scoring, "n_group": 4, "topk_group": 2, "group_score": group_score}
            yield 16, {"k": 3, **groups}
            yield 16, {"k": 8, "masked_score": 0.0, "normalize_eps": 1e-20, **groups}


BIASES = {
    "no bias": None,
    "ties": [0.0, 1.0],
    "-inf masks experts": [-INF, 0.5, 0.25],
    "all -inf": [-INF],
    "inf forces experts": [0.0, 0.0, 0.0, INF],
    "inf and NaN": [0.25, INF, NAN, -INF, 0.0],
}


@every_setup
@limited(seconds=60)
def test_routes(setup):
    """Every configuration on every hostile row; those with k = 3 under every bias."""
    with no_worker_left():
        for e, attrs in configurations():
            rows = logits_of(e)
            x = torch.stack(list(rows.values()))
            for name, values in BIASES.items():
                if values is not None and attrs["k"] != 3:
                    continue
                bias = None if values is None else torch.tensor((values * e)[:e])
                graph = graph_of(
                    {"x": TensorType(DType.F32, (Dim("T"), e))},
                    lambda b, x, bias=bias, attrs=attrs: b.route(
                        x, None if bias is None else weight(b, "bias", bias), **attrs
                    ),
                )
                exe = compiled(setup, graph)
                weights, experts = exe.run([x])
                want = [route_plainly(row, bias, attrs) for row in x]
                for i, row in enumerate(rows):
                    what = f"{row}, {name}, {e} experts, {attrs}"
                    same(experts[i], torch.tensor(want[i][1]), 0.0, what)
                    same(weights[i : i + 1], torch.tensor([want[i][0]]), 2e-5, what)
                for tokens in (0, 1) if bias is None else ():
                    same(exe.run([x[:tokens]])[1], experts[:tokens], 0.0, f"{tokens} tokens")


@every_setup
@limited()
def test_routes_in_narrow_floats(setup):
    """Chosen by scores rounded to the dtype, on ONNX Runtime by scores in float32 (it carries narrow floats so)."""
    with no_worker_left():
        for dtype in ("bf16", "f16"):
            for attrs in (
                {"k": 3, "scoring": "softmax"},
                {"k": 3, "scoring": "sigmoid", "normalize_eps": 1e-3},
                {"k": 8, "scoring": "topk_softmax"},
                {"k": 4, "scoring": "sigmoid", "n_group": 4, "topk_group": 2, "group_score": "max", "normalize": False},
            ):
                narrow_routes(setup, dtype, attrs)


def narrow_routes(setup: str, dtype: str, attrs: dict[str, Any]) -> None:
    rows = logits_of(16)
    x = torch.stack(list(rows.values())).to(DType.of(dtype).torch)
    graph = graph_of({"x": TensorType(DType.of(dtype), (Dim("T"), 16))}, lambda b, x: b.route(x, **attrs))
    weights, experts = compiled(setup, graph).run([x])
    assert weights.dtype == x.dtype
    scores = {"softmax": lambda: x.softmax(-1), "sigmoid": lambda: x.sigmoid()}.get(attrs["scoring"], lambda: x)()
    for i, row in enumerate(rows):
        what = f"{row}, {dtype}, {attrs}"
        if SETUPS[setup][0] == "onnxruntime":
            same(experts[i], torch.tensor(route_plainly(x[i].float(), None, attrs)[1]), 0.0, what)
        elif "n_group" not in attrs:
            same(experts[i], torch.tensor(chosen(scores[i].float().tolist(), attrs["k"])), 0.0, what)
        assert len(set(experts[i].tolist())) == attrs["k"], what
        want = scores[i].double()[experts[i]]
        if attrs["scoring"] == "topk_softmax":
            want = want.softmax(-1)
        elif attrs.get("normalize", True):
            want = want / (want.sum() + attrs.get("normalize_eps", 0.0))
        same(weights[i : i + 1], want[None], 2e-2 if dtype == "bf16" else 2e-3, what)


# E, d, f, k
SIZES = [(1, 8, 4, 1), (5, 20, 12, 2), (4, 8, 8, 4), (512, 8, 4, 3)]
# per setup the forms of the lowering
_FORMS = {"onnxruntime": ("unrolled", "if", "loop", "dense"), "portable": ("unrolled", "loop")}
FORMS = [(s, f) for s in SETUPS for f in _FORMS.get(s, ("",))]
KINDS = ("plain", "w8a8", "weight-only")


def experts_graph(kind: str, e: int, d: int, f: int, k: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """(graph over x, weights and ids; the weights that it computes with, in float64)."""
    r = torch.Generator().manual_seed(3)
    gate_up, down = torch.randn(e, 2 * f, d, generator=r), torch.randn(e, d, f, generator=r)
    block = (4, 8)
    types = {
        "x": TensorType(DType.F32, (Dim("T"), d)),
        "w": TensorType(DType.F32, (Dim("T"), k)),
        "i": TensorType(DType.I64, (Dim("T"), k)),
    }
    if kind == "plain":
        graph = graph_of(types, lambda b, *v: b.experts(*v, weight(b, "gu", gate_up), weight(b, "dn", down)))
        return graph, gate_up.double(), down.double()
    gu, dn = quantize_blocks(gate_up, block), quantize_blocks(down, block)
    group = 8 if kind == "w8a8" else None

    def build(b: Any, *v: Any) -> Any:
        stored = [weight(b, f"w{i}", t) for i, t in enumerate((*gu, *dn))]
        return b.scaled_experts(*v, *stored, block=block, group=group)

    graph = graph_of(types, build)
    wide = [
        c.double() * s.double().repeat_interleave(4, 1).repeat_interleave(8, 2)[:, : c.shape[1], : c.shape[2]]
        for c, s in (gu, dn)
    ]
    return graph, wide[0], wide[1]


def experts_plainly(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, group: Any
) -> torch.Tensor:
    """Token by token in float64; rows going into a product are rounded to FP8 per group."""

    def rounded(row: torch.Tensor) -> torch.Tensor:
        if group is None:
            return row
        codes, scales = quantize_exactly(row[None].float(), (1, group))
        return (E4M3FN.decode(codes) * scales.double().repeat_interleave(group, 1)[:, : len(row)])[0]

    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, row in enumerate(x.double()):
        for j, e in enumerate(ids[t].tolist()):
            gate, up = (gate_up[e] @ rounded(row)).chunk(2)
            out[t] += weights[t, j].double() * (down[e] @ rounded(gate / (1 + (-gate).exp()) * up))
    return out


def routings(e: int, d: int, k: int) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """(what, [x, weights, ids]) of finite numbers."""
    r = torch.Generator().manual_seed(2)

    def inputs(tokens: int, ids: torch.Tensor) -> list[torch.Tensor]:
        return [torch.randn(tokens, d, generator=r), torch.rand(tokens, k, generator=r), ids]

    def distinct(tokens: int) -> torch.Tensor:
        rows = [torch.randperm(e, generator=r)[:k] for _ in range(tokens)]
        return torch.stack(rows) if rows else torch.zeros(0, k, dtype=torch.int64)

    for tokens in (0, 1, 6):
        yield f"{tokens} tokens", inputs(tokens, distinct(tokens))
    yield "all to the last expert", inputs(9, torch.full((9, k), e - 1))
    yield "all to the first", inputs(9, torch.zeros(9, k, dtype=torch.int64))
    x, _, ids = inputs(6, distinct(6))
    w = torch.tensor([0.0, -0.0, 1e-42, -0.75, 3e30, 1.0])[:, None].expand(6, k).contiguous()
    yield "weights zero, subnormal, negative, huge", [x, w, ids]
    yield "zero and subnormal rows", [x * torch.tensor([0.0, 1e-42, 1e-20, 1.0, -0.0, 1e4])[:, None], w.abs(), ids]


@pytest.mark.parametrize(("setup", "form"), FORMS)
@limited(seconds=60)
def test_experts(setup, form):
    """Any routing, E from 1 to 512, k from 1 to E, plain and quantised."""
    with no_worker_left():
        for kind in KINDS:
            for e, d, f, k in SIZES:
                graph, gate_up, down = experts_graph(kind, e, d, f, k)
                exe = compiled(setup, graph, **({"experts": form} if form else {}))
                for what, inputs in routings(e, d, k):
                    want = experts_plainly(*inputs, gate_up, down, 8 if kind == "w8a8" else None)
                    # a hidden number on a midpoint between two codes may go to either: a sixteenth of one product
                    rtol = 1e-3 if kind == "w8a8" else 2e-5
                    same(exe.run(inputs)[0], want, rtol, f"{what}, {kind}, {e} experts")


@pytest.mark.parametrize(("setup", "form"), FORMS)
@limited(seconds=60)
def test_a_hostile_token_keeps_to_itself(setup, form):
    """NaN, infinities and overflow in one token's row or weight: no other token's result changes by a bit."""
    with no_worker_left():
        for kind in KINDS:
            e, d, f, k = SIZES[1]
            graph, _, _ = experts_graph(kind, e, d, f, k)
            exe = compiled(setup, graph, **({"experts": form} if form else {}))
            (clean,) = (inputs for what, inputs in routings(e, d, k) if what == "6 tokens")
            (want,) = exe.run(clean)
            for at, value in ((0, NAN), (0, INF), (0, -INF), (0, 3e38), (1, NAN), (1, INF)):
                inputs = [t.clone() for t in clean]
                inputs[at][2, 1] = value
                (got,) = exe.run(inputs)
                others = [0, 1, 3, 4, 5]
                assert torch.equal(got[others], want[others]), (kind, at, value)
                assert not got[2].isfinite().all(), (kind, at, value)
                same(got[2:3].isnan(), run(graph, inputs)[0][2:3].isnan(), 0.0, f"{kind}, {at}, {value}")


@pytest.mark.parametrize(("setup", "form"), FORMS)
@limited(seconds=60)
def test_ids_out_of_range_are_an_error(setup, form):
    with no_worker_left():
        for kind in KINDS:
            for e, d, f, k in SIZES[:2]:
                graph, _, _ = experts_graph(kind, e, d, f, k)
                exe = compiled(setup, graph, **({"experts": form} if form else {}))
                x, w, ids = torch.ones(3, d), torch.ones(3, k), torch.zeros(3, k, dtype=torch.int64)
                (good,) = exe.run([x, w, ids])
                for bad in (-1, e, 2**31, 2**40, -(2**63)):
                    wrong = ids.clone()
                    wrong[1, 0] = bad
                    with pytest.raises(CompileError, match="experts failed") as caught:
                        exe.run([x, w, wrong])
                    said = str(caught.value)
                    assert f"there are {e} experts" in said or f"expert ids must be in 0 … {e - 1}" in said, said
                assert torch.equal(exe.run([x, w, ids])[0], good)


REFUSED = {
    "k=0": ("{k=0}", "k=0 of 4 experts"),
    "k>E": ("{k=5}", "k=5 of 4 experts"),
    "groups do not divide": ("{k=1, n_group=3}", "4 experts in 3 groups"),
    "more groups than there are": ("{k=1, n_group=2, topk_group=3}", "topk_group=3 of 2 groups"),
    "k beyond the open groups": ("{k=3, n_group=2, topk_group=1}", "k=3 of 2 candidates"),
    "two best of one": ("{k=1, n_group=4, topk_group=1}", "top2_sum needs two experts per group"),
    "no groups": ("{k=1, n_group=0}", "4 experts in 0 groups"),
    "unknown scoring": ('{k=1, scoring="relu"}', "scoring 'relu' is none of"),
    "unknown group score": ('{k=1, n_group=2, group_score="mean"}', "group_score 'mean'"),
    "k is no integer": ("{k=1.5}", "'k' must be int"),
}


@pytest.mark.parametrize("case", REFUSED)
@limited()
def test_impossible_routers_are_refused(case):
    attrs, said = REFUSED[case]
    text = (
        "graph(%x: f32[T, 4]) -> (%w: f32[T, 1], %i: i64[T, 1]) {\n"
        f"  %0: f32[T, 1], %1: i64[T, 1] = moe.route(%x, _) {attrs}\n  return %0, %1\n}}"
    )
    with pytest.raises(CompileError, match=said) as caught:
        moec.compile(parse(text), backend="reference")
    assert "moe.route" in str(caught.value)


def router_texts() -> list[Any]:
    """The cases of routers.ir in which a rule that ships makes a moe.route."""
    cases = read_cases(Path(__file__).parents[1] / "texts" / "routers.ir")
    return [case for case in cases if any("= moe.route" in line for line in case.checks)]


@limited()
def test_raised_routers_keep_their_meaning():
    """Each router that a rule raises chooses and weighs hostile logits as it did before.

    Two freedoms are the rules': where masked experts and open ones tie at weight 0, either may be named, and where a
    model's softmax runs over all experts with -inf for those not chosen, NaN stays with the chosen.
    """
    cases = router_texts()
    assert len(cases) > 20
    for case in cases:
        before = parse(case.graph)
        r = torch.Generator().manual_seed(1)
        before.bind_weights({n: torch.randn(v.shape, generator=r).to(v.dtype.torch) for n, v in before.weights.items()})
        after = before
        for rule in parse_passes(case.run):
            after, _ = run_pass(rule, after)
        assert after.find("moe.route")
        shapes = [[1 if isinstance(s, Dim) else s for s in v.shape] for v in before.inputs]
        rest = [torch.randn(s, generator=r).to(v.dtype.torch) for s, v in zip(shapes, before.inputs, strict=True)][1:]
        for name, row in logits_of(shapes[0][-1]).items():
            given = [row.expand(shapes[0]).to(before.inputs[0].dtype.torch), *rest]
            what = f"{case.where} {case.title}: {name}"
            same_choice(run(before, given), run(after, given), what)


def same_choice(raw: list[torch.Tensor], raised: list[torch.Tensor], what: str) -> None:
    unused = (raw[0] == 0) & (raised[0] == 0)
    for want, got in zip(raw, raised, strict=True):
        if not want.dtype.is_floating_point:
            assert bool(((got == want) | unused).all()), f"{what}: {got} for {want}"
        elif "among -inf" in what and bool(want.isnan().all()):
            assert got.isnan().any(), what
        else:
            same(got, want, 1e-5 if want.dtype == torch.float32 else 2e-2, what)


@limited()
def test_the_moe_operator_of_onnx_runtime():
    """It routes by itself, from logits made of the weights: hostile rows come out as the reference has them."""
    r = torch.Generator().manual_seed(3)
    gate_up, down = torch.randn(8, 12, 12, generator=r), torch.randn(8, 12, 6, generator=r)
    for attrs in (
        {"k": 1},
        {"k": 2},
        {"k": 2, "scoring": "topk_softmax"},
        {"k": 3, "scoring": "sigmoid", "scale": 2.5, "normalize_eps": 1e-20},
        {"k": 8, "scoring": "sigmoid", "normalize": False},
    ):

        def build(b: Any, x: Any, logits: Any, attrs: Any = attrs) -> Any:
            w, i = b.route(logits, **attrs)
            return b.experts(x, w, i, weight(b, "gu", gate_up), weight(b, "dn", down))

        graph = graph_of({"x": TensorType(DType.F32, (Dim("T"), 12)), "l": TensorType(DType.F32, (Dim("T"), 8))}, build)
        rows = logits_of(8)
        x, logits = torch.randn(len(rows), 12, generator=r), torch.stack(list(rows.values()))
        exe = compiled("onnxruntime", graph, experts="moe")
        assert exe.stats["forms"] == {"experts.moe": 1}
        got, want = exe.run([x, logits])[0], run(graph, [x, logits])[0]
        for i, row in enumerate(rows):
            same(got[i : i + 1], want[i : i + 1], 1e-4, f"{row}, {attrs}")
        for tokens in (0, 1):
            same(exe.run([x[:tokens], logits[:tokens]])[0], want[:tokens], 1e-4, f"{tokens} tokens")
