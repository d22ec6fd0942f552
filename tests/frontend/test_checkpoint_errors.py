"""Checkpoints that are wrong, damaged or hostile: one error, which lists everything."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moec
from moec.checkpoints import open_model
from moec.ir import CompileError
from moec.models import ModelConfig, MoETransformer

from .fp8_checkpoints import quantize, write_shards

CONFIG = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 136,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
    "num_nextn_predict_layers": 0,
    "dtype": "float32",
}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3", "activation_scheme": "dynamic"}
ATTENTION, EXPERTS = "model.layers.0.self_attn", "model.layers.1.mlp.experts"


def tensors() -> dict[str, torch.Tensor]:
    """What belongs to CONFIG."""
    from moec.frontend.checkpoints.errors import Problems
    from moec.frontend.checkpoints.hf_config import read_config

    with torch.device("meta"):
        model = MoETransformer(ModelConfig.from_fields(read_config(CONFIG, Problems("it"))[1]))
    r = torch.Generator().manual_seed(0)
    found = {}
    for name, p in model.state_dict().items():
        parts = {name: tuple(p.shape)}
        if ".experts." in name:
            stem, last = name.rsplit(".", 1)
            e, rows, columns = p.shape
            which = {"gate_proj": rows // 2, "up_proj": rows // 2} if last == "gate_up_proj" else {last: rows}
            parts = {f"{stem}.{i}.{m}.weight": (n, columns) for i in range(e) for m, n in which.items()}
        found |= {n: torch.randn(shape, generator=r) * 0.1 for n, shape in parts.items()}
    return found


def write(folder: Path, stored: dict[str, torch.Tensor], config: dict | None = None, shards: int = 3) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    write_shards(stored, folder, shards)
    return folder


def refused(folder: Path, *said: str) -> str:
    """Compiling raises one CompileError that says all of this."""
    with pytest.raises(CompileError) as caught:
        moec.compile(folder, backend="reference")
    text = str(caught.value)
    for part in said:
        assert part in text, text
    return text


def test_it_is_fine_as_it_is(tmp_path):
    opened = open_model(write(tmp_path / "it", tensors()))
    assert opened.weights[f"{EXPERTS}.gate_up_proj"].load().shape == (4, 32, 136)


def test_a_missing_expert_hides_nothing(tmp_path):
    stored = {n: t for n, t in tensors().items() if n != "lm_head.weight" and not n.startswith(f"{EXPERTS}.3.")}
    refused(
        write(tmp_path / "it", stored),
        "lm_head.weight [32, 136] is missing",
        *(f"{EXPERTS}.3.{m}.weight" for m in ("gate_proj", "up_proj", "down_proj")),
    )


def test_all_mismatches_are_listed(tmp_path):
    stored = tensors()
    del stored["lm_head.weight"], stored[f"{EXPERTS}.2.up_proj.weight"]
    stored["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)
    stored[f"{ATTENTION}.o_proj.weight"] = torch.ones(136, 17)
    stored["model.norm.weight"] = torch.ones(136, dtype=torch.int32)
    stored[f"{ATTENTION}.q_proj.weight"] = torch.ones(24, 136).to(torch.float8_e4m3fn)
    text = refused(
        write(tmp_path / "it", stored),
        "has 6 problems",
        "lm_head.weight [32, 136] is missing",
        f"{EXPERTS}.2.up_proj.weight [16, 136] is missing",
        "model.layers.0.self_attn.q_norm.weight f32[8] is not part of this model",
        f"{ATTENTION}.o_proj.weight has the shape [136, 17], the config wants [136, 16]",
        "model.norm.weight is stored in i32, expected f32, f16, bf16 or f8e4m3fn",
        f"{ATTENTION}.q_proj.weight is stored in f8e4m3fn, but config.json has no quantization_config",
    )
    assert text.count("\n") == 6


def test_the_index_and_the_shards_have_to_agree(tmp_path):
    folder = write(tmp_path / "it", tensors())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    places = index["weight_map"]
    shards = sorted(set(places.values()))
    first, last = load_file(folder / shards[0]), load_file(folder / shards[2])
    moved = next(iter(first))
    save_file({**last, moved: first[moved]}, folder / shards[2])  # also in another one
    places["model.ghost.weight"] = shards[0]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / shards[1]).unlink()
    refused(
        folder,
        f"{shards[1]} is missing",
        f"{moved} is in {shards[0]} and in {shards[2]}",
        f"model.ghost.weight is not in {shards[0]}, where model.safetensors.index.json says it is",
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2', supported are llama (LlamaForCausalLM), qwen2"),
        ({"architectures": ["DeepseekV3ForSequenceClassification"]}, "supported for deepseek_v3 is"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', which is not supported (supported: 'silu')"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_scaling": {"type": "longrope", "factor": 4}}, "rope_scaling.rope_type is 'longrope', supported are"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "truncate": False}}, "rope_scaling.truncate is False"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "rope_scaling.factor is '4', expected a number"),
        ({"hidden_size": "136"}, "hidden_size is '136', expected a whole number"),
        ({"vocab_size": None}, "vocab_size is null, expected a whole number"),
        ({"vocab_size": 2**40}, f"vocab_size is {2**40}, expected a whole number of at most 2147483647"),
        ({"hidden_size": 2**31 - 1, "vocab_size": 2**31 - 1, "intermediate_size": 2**31 - 1}, "larger than any memory"),
        ({"num_hidden_layers": 20_000}, "the config has 20000 layers, and no tensor of layer 2 is there"),
        ({"n_routed_experts": 10**9}, "the config has 1000000000 experts, and no tensor of expert 4 is there"),
        ({"dtype": ["float32"]}, "dtype is ['float32'], supported are float32"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000000"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a number"),
        ({"rope_theta": 10**400}, "rope_theta is 1000000"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_scaling.rope_type is ['yarn'], supported are"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "rope_scaling.factor is 1000000"),
        ({"quantization_config": {**FP8, "modules_to_not_convert": 5}}, "modules_to_not_convert is 5, expected a list"),
        ({"quantization_config": {**FP8, "ignored_layers": "head"}}, "ignored_layers is 'head', expected a list"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"logit_softcapping": 30.0}, "logit_softcapping is 30.0, a field that this architecture does not have"),
        ({"num_experts_per_tok": 9}, "top_k is 9, must be at most num_experts 4"),
        ({"dtype": "float8"}, "dtype is 'float8', supported are float32"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method is 'gptq', supported is 'fp8'"),
        ({"quantization_config": {**FP8, "weight_block_size": None}}, "weight_block_size is None, expected two"),
        ({"quantization_config": {**FP8, "activation_scheme": "static"}}, "activation_scheme is 'static'"),
    ],
)
def test_what_a_config_says_is_computed_or_refused(changes, said, tmp_path):
    refused(write(tmp_path / "it", tensors(), {**CONFIG, **changes}), said)


def test_all_that_is_wrong_with_a_config_is_listed(tmp_path):
    changes = {"hidden_act": "relu", "rope_theta": -1, "n_group": 2.5}
    refused(write(tmp_path / "it", tensors(), {**CONFIG, **changes}), "has 3 problems", *changes)


def test_scales_of_fp8_weights(tmp_path):
    stored, names = tensors(), [f"{ATTENTION}.{n}.weight" for n in ("q_proj", "o_proj", "kv_b_proj")]
    names += [f"{EXPERTS}.1.down_proj.weight", f"{EXPERTS}.2.down_proj.weight", "model.layers.0.mlp.up_proj.weight"]
    for name in [*names, *(f"{EXPERTS}.{e}.down_proj.weight" for e in (0, 3))]:
        stored[name], stored[f"{name}_scale_inv"] = quantize(stored[name], False)
    q, o, kv, one, two, up = (f"{n}_scale_inv" for n in names)
    stored[q] = torch.ones(2, 1)
    stored[o] = torch.tensor([[0.5], [0.0]])
    stored[kv] = torch.tensor([[-1.0]])
    stored[one] = torch.tensor([[1.0], [torch.nan]])
    stored[two] = torch.tensor([[1], [1]])
    del stored[up]
    stored["model.layers.0.mlp.down_proj.weight_scale_inv"] = torch.ones(2, 1)
    refused(
        write(tmp_path / "it", stored, {**CONFIG, "quantization_config": FP8}),
        "has 7 problems",
        f"{q} has the shape [2, 1], {names[0]} [24, 136] in blocks of [128, 128] wants [1, 2]",
        f"{o} has 1 scales that are no positive finite numbers, the first is 0.0 in block [1, 0]",
        f"{kv} has 1 scales that are no positive finite numbers, the first is -1.0 in block [0, 0]",
        f"{one} has 1 scales that are no positive finite numbers, the first is nan in block [1, 0]",
        f"{two} is stored in i64, expected f32, bf16 or f8e8m0fnu",
        f"{up} [1, 2] is missing, {names[5]} is stored in FP8",
        "model.layers.0.mlp.down_proj.weight_scale_inv is there, but",
    )


def test_experts_in_both_forms(tmp_path):
    stored = tensors()
    name = f"{EXPERTS}.2.down_proj.weight"
    stored[name], stored[f"{name}_scale_inv"] = quantize(stored[name], False)
    refused(
        write(tmp_path / "it", stored, {**CONFIG, "quantization_config": FP8}),
        "experts: some of the 4 experts are stored in FP8, others are not",
    )


# -- hostile files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "", "config.json"]
)
def test_an_index_that_leads_elsewhere(name, tmp_path):
    folder = write(tmp_path / "it", tensors())
    save_file(tensors(), tmp_path / "out.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {"lm_head.weight": name}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "expected the name of a .safetensors file in the folder")


def test_links_are_not_followed(tmp_path):
    save_file(tensors(), tmp_path / "out.safetensors")
    for make in (os.symlink, os.link):
        folder = tmp_path / make.__name__
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG))
        make(tmp_path / "out.safetensors", folder / "model.safetensors")
        refused(folder, "must be a file, not a link" if make is os.symlink else "is a hard link")
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "config.json").symlink_to(tmp_path / "symlink" / "config.json")
    refused(folder, "config.json must be a file, not a link")
    os.mkfifo(tmp_path / "link" / "x.safetensors")
    os.replace(tmp_path / "link" / "x.safetensors", tmp_path / "link" / "model.safetensors")
    refused(tmp_path / "link", "model.safetensors is no regular file")


def test_a_snapshot_of_the_hubs_cache(tmp_path):
    """Its files are links to blobs of the same repository, and to nothing else."""
    source = write(tmp_path / "it", tensors())
    root = tmp_path / "models--x"
    snapshot = root / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for i, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, root / "blobs" / f"{i:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:040x}")
    assert open_model(snapshot).weights["lm_head.weight"].load().shape == (32, 136)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../it/config.json")
    refused(snapshot, "config.json must be a file, not a link")


def header(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def entry(start: int, end: int) -> dict:
    return {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]}


DAMAGED = {
    "empty": (b"", "less than 8 bytes"),
    "short": (struct.pack("<Q", 900) + b"{}", "truncated"),
    "no JSON": (struct.pack("<Q", 4) + b"\xff\xfe{}", "header"),
    "huge header": (struct.pack("<Q", 1 << 60), "truncated"),
    "truncated data": (header({"a": entry(0, 64)}) + b"\0" * 32, "model.safetensors: "),
    "overlapping": (header({"a": entry(0, 32), "b": entry(16, 48)}) + b"\0" * 48, "model.safetensors: "),
    "negative": (header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}) + b"\0" * 4, "safetensors: "),
    "wrong size": (header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}) + b"\0" * 4, "safetensors: "),
    "enormous": (
        header({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}) + b"\0" * 4,
        "safetensors: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(case, tmp_path):
    data, said = DAMAGED[case]
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(data)
    refused(tmp_path, said)


def test_a_header_of_100_megabytes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 100 << 20))
        file.truncate(8 + (100 << 20))
    refused(tmp_path, f"its header has {100 << 20} bytes, more than {32 << 20}")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.json", "{", "config.json is no JSON"),
        ("config.json", "[]", "config.json holds a list, expected an object"),
        ("config.json", '{"a": 1, "a": 2}', "has the name 'a' twice"),
        ("config.json", '{"time_step_limit": [0.0, Infinity]}', "model_type is None, supported are llama"),
        ("config.json", "[" * 100_000, "config.json is no JSON"),
        ("model.safetensors.index.json", '{"weight_map": [1]}', "weight_map must be an object"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id is 'x', expected a token id"),
    ],
)
def test_damaged_json(name, text, said, tmp_path):
    folder = write(tmp_path / "it", tensors())
    (folder / name).write_text(text)
    refused(folder, said)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_pickles_are_not_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    refused(tmp_path, "pytorch_model.bin is not safetensors: pickle files can run code when they are read")
    assert not Path("ran").exists()


def test_other_folders(tmp_path):
    refused(tmp_path, "config.json is missing")
    refused(tmp_path / "nothing", "is no folder and no .onnx or .gguf file")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    refused(tmp_path, "neither model.safetensors.index.json nor model.safetensors is there")
    graph = moec.parse("graph(%x: f32[2]) -> (%y: f32[2]) {\n  %0: f32[2] = math.silu(%x)\n  return %0\n}\n")
    moec.compile(graph, backend="reference").save(tmp_path / "saved")
    refused(tmp_path / "saved", "is a saved model, which is compiled already", "moec.load reads it")
    with pytest.raises(CompileError, match="checkpoint folder"):
        moec.load(write(tmp_path / "it", tensors()))


def test_a_file_that_changes_later_is_read_as_it_was(tmp_path):
    stored = tensors()
    opened = open_model(write(tmp_path / "it", stored))
    for path in (tmp_path / "it").glob("*.safetensors"):
        path.unlink()
        path.write_bytes(b"something else")
    assert torch.equal(opened.weights["lm_head.weight"].load(), stored["lm_head.weight"])
    assert not re.search("something", repr(opened.weights["lm_head.weight"].load()))
