"""Routing and experts against direct, slow definitions."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from moec.models import config
from moec.models.grouped import grouped_mm
from moec.models.moe import Experts, MoE, Router

BASE = dataclasses.replace(config("deepseek-v3-mini"), hidden_size=24, moe_intermediate_size=16)


def router(**changes) -> Router:
    gate = Router(dataclasses.replace(BASE, **changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        gate.weight.copy_(torch.randn(gate.weight.shape, generator=generator))
        if gate.scoring == "sigmoid":
            gate.e_score_correction_bias.copy_(torch.randn(gate.weight.shape[0], generator=generator) * 0.3)
    return gate


def by_hand(gate: Router, x: torch.Tensor) -> list[dict[int, float]]:
    """Expert → weight for each token, by sorting in Python."""
    rows = []
    for logits in (x @ gate.weight.T).tolist():
        t = torch.tensor(logits)
        scores = (t.sigmoid() if gate.scoring == "sigmoid" else t.softmax(0)).tolist()
        bias = gate.e_score_correction_bias.tolist() if gate.scoring == "sigmoid" else [0.0] * len(scores)
        choice = [s + b for s, b in zip(scores, bias, strict=True)]
        size = len(scores) // gate.n_group
        groups = [choice[g * size : (g + 1) * size] for g in range(gate.n_group)]
        value = [sum(sorted(g)[-2:]) if gate.scoring == "sigmoid" else max(g) for g in groups]
        best = sorted(range(gate.n_group), key=lambda g: -value[g])[: gate.topk_group]
        allowed = [e for e in range(len(scores)) if e // size in best]
        chosen = sorted(allowed, key=lambda e: -choice[e])[: gate.top_k]
        total = sum(scores[e] for e in chosen) if gate.normalise else 1.0
        rows.append({e: scores[e] / total * gate.scaling for e in chosen})
    return rows


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_group": 1, "topk_group": 1},
        {"n_group": 8, "topk_group": 3},
        {"norm_topk_prob": False},
        {"scoring": "softmax", "n_group": 1, "topk_group": 1},
        {"scoring": "softmax", "n_group": 4, "topk_group": 2, "norm_topk_prob": False, "routed_scaling_factor": 16.0},
        {"scoring": "softmax", "n_group": 1, "topk_group": 1, "top_k": 16},
        {"scoring": "softmax", "n_group": 1, "topk_group": 1, "top_k": 1},
    ],
    ids=str,
)
def test_router_follows_its_definition(changes):
    gate = router(**changes)
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(1))
    weights, experts = gate(x)
    for row, expected in enumerate(by_hand(gate, x)):
        got = dict(zip(experts[row].tolist(), weights[row].tolist(), strict=True))
        assert got.keys() == expected.keys()
        for expert, weight in expected.items():
            assert got[expert] == pytest.approx(weight, rel=1e-4)


@torch.no_grad()
def test_the_bias_chooses_but_does_not_weigh():
    gate = router(n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.0)
    x = torch.randn(20, 24, generator=torch.Generator().manual_seed(1))
    gate.e_score_correction_bias.zero_()
    gate.e_score_correction_bias[5] = 100.0
    weights, experts = gate(x)
    assert (experts == 5).any(dim=1).all()
    chosen = weights[experts == 5]
    torch.testing.assert_close(chosen, (x @ gate.weight[5]).sigmoid(), rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_ties_choose_distinct_experts_within_the_allowed_groups(scoring):
    gate = router(scoring=scoring)
    gate.weight.zero_()  # every score equal
    if scoring == "sigmoid":
        gate.e_score_correction_bias.zero_()
    weights, experts = gate(torch.randn(9, 24))
    assert all(len(set(row)) == gate.top_k for row in experts.tolist())
    assert all(len({e // 4 for e in row}) <= gate.topk_group for row in experts.tolist())
    torch.testing.assert_close(weights, torch.full_like(weights, gate.scaling / gate.top_k))


def experts_by_hand(block: Experts, x, weights, experts):
    rows = []
    for t in range(x.shape[0]):
        total = torch.zeros_like(x[t])
        for weight, e in zip(weights[t], experts[t], strict=True):
            gate, up = (block.gate_up_proj[e] @ x[t]).chunk(2)
            total = total + weight * (block.down_proj[e] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows) if rows else torch.zeros_like(x)


@pytest.mark.parametrize("count", [0, 1, 2, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_follow_their_definition_with_gradients(count, dtype):
    block = Experts(BASE).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[2] ** -0.5)
    x = torch.randn(count, 24, generator=generator).to(dtype).requires_grad_()
    weights = torch.rand(count, 4, generator=generator).to(dtype)
    experts = torch.stack([torch.randperm(16, generator=generator)[:4] for _ in range(count)] or [torch.zeros(4)])
    experts = experts[:count].long()
    result, expected = block(x, weights, experts), experts_by_hand(block, x, weights, experts)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    if count:
        probe = torch.randn(result.shape, generator=generator).to(dtype)
        inputs = [x, *block.parameters()]
        for got, wanted in zip(
            torch.autograd.grad((result * probe).sum(), inputs),
            torch.autograd.grad((expected * probe).sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_all_tokens_on_one_set_of_experts():
    block = Experts(BASE)
    for parameter in block.parameters():
        parameter.copy_(torch.randn_like(parameter) * parameter.shape[2] ** -0.5)
    x, weights = torch.randn(40, 24), torch.rand(40, 4)
    experts = torch.tensor([15, 0, 7, 8]).expand(40, 4)
    torch.testing.assert_close(
        block(x, weights, experts), experts_by_hand(block, x, weights, experts), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_traced_op_is_the_eager_one():
    rows, weight = torch.randn(10, 8), torch.randn(3, 8, 12)
    ends = torch.tensor([4, 4, 10], dtype=torch.int32)
    expected = torch.cat((rows[:4] @ weight[0], rows[4:] @ weight[2]))
    torch.testing.assert_close(grouped_mm(rows, weight, ends), expected)
    torch.testing.assert_close(torch.ops.moec.grouped_mm(rows, weight, ends), expected)
    assert grouped_mm(rows.to("meta"), weight.to("meta"), ends.to("meta")).shape == (10, 12)
    torch.library.opcheck(
        torch.ops.moec.grouped_mm, (rows, weight, ends), test_utils=("test_schema", "test_faketensor")
    )


@torch.no_grad()
def test_shared_experts_are_added():
    with_shared = MoE(BASE)
    for parameter in with_shared.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2)
    x = torch.randn(2, 3, 24)
    assert with_shared.shared_experts is not None
    shared = with_shared.shared_experts(x)
    total = with_shared(x)
    with_shared.shared_experts = None
    torch.testing.assert_close(total, with_shared(x) + shared)
