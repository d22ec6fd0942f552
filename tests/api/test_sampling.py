"""How tokens are drawn: the distribution, its cuts, seeds, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from moec.ir import ArgumentTypeError, ArgumentValueError
from moec.sampling import Sampling

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, 1.0]])
PROMPT = torch.tensor([[3, 9, 27, 1, 4, 12], [5, 6, 7, 8, 9, 10], [11, 2, 30, 31, 0, 20]])


def kept(sampling: Sampling, logits: torch.Tensor = LOGITS) -> list[int]:
    return (sampling.probabilities(logits)[0] > 0).nonzero()[:, 0].tolist()


def test_probabilities_are_the_softmax_of_scaled_logits():
    for t in (0.5, 1.0, 3.0):
        torch.testing.assert_close(Sampling(t).probabilities(LOGITS), (LOGITS / t).softmax(-1))


@pytest.mark.parametrize(
    ("k", "left"), [(1, [0]), (2, [0, 1, 4]), (3, [0, 1, 4]), (4, [0, 1, 2, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_top_k_keeps_ties(k: int, left: list[int]):
    assert kept(Sampling(top_k=k)) == left


def test_top_p_keeps_the_fewest_that_reach_it():
    p = LOGITS.softmax(-1)[0]
    assert kept(Sampling(top_p=1e-6)) == [0]
    assert kept(Sampling(top_p=float(p[0]) - 1e-3)) == [0]
    assert kept(Sampling(top_p=float(p[0]) + 1e-3)) == [0, 1]
    assert kept(Sampling(top_p=float(p[0] + 2 * p[1]) + 1e-3)) == [0, 1, 2, 4]
    assert kept(Sampling(top_p=1.0)) == [0, 1, 2, 3, 4]
    found = Sampling(top_p=float(p[0]) + 1e-3).probabilities(LOGITS)[0]
    torch.testing.assert_close(found[:2], p[:2] / p[:2].sum())


def test_top_k_comes_before_top_p():
    """Of the three left by top_k the first has 0.58 of the probability."""
    assert kept(Sampling(top_k=3, top_p=0.55)) == [0]
    assert kept(Sampling(top_p=0.55)) == [0, 1]


def test_draws_follow_the_probabilities():
    sampling = Sampling(temperature=0.7, top_k=4, seed=0)
    rows = LOGITS.expand(20_000, -1)
    drawn = sampling.choose(rows, sampling.generator()).bincount(minlength=5) / len(rows)
    torch.testing.assert_close(drawn, sampling.probabilities(LOGITS)[0], rtol=0.0, atol=0.015)


def test_minus_infinity_is_never_drawn_and_rows_without_numbers_are_refused():
    masked = torch.tensor([[0.0, -math.inf, -math.inf]])
    sampling = Sampling(temperature=5.0, seed=1)
    assert sampling.choose(masked.expand(500, -1), sampling.generator()).tolist() == [0] * 500
    for bad in (math.nan, math.inf):
        with pytest.raises(ArgumentValueError, match="nothing to sample from"):
            sampling.choose(torch.tensor([[0.0, bad]]), sampling.generator())


def test_low_temperatures_choose_the_likeliest():
    assert kept(Sampling(1.2e-38)) == kept(Sampling(1e-30)) == [int(LOGITS.argmax())]


def test_when_it_is_greedy():
    assert Sampling.of().greedy
    assert Sampling.of(temperature=0).greedy
    assert Sampling.of(temperature=0.0, top_k=5).greedy
    assert not any(s.greedy for s in (Sampling.of(temperature=0.1), Sampling.of(top_k=3), Sampling.of(seed=0)))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"temperature": -1.0}, ArgumentValueError, ["temperature", "-1.0", "≥ 0"]),
        ({"temperature": math.nan}, ArgumentValueError, ["temperature", "nan"]),
        ({"temperature": math.inf}, ArgumentValueError, ["temperature", "inf"]),
        ({"temperature": 1e-45}, ArgumentValueError, ["temperature", "1e-45", "above 0 at least 1.2e-38"]),
        ({"temperature": 10**400}, ArgumentValueError, ["temperature", "finite"]),
        ({"seed": 2**70}, ArgumentValueError, ["seed", str(2**70), "expected −2⁶³ up to 2⁶⁴ − 1"]),
        ({"seed": -(2**64)}, ArgumentValueError, ["seed"]),
        ({"temperature": "hot"}, ArgumentTypeError, ["temperature", "str 'hot'"]),
        ({"top_k": 0}, ArgumentValueError, ["top_k", "0", "≥ 1"]),
        ({"top_k": 2.0}, ArgumentTypeError, ["top_k", "float"]),
        ({"top_p": 0.0}, ArgumentValueError, ["top_p", "0.0"]),
        ({"top_p": 1.5}, ArgumentValueError, ["top_p", "1.5"]),
        ({"top_p": True}, ArgumentTypeError, ["top_p", "bool"]),
        ({"seed": 1.5}, ArgumentTypeError, ["seed", "float"]),
    ],
)
def test_what_is_refused(compiled_lm, arguments, error, words):
    with pytest.raises(error) as caught:
        compiled_lm.generate(PROMPT, **arguments)
    for word in words:
        assert word in str(caught.value)


def test_a_seed_repeats_and_others_differ(compiled_lm):
    def draw(**arguments):
        return compiled_lm.generate(PROMPT, max_new_tokens=12, eos_token_id=None, **arguments).tolist()

    assert draw(seed=3) == draw(seed=3, temperature=1.0)
    assert len({str(draw(seed=s, temperature=2.0)) for s in range(5)}) == 5
    assert len({str(draw(temperature=5.0)) for _ in range(3)}) == 3
    assert draw(temperature=0) == draw() == draw(top_k=1) == draw(top_p=1e-9)
    assert draw(temperature=1e-4, seed=0) == draw()


def test_tokens_are_told_as_they_come(compiled_lm):
    told = []
    out = compiled_lm.generate(PROMPT, max_new_tokens=7, seed=0, on_token=told.append)
    assert torch.equal(torch.stack(told, dim=1), out[:, 6:])
    with pytest.raises(ArgumentTypeError, match=r"on_token.*int"):
        compiled_lm.generate(PROMPT, on_token=3)

    def stop(token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiled_lm.generate(PROMPT, on_token=stop)
    assert torch.equal(out, compiled_lm.generate(PROMPT, max_new_tokens=7, seed=0))
