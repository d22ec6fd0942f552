"""The transformer against itself: cache, padding, small shapes, dtypes, export at shapes it was not traced at."""

import copy
import dataclasses

import pytest
import torch

from moec.models import CONFIGS, MoETransformer, build, config

MINIS = [name for name in CONFIGS if name.endswith("-mini")]


@pytest.fixture(params=MINIS, scope="module")
def model(request):
    return build(request.param, seed=1)


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_past(model, batch: int, length: int):
    shape = lambda t: (*t.shape[:2], length, t.shape[3])  # noqa: E731
    return [(torch.randn(shape(k)), torch.randn(shape(v))) for k, v in model.empty_cache(batch)]


@torch.no_grad()
@pytest.mark.parametrize("steps", [(13,), (1, 12), (7, 1, 1, 4)])
def test_cached_steps_equal_one_pass(model, steps):
    ids = tokens(2, 13)
    past, parts = model.empty_cache(2), []
    for part in ids.split(steps, dim=1):
        logits, past = model(part, None, past)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=0, atol=2e-5)
    for (k, v), (k0, v0) in zip(past, model.empty_cache(2), strict=True):
        assert k.shape == (*k0.shape[:2], 13, k0.shape[3])
        assert v.shape == (*v0.shape[:2], 13, v0.shape[3])


@torch.no_grad()
def test_left_padded_rows_compute_what_they_compute_alone(model):
    short, long = tokens(1, 6, seed=1), tokens(1, 11, seed=2)
    batch = torch.cat((torch.cat((torch.zeros(1, 5, dtype=torch.long), short), dim=1), long))
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    whole = model(batch, mask)
    assert whole.isfinite().all()
    torch.testing.assert_close(whole[:1, 5:], model(short), rtol=0, atol=2e-5)
    torch.testing.assert_close(whole[1:], model(long), rtol=0, atol=2e-5)

    logits, past = model(batch[:, :8], mask[:, :8], model.empty_cache(2))
    later, _ = model(batch[:, 8:], mask, past)
    torch.testing.assert_close(torch.cat((logits, later), dim=1)[:, 5:], whole[:, 5:], rtol=0, atol=2e-5)


@torch.no_grad()
def test_padding_tokens_do_not_matter_but_real_ones_do(model):
    ids = tokens(1, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    other_padding, other_token = ids.clone(), ids.clone()
    other_padding[0, :4] += 1
    other_token[0, 4] = (ids[0, 4] + 1) % 256
    expected = model(ids, mask)[:, 4:]
    torch.testing.assert_close(model(other_padding % 256, mask)[:, 4:], expected, rtol=0, atol=2e-5)
    assert not torch.allclose(model(other_token, mask)[:, -1], expected[:, -1], atol=1e-3)


@torch.no_grad()
def test_no_position_sees_the_future(model):
    ids = tokens(1, 8)
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 256
    a, b = model(ids), model(changed)
    torch.testing.assert_close(a[:, :5], b[:, :5], rtol=0, atol=2e-5)
    assert not torch.allclose(a[:, 5:], b[:, 5:], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1), (0, 4), (2, 0)])
def test_one_and_no_tokens(model, shape):
    ids = tokens(*shape)
    assert model(ids).shape == (*shape, 256)
    logits, past = model(ids, torch.ones_like(ids), model.empty_cache(shape[0]))
    assert logits.shape == (*shape, 256)
    assert past[0][0].shape[2] == shape[1]


@torch.no_grad()
def test_all_masked_row_is_finite(model):
    ids = tokens(2, 5)
    mask = torch.ones_like(ids)
    mask[0] = 0
    assert model(ids, mask).isfinite().all()


@torch.no_grad()
def test_float64_agrees_and_bfloat16_keeps_its_dtype(model):
    ids = tokens(1, 9)
    expected = model(ids)
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    torch.testing.assert_close(type(model).from_tensors(model.config, state)(ids).float(), expected, rtol=0, atol=2e-4)
    half = type(model).from_tensors(model.config, {n: t.bfloat16() for n, t in model.state_dict().items()})
    assert half(ids).dtype == torch.bfloat16
    assert half.empty_cache(1)[0][0].dtype == torch.bfloat16
    assert half.empty_cache(1, torch.float32)[0][0].dtype == torch.float32


def test_wrong_arguments_are_named(model):
    with pytest.raises(ValueError, match="past has 1 layers"):
        model(tokens(1, 2), None, model.empty_cache(1)[:1])
    with pytest.raises(ValueError, match="attention_mask covers 3 of 0 \\+ 2"):
        model(tokens(1, 2), torch.ones(1, 3, dtype=torch.long))


