"""`generate`: greedy decoding over the cached program equals the model's own greedy loop."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import moec
from moec import models
from moec.generation import Stops
from moec.ir import ArgumentTypeError, ArgumentValueError, CompileError
from moec.positions import positions

from .samples import TinyLM, greedy

PROMPT = torch.tensor([[3, 9, 27, 1, 4, 12], [5, 6, 7, 8, 9, 10], [11, 2, 30, 31, 0, 20]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])


def rows_alone(model, prompt, mask, count):
    return [greedy(model, row[m.bool()], count) for row, m in zip(prompt, mask, strict=True)]


def test_rows_equal_the_eager_loop(compiled_lm, tiny_lm):
    out = compiled_lm.generate(PROMPT, MASK, max_new_tokens=9)
    assert torch.equal(out[:, :6], PROMPT)
    assert out[:, 6:].tolist() == rows_alone(tiny_lm, PROMPT, MASK, 9)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 6), (2, 2), (3, 1)])
def test_sizes(compiled_lm, tiny_lm, batch, length):
    prompt = PROMPT[:batch, :length]
    out = compiled_lm.generate(prompt, max_new_tokens=4)
    assert out[:, length:].tolist() == rows_alone(tiny_lm, prompt, torch.ones_like(prompt), 4)


def test_a_row_without_a_token(compiled_lm):
    with pytest.raises(ArgumentValueError, match="leaves no token of row 1"):
        compiled_lm.generate(PROMPT[:2], torch.tensor([[1] * 6, [0] * 6]), max_new_tokens=2)


def test_no_rows_and_no_new_tokens(compiled_lm):
    assert torch.equal(compiled_lm.generate(PROMPT, max_new_tokens=0), PROMPT)
    assert compiled_lm.generate(PROMPT[:0], max_new_tokens=3).shape[0] == 0


def test_a_row_does_not_depend_on_its_batch_mates(compiled_lm):
    together = compiled_lm.generate(PROMPT, MASK, max_new_tokens=6)
    for i, row in enumerate(PROMPT):
        alone = compiled_lm.generate(row[MASK[i].bool()][None], max_new_tokens=6)
        assert alone[0, -6:].tolist() == together[i, -6:].tolist()


def test_ends_are_filled_and_stop_early(compiled_lm, tiny_lm):
    new = rows_alone(tiny_lm, PROMPT, MASK, 9)
    eos = new[0][1]
    out = compiled_lm.generate(PROMPT, MASK, max_new_tokens=9, eos_token_id=eos)[:, 6:]
    width = out.shape[1]
    for row, full in zip(out.tolist(), new, strict=True):
        end = full.index(eos) + 1 if eos in full else len(full)
        assert row == (full[:end] + [eos] * 9)[:width]
    assert width == max((full.index(eos) + 1 if eos in full else 9) for full in new)
    one = compiled_lm.generate(PROMPT[:1], max_new_tokens=9, eos_token_id=[99, eos])
    assert one[0, -1] == eos
    assert one.shape[1] < 6 + 9


def test_the_models_own_end(tiny_lm):
    class Config:
        eos_token_id = (7, 3)
        pad_token_id = 5

    model = TinyLM()
    model.config = Config()
    assert Stops.of(model) == Stops((7, 3), 5)
    assert Stops.of(tiny_lm) == Stops((), None)
    assert Stops((7, 3), 5).resolve(None) == ((), 5)
    assert Stops((7, 3), None).resolve(moec.UNSET) == ((7, 3), 7)
    assert Stops((7, 3), None).resolve(9) == ((9,), 9)
    assert Stops((7, 3), None).resolve(torch.tensor(9)) == ((9,), 9)
    assert Stops((7, 3), None).resolve(torch.tensor([9, 2])) == ((9, 2), 9)


@pytest.mark.parametrize(("eos", "pad"), [(-1, -1), ([-1], -100), (None, 2**70)])
def test_tokens_of_a_config_that_are_none(eos, pad, tmp_path):
    model = TinyLM()
    model.generation_config = SimpleNamespace(eos_token_id=eos, pad_token_id=pad)
    assert Stops.of(model) == Stops()
    model.config = SimpleNamespace(eos_token_id=[-1, 4], pad_token_id=6)
    assert Stops.of(model) == Stops((4,), 6)
    compiled = moec.compile(model, backend="reference")
    compiled.save(tmp_path / "it")
    new = compiled.generate(PROMPT, max_new_tokens=5)
    assert torch.equal(moec.load(tmp_path / "it").generate(PROMPT, max_new_tokens=5), new)


@pytest.mark.parametrize(
    ("config", "room"),
    [
        ({"max_position_embeddings": 16}, 16),
        ({"max_position_embeddings": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 16),
        ({"max_position_embeddings": 16, "rope_scaling": {"type": "linear", "factor": 2.5}}, 40),
        ({"max_position_embeddings": 16, "rope_parameters": {"rope_type": "yarn", "factor": 4}}, 64),
        ({"max_position_embeddings": 99,
          "rope_parameters": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16}}, 99),
        ({"max_position_embeddings": 16,
          "rope_parameters": {"full_attention": {"rope_type": "llama3", "factor": 8,
                                                 "original_max_position_embeddings": 4},
                              "sliding_attention": {"rope_type": "default"}}}, 32),
        ({"max_position": 16, "rope_factor": 2.0, "yarn": None}, 32),
        ({"max_position": 16, "yarn": SimpleNamespace(factor=4.0, original_max_position=16)}, 64),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, None),
        ({"max_position_embeddings": 16, "rope_factor": None, "yarn": {}, "rope_scaling": {"type": "yarn"}}, 16),
        ({"max_position_embeddings": True, "rope_scaling": {"type": "linear", "factor": float("inf")}}, None),
    ],
)  # fmt: skip
def test_positions_of_an_extended_context(config, room):
    assert positions(SimpleNamespace(**config)) == room


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([[1, 2]],), ArgumentTypeError, ["input_ids", "list"]),
        ((PROMPT.int(),), ArgumentTypeError, ["input_ids", "int32", "int64"]),
        ((PROMPT.float(),), ArgumentTypeError, ["input_ids", "float32"]),
        ((PROMPT[0],), ArgumentValueError, ["input_ids", "rank 1", "rank 2"]),
        ((PROMPT[:, :0],), ArgumentValueError, ["no tokens"]),
        ((PROMPT - 5,), ArgumentValueError, ["input_ids", "-5"]),
        ((PROMPT, MASK[:, 1:]), ArgumentValueError, ["attention_mask", "[3, 5]", "[3, 6]"]),
        ((PROMPT, MASK.bool()), ArgumentTypeError, ["attention_mask", "bool"]),
        ((PROMPT, MASK * 2), ArgumentValueError, ["attention_mask", "0 and 1"]),
        ((PROMPT, MASK.flip(1)), ArgumentValueError, ["left"]),
        ((PROMPT, MASK * 0), ArgumentValueError, ["row 0"]),
        ((PROMPT, None, -1), ArgumentValueError, ["max_new_tokens", "-1"]),
        ((PROMPT, None, 2.0), ArgumentTypeError, ["max_new_tokens", "float"]),
        ((PROMPT, None, 2, "stop"), ArgumentValueError, ["eos_token_id"]),
        ((PROMPT, None, 2, -4), ArgumentValueError, ["eos_token_id", "-4"]),
        ((PROMPT, None, 2, 2**70), ArgumentValueError, ["eos_token_id", str(2**70), "0 up to 2⁶³ − 1"]),
        ((PROMPT, None, 2, torch.tensor(0.5)), ArgumentValueError, ["eos_token_id", "0.5"]),
        ((PROMPT, None, 2, True), ArgumentValueError, ["eos_token_id", "True"]),
    ],
)
def test_arguments_that_do_not_fit(compiled_lm, arguments, error, words):
    with pytest.raises(error) as caught:
        compiled_lm.generate(*arguments)
    for word in words:
        assert word in str(caught.value)


def test_a_model_without_a_cache_says_so():
    compiled = moec.compile(nn.Linear(2, 2), (torch.zeros(1, 2),), backend="reference")
    assert not compiled.can_generate
    with pytest.raises(CompileError, match=r"cannot generate(.|\n)*empty_cache"):
        compiled.generate(PROMPT)


def test_a_cache_that_does_not_grow_is_refused():
    class Window(TinyLM):
        def forward(self, input_ids, attention_mask=None, past=None):
            logits, cache = super().forward(input_ids, attention_mask, past)
            return logits, {name: t[:, -2:] for name, t in cache.items()}

    with pytest.raises(CompileError, match=r"neither stays as it is nor grows"):
        moec.compile(Window().eval(), backend="reference")


def test_without_example_arguments_there_is_only_generate(tiny_lm):
    compiled = moec.compile(tiny_lm, backend="reference")
    assert compiled.generate(PROMPT, MASK, max_new_tokens=3)[:, 6:].tolist() == rows_alone(tiny_lm, PROMPT, MASK, 3)
    assert [v.name for v in compiled.graph.inputs][:2] == ["input_ids", "attention_mask"]
    with pytest.raises(CompileError, match="without example arguments"):
        compiled(PROMPT)


def test_training_mode_is_left_as_it_was(tiny_lm):
    model = TinyLM()
    model.train()
    moec.compile(model, backend="reference")
    assert all(m.training for m in model.modules())


def test_latent_attention_with_routed_experts():
    config = models.ModelConfig(
        vocab_size=256, hidden_size=32, num_layers=2, num_heads=2, num_experts=4, top_k=2, moe_intermediate_size=16,
        intermediate_size=48, first_k_dense=1, num_shared_experts=1, scoring="sigmoid", norm_topk_prob=True,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, num_kv_heads=0, head_dim=0,
        max_position=64,
    )  # fmt: skip
    model = models.build(config)
    compiled = moec.compile(model, backend="onnxruntime", threads=1)
    past = [v for v in compiled.graph.inputs if v.name.startswith("past")][:2]
    assert [v.shape[-1] for v in past] == [16, 8]  # the latent and the rotated key, not heads
    out = compiled.generate(PROMPT, MASK, max_new_tokens=5)
    assert out[:, 6:].tolist() == rows_alone(model, PROMPT, MASK, 5)


def test_transformers_mixtral(tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64, eos_token_id=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    prompt = PROMPT + 3
    compiled = moec.compile(model, (prompt,), backend="onnxruntime", threads=1)
    result, eager = compiled(input_ids=prompt), model(prompt)
    assert type(result) is type(eager)
    torch.testing.assert_close(result.logits, eager.logits, rtol=1e-4, atol=1e-5)
    keys = [cache.layers[0].keys for cache in (result.past_key_values, eager.past_key_values)]
    torch.testing.assert_close(*keys, rtol=1e-4, atol=1e-5)
    want = model.generate(prompt, attention_mask=MASK, max_new_tokens=6, do_sample=False, pad_token_id=2)
    assert torch.equal(compiled.generate(prompt, MASK, max_new_tokens=6), want)
    compiled.save(tmp_path / "mixtral")
    loaded = moec.load(tmp_path / "mixtral")
    assert torch.equal(loaded.generate(prompt, MASK, max_new_tokens=6), want)
    assert torch.equal(loaded(prompt).past_key_values.layers[0].values, result.past_key_values.layers[0].values)


def test_a_dense_model_of_transformers_generates():
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    want = model.generate(PROMPT + 3, attention_mask=MASK, max_new_tokens=4, do_sample=False, pad_token_id=2)
    compiled = moec.compile(model, backend="reference")
    assert torch.equal(compiled.generate(PROMPT + 3, MASK, max_new_tokens=4), want)
