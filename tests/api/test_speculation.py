"""Speculative decoding: the tokens of plain greedy decoding, whatever the drafts are worth."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import moec
from moec import models
from moec.ir import ArgumentTypeError, ArgumentValueError, CompileError
from moec.speculation import Speculation

PROMPT = torch.tensor([[3, 9, 27, 1, 4, 12], [5, 6, 7, 8, 9, 10], [11, 2, 30, 31, 0, 20]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])


def model_of(name: str) -> models.MoETransformer:
    config = dataclasses.replace(models.config(name), num_layers=2, vocab_size=32, num_mtp_layers=1)
    return models.build(config)


@pytest.fixture(scope="module", params=["deepseek-v3-mini", "mixtral-8x7b-mini"])
def compiled(request):
    return moec.compile(model_of(request.param), backend="onnxruntime", threads=1)


@pytest.fixture(scope="module")
def trained():
    return moec.compile(models.trained(), backend="onnxruntime", threads=1)


def same(compiled, prompt, mask=None, **arguments) -> Speculation:
    counts = Speculation()
    plain = compiled.generate(prompt, mask, **arguments)
    drafted = compiled.generate(prompt, mask, speculative=counts, **arguments)
    assert torch.equal(plain, drafted)
    return counts


def test_drafts_that_are_mostly_wrong_change_nothing(compiled):
    counts = same(compiled, PROMPT, MASK, max_new_tokens=20, eos_token_id=None)
    assert counts.rate < 0.5
    assert counts.steps <= 19


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 2), (2, 1), (3, 5), (0, 4)])
@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_sizes(compiled, rows, length, count):
    same(compiled, PROMPT[:rows, :length], max_new_tokens=count, eos_token_id=None)


def test_ends(compiled):
    new = compiled.generate(PROMPT, MASK, max_new_tokens=12, eos_token_id=None)[:, 6:]
    for eos in (int(new[0, 0]), int(new[1, 1]), int(new[2, 5]), new[:, 3].tolist()):
        same(compiled, PROMPT, MASK, max_new_tokens=12, eos_token_id=eos)


def test_good_drafts_save_steps(trained):
    """The shipped model's head; texts of different lengths in one batch."""
    texts = [
        b"It was the best of times, it was the",
        b"def add(a, b):\n    return a +",
        b"The quick brown fox jumps over",
    ]
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(t)) + list(t) for t in texts])
    mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in texts])
    counts = same(trained, ids, mask, max_new_tokens=60, eos_token_id=None)
    assert counts.rate > 0.6
    assert counts.steps < 50
    assert counts.drafted >= counts.accepted > 0


def test_tokens_are_told_in_columns(compiled):
    told: list[torch.Tensor] = []
    out = compiled.generate(PROMPT, MASK, max_new_tokens=9, speculative=True, on_token=told.append)
    assert torch.equal(torch.stack(told, dim=1), out[:, 6:])


def test_what_is_refused(compiled):
    with pytest.raises(ArgumentValueError, match="greedy"):
        compiled.generate(PROMPT, speculative=True, temperature=1.0)
    with pytest.raises(ArgumentTypeError, match=r"speculative.*str"):
        compiled.generate(PROMPT, speculative="yes")
    with pytest.raises(ArgumentValueError, match="input_ids"):
        compiled.generate(PROMPT + 100, speculative=True)


def test_a_model_without_a_head(compiled_lm):
    with pytest.raises(CompileError, match="no multi-token prediction head"):
        compiled_lm.generate(PROMPT, speculative=True)


def test_the_head_is_saved_along(trained, tmp_path):
    trained.save(tmp_path / "saved")
    loaded = moec.load(tmp_path / "saved")
    assert sorted(loaded.report.to_dict()["programs"]) == ["cached", "speculative"]
    ids = torch.tensor([list(b"It was the best of times, it was the")])
    counts = Speculation()
    assert torch.equal(
        loaded.generate(ids, max_new_tokens=20, speculative=counts), trained.generate(ids, max_new_tokens=20)
    )
    assert counts.accepted > 5
