"""GGUF files, written by the gguf package as llama.cpp's converter lays them out."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moec
from moec.checkpoints import open_model
from moec.frontend.checkpoints.gguf import gguf_name
from moec.ir import CompileError

from .hf_checkpoints import _llama, _qwen2, _qwen3_moe, ids, model

gguf = pytest.importorskip("gguf")
Kind = gguf.GGMLQuantizationType
CASES = {
    "llama": lambda: _llama(),
    "qwen2": lambda: _qwen2(tie_word_embeddings=True),
    "qwen3moe": lambda: _qwen3_moe(norm_topk_prob=True),
}


def permuted(t: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of Llama's queries and keys, pairs that are rotated together side by side."""
    return t.reshape(heads, 2, t.shape[0] // heads // 2, *t.shape[1:]).swapaxes(1, 2).reshape(t.shape)


def write(path: Path, hf: Any, architecture: str, kind: Any = Kind.F32, **fields: Any) -> Path:
    """A file of transformers' model; matrices are stored as `kind`."""
    c = hf.config
    w = gguf.GGUFWriter(path, architecture)
    w.add_name("it is it")
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(c.rope_parameters["rope_theta"])
    w.add_eos_token_id(2)
    w.add_token_list([f"t{i}" for i in range(c.vocab_size)])
    if architecture == "qwen3moe":
        w.add_key_length(c.head_dim)
        w.add_value_length(c.head_dim)
        w.add_expert_count(c.num_experts)
        w.add_expert_used_count(c.num_experts_per_tok)
        w.add_expert_feed_forward_length(c.moe_intermediate_size)
    for name, value in fields.items():
        w.add_string(f"{architecture}.{name}", value)
    for name, t in hf.state_dict().items():
        t = t.float()
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        stored = {gguf_name(name) if ".experts." not in name else "": t}
        if ".experts." in name:
            layer = name.split(".")[2]
            parts = dict(zip(("gate", "up"), t.chunk(2, 1), strict=True)) if "gate_up" in name else {"down": t}
            stored = {f"blk.{layer}.ffn_{p}_exps.weight": x for p, x in parts.items()}
        for key, x in stored.items():
            if architecture == "llama" and (".attn_q." in key or ".attn_k." in key):
                x = permuted(x, c.num_attention_heads if ".attn_q." in key else c.num_key_value_heads)
            data = x.contiguous().numpy()
            if x.ndim > 1 and "ffn_gate_inp" not in key and kind != Kind.F32:
                w.add_tensor(key, gguf.quantize(data, kind), raw_dtype=kind)
            else:
                w.add_tensor(key, data)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["reference", "onnxruntime"])
