"""DeepSeek's native block FP8, as the files hold it: 128 × 128 blocks with ragged edges, in three shards."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import moec
from moec.checkpoints import open_model
from moec.ir.weight import BlockScaledSource

from .fp8_checkpoints import write_fp8, write_random
from .hf_checkpoints import CASES, _deepseek_v3, ids, model

# neither the hidden size nor the experts' is a multiple of 128; gate and up of an expert share a block at 160
SIZES = {"hidden_size": 192, "intermediate_size": 288, "moe_intermediate_size": 160, "kv_lora_rank": 136}
WEIGHT_ONLY, W8A8 = "fp8-weight-only", None
SCALES = {"f32": torch.float32, "bf16": torch.bfloat16, "ue8m0": torch.float8_e8m0fnu}


@pytest.fixture(scope="module", params=["f32", "ue8m0"])
def written(request, tmp_path_factory):
    """(transformers' model with dequantised weights, in f32; the folder)"""
    folder = tmp_path_factory.mktemp("fp8") / "it"
    hf = model(_deepseek_v3(**SIZES, q_lora_rank=130))
    return write_fp8(hf, folder, scale_dtype=SCALES[request.param]), folder


@torch.no_grad()
@pytest.mark.parametrize("memory", ["reference", "fast", "fp8"])
def test_weight_only_logits_equal_those_of_the_dequantised_model(written, memory):
    hf, folder = written
    assert len(list(folder.glob("*.safetensors"))) == 3
    backend, memory = ("reference", "fast") if memory == "reference" else ("onnxruntime", memory)
    compiled = moec.compile(folder, (ids(),), backend=backend, quantize=WEIGHT_ONLY, memory=memory, threads=1)
    want = hf(ids()).logits
    assert float((compiled(ids()) - want).abs().max()) < 1e-4 * float(want.abs().max())
    expected = hf.generate(ids(), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(compiled.generate(ids(), max_new_tokens=5, eos_token_id=None), expected)


@torch.no_grad()
def test_in_bfloat16(tmp_path):
    """As DeepSeek's files: everything else in bf16."""
    hf = write_fp8(model(_deepseek_v3(**SIZES), torch.bfloat16), tmp_path / "it")
    compiled = moec.compile(tmp_path / "it", (ids(),), backend="reference", quantize=WEIGHT_ONLY)
    want = hf.float()(ids()).logits
    got, theirs = compiled(ids()), hf.bfloat16()(ids()).logits
    assert got.dtype == torch.bfloat16
    assert float((got - want).abs().max()) < 2**-6 * float(want.abs().max())
    assert float((got.float() - theirs.float()).abs().max()) < 2**-5 * float(want.abs().max())


@torch.no_grad()
def test_activations_are_quantised_as_deepseek_does(written):
    """By default: every stored matrix goes into a product of codes, backends agree on it, and it is near the model."""
    hf, folder = written
    compiled = [
        partial(moec.compile, folder, (ids(),), quantize=W8A8, threads=1)(backend=b, memory=m)
        for b, m in (("reference", "fast"), ("onnxruntime", "fast"), ("onnxruntime", "fp8"))
    ]
    ops = compiled[0].graph.count_ops()
    assert ops["quant.scaled_experts"] == 1
    # a dense layer and a layer of experts: 5 of attention each, 3 of an MLP each
    assert ops["quant.scaled_linear"] == 16
    want = hf(ids()).logits
    for c in compiled:
        assert float((c(ids()) - want).pow(2).mean().sqrt()) < 0.3 * float(want.std())
    first = compiled[0](ids())
    for c in compiled[1:]:
        assert float((c(ids()) - first).pow(2).mean().sqrt()) < 0.05 * float(want.std())


def test_codes_and_scales_are_those_of_the_files(written):
    _, folder = written
    stored = {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}
    graph = moec.compile(folder, (ids(),), backend="reference").graph
    found = {}
    for node in graph.nodes:
        if node.op == "quant.scaled_linear":
            for part, suffix in (("weight", ""), ("weight_scale", "_scale_inv")):
                weight = node.operand(part).weight
                name = weight.name.rsplit(".", 1)[0] + suffix
                found[name] = weight.load()
    assert len(found) == 32
    for name, tensor in found.items():
        want = stored[name]
        assert torch.equal(tensor.float(), want.float()), name
    experts = graph.find("moe.experts") + graph.find("quant.scaled_experts")
    gate_up = experts[0].operand("gate_up").weight.load().view(torch.uint8)
    for e in range(8):
        parts = [stored[f"model.layers.1.mlp.experts.{e}.{m}_proj.weight"] for m in ("gate", "up")]
        assert torch.equal(gate_up[e], torch.cat([p.view(torch.uint8) for p in parts]))


@torch.no_grad()
def test_modules_that_are_not_converted_stay(tmp_path):
    keep = ("model.layers.0.mlp",)
    hf = write_fp8(model(_deepseek_v3(**SIZES)), tmp_path / "it", keep=keep)
    opened = open_model(tmp_path / "it")
    for name, weight in opened.weights.items():
        in_fp8 = isinstance(weight.source, BlockScaledSource)
        assert in_fp8 == (("proj" in name) and not name.startswith(keep)), name
    compiled = moec.compile(tmp_path / "it", (ids(),), backend="reference", quantize=WEIGHT_ONLY)
    left = [n for n, v in compiled.graph.weights.items() if str(v.dtype) == "f32" and n.startswith(keep)]
    assert len(left) == 3
    want = hf(ids()).logits
    assert float((compiled(ids()) - want).abs().max()) < 1e-4 * float(want.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "qwen2"])
def test_other_architectures_in_the_same_format(name, tmp_path):
    hf = write_fp8(model(CASES[name]()), tmp_path / "it", scale_dtype=SCALES["f32"])
    compiled = moec.compile(tmp_path / "it", (ids(),), backend="reference", quantize=WEIGHT_ONLY)
    want = hf(ids()).logits
    assert float((compiled(ids()) - want).abs().max()) < 1e-4 * float(want.abs().max())


def test_saved_and_loaded_with_little_memory(written, tmp_path):
    _, folder = written
    compiled = moec.compile(folder, (ids(),), backend="onnxruntime", memory="fp8", threads=1)
    compiled.save(tmp_path / "saved")
    loaded = moec.load(tmp_path / "saved")
    assert torch.equal(loaded(ids()), compiled(ids()))
    figures = loaded.report.to_dict()["programs"]["forward"]["backend"]["memory"]
    assert figures["mode"] == "fp8"
    assert figures["weight_bytes_resident"]["fp8"] < 0.4 * figures["weight_bytes_resident"]["fast"]


def test_memory_is_one_of_two():
    with pytest.raises(moec.ArgumentValueError, match="memory='small' is none of fast, fp8"):
        moec.compile(moec.parse("graph(%x: f32[2]) -> (%x: f32[2]) {\n  return %x\n}\n"), memory="small")


MEASURE = """
import ctypes, gc, json, sys
import torch
import moec

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator holds back for later is no weight
    rows = open("/proc/self/smaps_rollup").read().splitlines()
    return next(int(r.split()[1]) * 1024 for r in rows if r.startswith("Pss:"))

folder, backend, memory, quantize = sys.argv[1:]
quantize = quantize if quantize != "None" else None
ids = torch.arange(8).reshape(1, 8)
small = moec.compile(sys.argv[1] + "-small", (ids,), backend=backend, memory=memory, quantize=quantize, threads=1)
small(ids)
before = resident()
compiled = moec.compile(folder, (ids,), backend=backend, memory=memory, quantize=quantize, threads=1)
compiled(ids)
compiled(ids)
print(json.dumps(resident() - before))
"""


LARGE = {"hidden_size": 1024, "intermediate_size": 2048, "moe_intermediate_size": 768, "n_routed_experts": 16,
         "num_hidden_layers": 6}  # fmt: skip
# backend, memory, most bytes resident for each byte of the files; in f32, E4M3 takes four times its bytes
RESIDENT = [("reference", "fast", 1.1), ("onnxruntime", "fp8", 1.3), ("onnxruntime", "fast", 1.1 * 4)]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """(a folder of some 190 MB, its bytes); the same in small, to warm up on, is beside it."""
    folder = tmp_path_factory.mktemp("large") / "it"
    write_random(folder.with_name("it-small"))
    return folder, write_random(folder, **LARGE)


@pytest.mark.large
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("backend", "memory", "most"), RESIDENT)
def test_bytes_resident(large, backend, memory, most):
    """Proportional set size after two runs against that before compiling, in a process of its own; program, activations
    and all else is in it."""
    folder, size = large
    command = [sys.executable, "-c", MEASURE, str(folder), backend, memory, "None"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) <= most * size, f"{json.loads(done.stdout) / size:.3f} of the files"