@torch.no_grad()
@pytest.mark.parametrize("name", ["deepseek-v2-lite-mini", "qwen3-30b-a3b-mini"])
def test_export_holds_at_other_shapes(name):
    model = build(dataclasses.replace(config(name), num_layers=2))
    dynamic = torch.export.Dim.DYNAMIC
    traced = torch.export.export(
        model, (tokens(2, 24),), strict=False, dynamic_shapes={"input_ids": {0: dynamic, 1: dynamic}}
    ).module()
    for shape in [(1, 1), (1, 17), (3, 40), (5, 100)]:
        ids = tokens(*shape)
        torch.testing.assert_close(traced(ids), model(ids), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["deepseek-v3-mini", "mixtral-8x7b-mini"])
def test_cached_export_holds_at_other_shapes(name):
    model = build(dataclasses.replace(config(name), num_layers=2))
    dynamic = torch.export.Dim.DYNAMIC
    past = random_past(model, 2, 7)
    mask = torch.ones(2, 12, dtype=torch.long)
    shapes = {
        "input_ids": {0: dynamic, 1: dynamic},
        "attention_mask": {0: dynamic, 1: dynamic},
        "past": [({0: dynamic, 2: dynamic}, {0: dynamic, 2: dynamic}) for _ in past],
    }
    program = torch.export.export(model, (tokens(2, 5), mask, past), strict=False, dynamic_shapes=shapes)
    for constraint in program.range_constraints.values():
        assert constraint.upper > 10**9, "a dimension was specialised"
    traced = program.module(check_guards=False)  # torch assumes sizes ≥ 2 for dynamic dimensions; 0 and 1 work too
    for batch, length, before in [(1, 1, 0), (1, 17, 0), (2, 1, 9), (1, 1, 1), (3, 8, 5)]:
        past = random_past(model, batch, before)
        mask = torch.ones(batch, before + length, dtype=torch.long)
        mask[0, : (before + length) // 3] = 0
        ids = tokens(batch, length)
        logits, cache = traced(ids, mask, past)
        expected, expected_cache = model(ids, mask, past)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(cache[-1], expected_cache[-1], rtol=0, atol=1e-4)


def test_the_same_seed_gives_the_same_model():
    a, b, c = build("deepseek-v3-mini", 5), build("deepseek-v3-mini", 5), build("deepseek-v3-mini", 6)
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name])
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


def test_training_reaches_every_parameter():
    model = build("deepseek-v3-mini").train()
    ids = tokens(4, 32)
    hidden = model.hidden_states(ids)
    (model.logits(hidden).logsumexp(-1).sum() + model.mtp_logits(hidden, ids).logsumexp(-1).sum()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@torch.no_grad()
def test_mtp_reads_hidden_state_and_next_token():
    model = build("deepseek-v3-mini")
    ids = tokens(1, 10)
    hidden = model.hidden_states(ids)
    torch.testing.assert_close(model.logits(hidden), model(ids))
    draft = model.mtp_logits(hidden[:, :-1], ids[:, 1:])
    assert draft.shape == (1, 9, 256)
    other = ids.clone()
    other[0, 5] = (ids[0, 5] + 1) % 256
    changed = model.mtp_logits(hidden[:, :-1], other[:, 1:])
    torch.testing.assert_close(draft[:, :4], changed[:, :4], rtol=0, atol=2e-5)
    assert not torch.allclose(draft[:, 4], changed[:, 4], atol=1e-3)
    with pytest.raises(ValueError, match="1 MTP layers"):
        model.mtp_logits(hidden, ids, depth=1)
    with pytest.raises(ValueError, match="0 MTP layers"):
        build("mixtral-8x7b-mini").mtp_hidden(torch.zeros(1, 1, 128), ids[:, :1])


def test_tied_embeddings_share_one_weight():
    tied = dataclasses.replace(config("qwen3-30b-a3b-mini"), tie_word_embeddings=True)
    model = build(tied)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tensors = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    again = MoETransformer.from_tensors(tied, tensors)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_from_tensors_names_what_does_not_fit():
    model = build("mixtral-8x7b-mini")
    tensors = dict(model.state_dict())
    del tensors["model.norm.weight"]
    with pytest.raises(ValueError, match=r"missing \['model\.norm\.weight'\]"):
        MoETransformer.from_tensors(model.config, tensors)
    tensors = model.state_dict() | {"model.norm.weight": torch.ones(3)}
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \[3\], the config wants \[128\]"):
        MoETransformer.from_tensors(model.config, tensors)


@torch.no_grad()
def test_rotary_table_survives_casts_and_meta():
    """It is no weight: rounding it to bfloat16 would turn positions past a few hundred into others."""
    model = build("deepseek-v3-mini")
    table = model.model.rotary_emb.inv_freq.clone()
    ids = tokens(1, 9)
    expected = model(ids)
    for changed in (copy.deepcopy(model).bfloat16(), copy.deepcopy(model).double()):
        assert torch.equal(changed.model.rotary_emb.inv_freq, table)
    with torch.device("meta"):
        empty = build("deepseek-v3-mini")
    assert empty(ids.to("meta")).shape == (1, 9, 256)
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(model.state_dict())
    assert torch.equal(filled(ids), expected)