def test_logits_and_text_equal_those_of_transformers(name, backend, tmp_path):
    hf = model(CASES[name]())
    path = write(tmp_path / "it.gguf", hf, name)
    compiled = moec.compile(path, (ids(),), backend=backend, threads=1)
    want = hf(ids()).logits
    assert float((compiled(ids()) - want).abs().max()) < 1e-4 * float(want.abs().max())
    expected = hf.generate(ids(), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(compiled.generate(ids(), max_new_tokens=5, eos_token_id=None), expected)
    assert compiled.generator.stops.eos == (2,)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_stored_types(name, kind, tmp_path):
    """Every matrix is what the package's own dequantisation gives, each expert by itself."""
    hf = model(CASES[name]())
    opened = open_model(write(tmp_path / "it.gguf", hf, name, getattr(Kind, kind)))
    reader = {t.name: t for t in gguf.GGUFReader(tmp_path / "it.gguf").tensors}
    for ours, weight in opened.weights.items():
        if ".experts." in ours or ours.endswith(("inv_freq", "lm_head.weight")):
            continue
        t = reader[gguf_name(ours)]
        want = torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).astype(np.float32)).reshape(weight.type.shape)
        assert torch.equal(weight.load().float(), want.to(weight.type.dtype.torch).float()), ours
    assert str(opened.weights["model.embed_tokens.weight"].type.dtype) == {"F16": "f16", "BF16": "bf16"}.get(
        kind, "f32"
    )
    if name == "qwen3moe":
        weight = opened.weights["model.layers.1.mlp.experts.gate_up_proj"]
        parts = [reader[f"blk.1.ffn_{p}_exps.weight"] for p in ("gate", "up")]
        want = torch.cat([torch.from_numpy(gguf.dequantize(t.data, t.tensor_type)).float() for t in parts], 1)
        assert torch.equal(weight.load().float(), want)
        assert torch.equal(weight.part(3).float(), want[3])
    compiled = moec.compile(tmp_path / "it.gguf", (ids(),), backend="reference")
    original = hf(ids()).logits
    spread = {"F16": 0.01, "BF16": 0.05, "Q8_0": 0.1, "Q4_0": 1.2}[kind]
    assert float((compiled(ids()).float() - original).pow(2).mean().sqrt()) < spread * float(original.std())


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_k_quants(kind, tmp_path):
    """Blocks of 256 with scales of their own; the package has no quantiser for them: any bytes are numbers."""
    kind = getattr(Kind, kind)
    hf = model(_llama(hidden_size=256, intermediate_size=256))
    path = write(tmp_path / "it.gguf", hf, "llama")
    _, size = gguf.GGML_QUANT_SIZES[kind]
    r = np.random.default_rng(0)
    raw = r.integers(0, 256, (256, size), dtype=np.uint8)
    raw[:, -2:] = raw[:, :4].view(np.uint8)[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    raw[:, 2:4] = np.frombuffer(np.float16(0.02).tobytes(), np.uint8)
    reader = gguf.GGUFReader(path)
    w = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    for field in reader.fields.values():
        if field.name.startswith("llama."):
            w.add_key_value(field.name, field.contents(), field.types[0])
    for t in reader.tensors:
        changed = t.name == "blk.0.ffn_up.weight"
        w.add_tensor(t.name, raw if changed else t.data, raw_dtype=kind if changed else None)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    got = open_model(tmp_path / "k.gguf").weights["model.layers.0.mlp.up_proj.weight"].load()
    assert torch.equal(got, torch.from_numpy(gguf.dequantize(raw, kind)))
    assert got.shape == (256, 256)


def refused(path: Path, said: str) -> None:
    with pytest.raises(CompileError) as caught:
        moec.compile(path, backend="reference")
    assert said in str(caught.value), caught.value


def test_what_is_not_computed_is_refused(tmp_path):
    hf = model(_llama())
    for architecture, fields, said in (
        ("phi3", {}, "general.architecture is 'phi3', supported are llama, qwen2, qwen3moe"),
        ("llama", {"rope.scaling.type": "longrope"}, "llama.rope.scaling.type is 'longrope', supported are none"),
        ("llama", {"attention.causal": "no"}, "llama.attention.causal is 'no', a field that is not supported"),
        ("qwen2", {"expert_count": "4"}, "qwen2.expert_count is '4', which is not supported"),
    ):
        (tmp_path / "it.gguf").unlink(missing_ok=True)
        refused(write(tmp_path / "it.gguf", hf, architecture, **fields), said)


def test_damaged_files(tmp_path):
    data = write(tmp_path / "it.gguf", model(_llama()), "llama").read_bytes()
    path = tmp_path / "bad.gguf"
    for text, said in (
        (b"", "less than 24 bytes"),
        (b"\0" * 64, "does not begin with GGUF"),
        (data[:4] + struct.pack("<I", 9) + data[8:], "its version is 9"),
        (data[:16] + struct.pack("<Q", 1 << 60) + data[24:], "no GGUF file, or damaged"),
        (data[:8] + struct.pack("<Q", 1 << 60) + data[16:], "no GGUF file, or damaged"),
        (data[:24] + struct.pack("<Q", 1 << 62) + data[32:], "which the file does not have"),
        (data[:400], "which the file does not have"),
        (data[:-64], "damaged"),
        (data.replace(b"general.name", b"general.nam\xff"), "damaged"),
        (data.replace(b"it is it", b"\xff\xfe is it"), "general.name cannot be read: 'utf-8' codec"),
        (
            data.replace(b"llama.attention.layer_norm_rms_epsilon", b"llama.attention.layer_norm_rms_epsilom"),
            "llama.attention.layer_norm_rms_epsilon is None, expected a number",
        ),
    ):
        path.write_bytes(text)
        refused(path, said)
    path.unlink()
    path.symlink_to(tmp_path / "it.gguf")
    refused(path, "must be a file, not a link")
    refused(tmp_path / "none.gguf", "none.gguf is missing")
