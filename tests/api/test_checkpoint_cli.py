"""The command line and the tokenizer on checkpoint folders."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import moec
from moec.cli import app
from moec.models import ModelConfig, MoETransformer

WORDS = ["<unk>", "<eos>", *(f"w{i}" for i in range(30))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense model with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("checkpoint")
    config = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 24, "max_position_embeddings": 64}  # fmt: skip
    fields = {"vocab_size": 32, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 24,
              "max_position": 64, "num_kv_heads": 2, "head_dim": 8, "first_k_dense": 1}  # fmt: skip
    model = MoETransformer(ModelConfig(**fields))
    model.init_weights(3)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float32", **config}))
    save_file(model.state_dict(), path / "model.safetensors")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def test_generate_compile_inspect_and_load(folder, tmp_path):
    compiled = moec.compile(folder, backend="reference")
    ids = torch.tensor([compiled.tokenizer.encode("w3 w1 w4").ids])
    assert ids.tolist() == [[5, 3, 6]]
    text = compiled.tokenizer.decode(compiled.generate(ids, max_new_tokens=5)[0].tolist())
    for prompt in (("w3 w1 w4",), ("--prompt", "w3 w1 w4")):
        done = call("generate", folder, *prompt, "--max-new-tokens", 5, "--backend", "reference")
        assert done.exit_code == 0, done.output
        assert done.output.strip() == text
    done = call("compile", folder, "--out", tmp_path / "saved", "--backend", "onnxruntime", "--memory", "fp8")
    assert done.exit_code == 0, done.output
    done = call("generate", tmp_path / "saved", "w3 w1 w4", "--max-new-tokens", 5)
    assert done.output.strip() == text, done.output
    assert moec.load(tmp_path / "saved").tokenizer.encode("w2").ids == [4]
    done = call("inspect", folder, "--no-ir")
    assert done.exit_code == 0, done.output
    assert "linear.linear" in done.output
    assert call("generate", folder, "w1", "--prompt", "w2").exit_code == 2


def test_a_missing_or_damaged_tokenizer_matters_where_it_is_needed(folder, tmp_path):
    for path in folder.glob("*.*"):
        if path.name != "tokenizer.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    compiled = moec.compile(tmp_path, backend="reference")
    assert compiled.generate(torch.tensor([[5, 3]]), max_new_tokens=2).shape == (1, 4)
    with pytest.raises(moec.CompileError, match=r"came without a tokenizer\.json"):
        compiled.tokenizer  # noqa: B018
    done = call("generate", tmp_path, "w1", "--backend", "reference")
    assert isinstance(done.exception, moec.CompileError)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(moec.CompileError, match=r"the tokenizer\.json of .* is damaged"):
        moec.compile(tmp_path, backend="reference").tokenizer  # noqa: B018
