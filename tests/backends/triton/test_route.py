"""Routing against a stable descending sort."""

import pytest
import torch

from moec.backends.triton import run


def expected(logits, bias, k, scoring, normalize, eps, scale, n_group, topk_group, group_score, masked):
    scores = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid, "topk_softmax": lambda x: x}[scoring](
        logits
    )
    choice = scores if bias is None else scores + bias
    tokens, experts = logits.shape
    if n_group > 1:
        grouped = choice.view(tokens, n_group, experts // n_group)
        best = (
            grouped.sort(dim=-1, descending=True, stable=True).values[..., : 1 if group_score == "max" else 2].sum(-1)
        )
        kept = best.sort(dim=-1, descending=True, stable=True).indices[:, :topk_group]
        closed = torch.ones(tokens, n_group, dtype=torch.bool).scatter(1, kept, False)
        choice = grouped.masked_fill(closed[..., None], masked).view(tokens, experts)
    chosen = choice.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, chosen)
    if scoring == "topk_softmax":
        weights = weights.softmax(-1)
    elif normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return weights * scale, chosen


CONFIGS = {
    "mixtral": (8, {"k": 2}),
    "one": (1, {"k": 1, "normalize": False}),
    "odd": (13, {"k": 5, "scoring": "sigmoid"}),
    "qwen3": (128, {"k": 8}),
    "gpt-oss": (32, {"k": 4, "scoring": "topk_softmax"}),
    "deepseek-v2": (
        24,
        {"k": 3, "n_group": 3, "topk_group": 2, "group_score": "max", "normalize": False, "scale": 16.0},
    ),
    "deepseek-v3": (
        40,
        {"k": 6, "scoring": "sigmoid", "n_group": 5, "topk_group": 2, "scale": 2.5, "normalize_eps": 1e-20},
    ),
    "masked zero": (16, {"k": 4, "scoring": "sigmoid", "n_group": 4, "topk_group": 2, "masked_score": 0.0}),
}


def check(close, logits, bias, config):
    full = {
        "scoring": "softmax", "normalize": True, "normalize_eps": 0.0, "scale": 1.0, "n_group": 1, "topk_group": 1,
        "group_score": "top2_sum", "masked_score": float("-inf"), **config,
    }  # fmt: skip
    weights, experts = run("route", logits, bias, **config)
    want_weights, want_experts = expected(
        logits, bias, full["k"], full["scoring"], full["normalize"], full["normalize_eps"], full["scale"],
        full["n_group"], full["topk_group"], full["group_score"], full["masked_score"],
    )  # fmt: skip
    assert experts.dtype == torch.int64
    assert weights.dtype == logits.dtype
    assert torch.equal(experts, want_experts)
    close(weights, want_weights.double(), roundings=2)


@pytest.mark.parametrize("tokens", [0, 1, 37])
@pytest.mark.parametrize("name", CONFIGS)
def test_route(close, name, tokens):
    experts, config = CONFIGS[name]
    check(close, torch.randn(tokens, experts), None, config)
    check(close, torch.randn(tokens, experts), torch.randn(experts), config)


@pytest.mark.parametrize("name", CONFIGS)
def test_ties_go_to_the_lower_number(close, name):
    experts, config = CONFIGS[name]
    check(close, torch.zeros(2, experts), None, config)
    check(close, torch.randn(50, experts).round(), torch.randn(experts).round(), config)
    check(close, torch.randn(50, experts).round().bfloat16(), None, config)


def test_one_ulp_is_no_tie():
    logits = torch.ones(1, 8)
    logits[0, 5] = torch.nextafter(logits[0, 5], torch.tensor(2.0))
    assert run("route", logits, k=3, scoring="topk_softmax")[1].tolist() == [[5, 0, 1]]
    assert run("route", -logits, k=8, scoring="topk_softmax")[1].tolist() == [[0, 1, 2, 3, 4, 6, 7, 5]]


def test_nan_ranks_first_and_poisons():
    logits = torch.randn(3, 8)
    logits[1, 5] = float("nan")
    weights, experts = run("route", logits, k=2, scoring="sigmoid", normalize=False)
    assert experts[1, 0] == 5
    assert weights[1, 0].isnan()
    assert not weights[1, 1].isnan()
    assert not weights[0].isnan().any()
    assert not weights[2].isnan().any()
    weights, experts = run("route", logits, k=2)
    assert weights[1].isnan().all()
    assert experts[1].tolist() == [0, 1]
    assert not weights[0].isnan().any()


def test_infinite_logits(close):
    logits = torch.randn(4, 8)
    logits[0, 3] = float("-inf")
    logits[1] = float("-inf")
    logits[1, 6] = 0.0
    check(close, logits, None, {"k": 8})
    check(close, logits, None, {"k": 3, "scoring": "topk_softmax"})
    check(close, logits, None, {"k": 8, "scoring": "sigmoid"})


def test_leading_dimensions():
    logits = torch.randn(2, 3, 8)
    weights, experts = run("route", logits, k=2)
    flat_weights, flat_experts = run("route", logits.view(6, 8), k=2)
    assert torch.equal(weights.view(6, 2), flat_weights)
    assert torch.equal(experts.view(6, 2), flat_experts)


def test_refusals():
    logits = torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.4 \(experts left open\), got 5"):
        run("route", logits, k=5, n_group=4, topk_group=2)
    with pytest.raises(ValueError, match="8 experts do not form 3 equal groups"):
        run("route", logits, k=1, n_group=3)
    with pytest.raises(ValueError, match="scoring must be one of"):
        run("route", logits, k=1, scoring="relu")
    with pytest.raises(ValueError, match=r"bias must have shape \[8\]"):
        run("route", logits, torch.zeros(4), k=1)
