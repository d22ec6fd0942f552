"""Generation with layers whose cache is a state of fixed size, beside those with keys and values."""

import pytest
import torch

import moec

from .. import model_matrix


def build(family):
    known = model_matrix.FAMILIES[family]
    entry = model_matrix.Entry(family, known.attention[0], "grouped_mm" if known.experts else None)
    model = model_matrix.build(entry)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return model


def expected(model, ids, mask, count):
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )


@pytest.mark.parametrize("family", ["qwen3_next", "granitemoehybrid_mamba", "lfm2_moe"])
def test_generates_what_the_model_generates(family):
    """Gated delta rule, Mamba-2, short convolutions: prompts of one token and of several, with padding in front."""
    model = build(family)
    compiled = moec.compile(model, backend="onnxruntime", threads=1)
    padded = torch.ones(2, 9, dtype=torch.int64)
    padded[0, :4] = 0
    for mask in (padded, torch.ones(1, 1, dtype=torch.int64), torch.ones(3, 2, dtype=torch.int64)):
        ids = torch.randint(3, 29, mask.shape)
        got = compiled.generate(ids, attention_mask=mask, max_new_tokens=8, eos_token_id=None)
        assert got.tolist() == expected(model, ids, mask, 8).tolist(), (family, tuple(mask.shape))


def test_the_state_is_passed_on():
    """Without what earlier tokens left in it, the tokens are others."""
    model = build("qwen3_next")
    compiled = moec.compile(model, backend="reference")
    ids = torch.randint(3, 29, (4, 12))
    whole = compiled.generate(ids, max_new_tokens=1, eos_token_id=None)[:, -1]
    assert whole.tolist() == expected(model, ids, torch.ones_like(ids), 1)[:, -1].tolist()
    alone = compiled.generate(ids[:, -1:], max_new_tokens=1, eos_token_id=None)[:, -1]
    assert whole.tolist() != alone.tolist()


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("jamba", "holds for 2 or more, and decoding takes one at a time"),  # which starts from zero for several
        ("minimax", "its cache holds tensors outside of its layers, as 'linear_cache'"),
    ],
)
def test_refuses(family, reason):
    with pytest.raises(moec.CompileError, match=reason):
        moec.compile(build(family), backend="reference").generate(torch.ones(1, 3, dtype=torch.int64))
