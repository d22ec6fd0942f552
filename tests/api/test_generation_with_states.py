"""Generation with layers whose cache is a state of fixed size, beside those with keys and values."""

import functools

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


TWO_PROGRAMS = ["jamba", "mamba", "mamba2"]  # several tokens after others start from a state of zeros
FAMILIES = ["qwen3_next", "lfm2_moe", "mamba2"]
OTHERS = ("granitemoehybrid_mamba", "jamba", "mamba", "minimax")  # which `make matrix` generates with too
FAMILIES += [pytest.param(family, marks=pytest.mark.large) for family in OTHERS]


@functools.cache
def compiled_model(family):
    """(the model, compiled for ONNX Runtime)"""
    model = build(family)
    return model, moec.compile(model, backend="onnxruntime", threads=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_what_the_model_generates(family):
    """Gated delta rule, Mamba, Mamba-2, lightning attention, short convolutions: prompts of one token and of several,
    with padding in front."""
    model, compiled = compiled_model(family)
    padded = torch.ones(2, 9, dtype=torch.int64)
    padded[0, :4] = 0
    for mask in (padded, torch.ones(1, 1, dtype=torch.int64), torch.ones(3, 2, dtype=torch.int64)):
        ids = torch.randint(3, 29, mask.shape)
        got = compiled.generate(ids, attention_mask=mask, max_new_tokens=8, eos_token_id=None)
        assert got.tolist() == expected(model, ids, mask, 8).tolist(), (family, tuple(mask.shape))
    programs = ["cached", "prompt"] if family in TWO_PROGRAMS else ["cached"]
    assert sorted(compiled.report.to_dict()["programs"]) == programs


def test_the_state_is_passed_on():
    """Without what earlier tokens left in it, the tokens are others."""
    model, compiled = compiled_model("qwen3_next")
    ids = torch.randint(3, 29, (4, 12))
    whole = compiled.generate(ids, max_new_tokens=1, eos_token_id=None)[:, -1]
    assert whole.tolist() == expected(model, ids, torch.ones_like(ids), 1)[:, -1].tolist()
    alone = compiled.generate(ids[:, -1:], max_new_tokens=1, eos_token_id=None)[:, -1]
    assert whole.tolist() != alone.tolist()


def test_two_programs_are_saved(tmp_path):
    compiled = moec.compile(build("mamba"), backend="onnxruntime", threads=1)
    compiled.save(tmp_path / "saved")
    loaded = moec.load(tmp_path / "saved")
    for length in (1, 2, 4, 11):
        ids = torch.randint(3, 29, (2, length))
        assert torch.equal(loaded.generate(ids, max_new_tokens=6), compiled.generate(ids, max_new_tokens=6))


def test_refuses_what_forgets():
    """A step that starts from nothing again, for one token as for several."""

    class Forgets(type(build("mamba"))):
        def forward(self, input_ids=None, attention_mask=None, cache_params=None, use_cache=None, **kwargs):
            return super().forward(input_ids, use_cache=use_cache)

    model = build("mamba")
    model.__class__ = Forgets
    with pytest.raises(moec.CompileError, match="something else for a token after others than in one run"):
        moec.compile(model, backend="reference").generate(torch.ones(1, 3, dtype=torch.int64))


def test_refuses_a_prompt_that_padding_changes():
    """What takes four tokens at least is padded, so padding has to be without effect."""

    class IgnoresTheMask(type(build("mamba"))):
        def forward(self, input_ids=None, attention_mask=None, cache_params=None, use_cache=None, **kwargs):
            return super().forward(input_ids, cache_params=cache_params, use_cache=use_cache)

    model = build("mamba")
    model.__class__ = IgnoresTheMask
    with pytest.raises(moec.CompileError, match=r"takes 4 or more, and padding on the left changes its logits"):
        moec.compile(model, backend="reference").generate(torch.ones(1, 3, dtype=torch.int64))
