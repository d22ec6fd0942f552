"""The training loop on a small model: it learns, resumes exactly, balances, and orthogonalises."""

import dataclasses
import threading

import pytest
import torch

from moec.models import config
from moec.models.optim import orthogonalise
from moec.models.train import Balancer, Plan, Run, rate, steps_until

SMALL = dataclasses.replace(config("deepseek-v3-mini"), hidden_size=64, num_layers=2, moe_intermediate_size=16)
TEXTS = [[b"to be, or not to be: that is the question. " * 40], [b"def f(x):\n    return x + 1\n\n" * 60]]
PLAN = Plan(rows=4, length=32, half_length_until=0.5)


def test_it_learns():
    run = Run(SMALL, TEXTS, PLAN, seed=0)
    losses = [run.step(i / 40) for i in range(40)]
    assert losses[0][0] > 7.5
    assert losses[-1][0] < 2.5
    assert losses[-1][1] < losses[0][1] - 2, "the MTP head learned nothing"


def test_resuming_is_exact(tmp_path):
    whole, first, second = (Run(SMALL, TEXTS, PLAN, seed=s) for s in (0, 0, 1))
    for i in range(4):
        whole.step(i / 4)
    first.step(0.0)
    first.step(0.25)
    first.save(tmp_path / "state.safetensors")
    second.load(tmp_path / "state.safetensors")
    assert second.steps == 2
    second.step(0.5)
    second.step(0.75)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_balancing_moves_bias_towards_idle_experts():
    run = Run(SMALL, TEXTS, PLAN, seed=0)
    gate = run.model.model.layers[1].mlp.gate
    gate.e_score_correction_bias[3] = 5.0  # every token chooses expert 3
    ids = torch.randint(0, 256, (4, 32))
    run.model(ids)
    before = gate.e_score_correction_bias.clone()
    worst = run.balancer.step(0.1)
    assert worst == pytest.approx(SMALL.num_experts / SMALL.top_k)
    moved = gate.e_score_correction_bias - before
    assert float(moved[3]) == pytest.approx(float(moved.min()), abs=1e-6)
    assert moved[3] < moved.max()
    assert abs(float(gate.e_score_correction_bias.mean())) < 1e-6
    run.model.eval()
    run.model(ids)
    assert all(int(total.sum()) == 0 for total in run.balancer.counts), "held-out text moved the biases"
    assert isinstance(run.balancer, Balancer)


def test_orthogonalise_flattens_singular_values():
    """From a spread of 1000 to one of 4, with the singular vectors kept."""
    generator = torch.Generator().manual_seed(0)
    for rows, cols in [(16, 40), (40, 16)]:
        u, _ = torch.linalg.qr(torch.randn(rows, 16, generator=generator))
        v, _ = torch.linalg.qr(torch.randn(cols, 16, generator=generator))
        spread = torch.logspace(-3, 0, 16)
        result = orthogonalise((u * spread @ v.T).unsqueeze(0))[0]
        diagonal = u.T @ result @ v
        torch.testing.assert_close(u * diagonal.diagonal() @ v.T, result, rtol=0, atol=1e-4)
        assert diagonal.diagonal()[6:].min() > 0.3
        assert diagonal.diagonal().max() < 1.7


def test_rate_warms_up_holds_and_decays():
    assert rate(0.0) < 0.1
    assert rate(0.3) == 1.0
    assert rate(0.99) < 0.1
    values = [rate(p / 100) for p in range(60, 101)]
    assert values == sorted(values, reverse=True)


def test_steps_until_counts_and_stops():
    run = Run(SMALL, TEXTS, PLAN, seed=0)
    seen = []
    for progress in steps_until(run, 3, None, threading.Event()):
        seen.append(progress)
        run.steps += 1
    assert seen == [0, 1 / 3, 2 / 3]
    stopped = threading.Event()
    stopped.set()
    assert list(steps_until(run, 9, None, stopped)) == []
    assert list(steps_until(run, None, 1e-9, threading.Event())) == []
