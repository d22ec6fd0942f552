"""Who runs a model in the CPU figures: ours and its peers, each as a function of ids i64[B, S] that computes
all logits.

Every contender gets the same number of threads. The ONNX Runtime ones share the session options of `session_options`:
the defaults, with spinning on.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cpu_models import MODELS, ids

THREADS = 2
FOLDER = Path(__file__).parent.parent / "build" / "bench-cpu"
Run = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class Contender:
    """`make(model name)` gives ways to run it; of several, the fastest for a row counts."""

    title: str
    make: Callable[[str], dict[str, Run]]


def ours(name: str, **options: Any) -> dict[str, Run]:
    import moec

    compiled = moec.compile(
        MODELS[name](), (ids(2, 16),), dynamic_shapes={"input_ids": {0: "B", 1: "S"}}, backend="onnxruntime",
        threads=THREADS, **options,
    )  # fmt: skip
    return {"moec": lambda x: compiled(x).logits}


def onnx_export(name: str) -> dict[str, Run]:
    """transformers' own export, as it comes, and with its fusions for ONNX Runtime's CPU provider."""
    return {fusions or "plain": _exported(name, fusions) for fusions in (None, "cpu")}


def export_file(name: str, fusions: str | None) -> Path:
    """transformers' ONNX export of a model with dynamic batch and length, made once."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    folder = FOLDER / f"{name}-{fusions or 'plain'}"
    if not (folder / "model.onnx").exists():
        config = OnnxConfig(dynamic=True, ort_fusions=fusions)
        exported = OnnxExporter().export(MODELS[name](), {"input_ids": ids(2, 16)}, config=config)
        folder.mkdir(parents=True, exist_ok=True)
        exported.save_pretrained(folder)
    return folder / "model.onnx"


def _exported(name: str, fusions: str | None) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(export_file(name, fusions)), options)
    (given,) = (v.name for v in session.get_inputs())
    return lambda x: torch.from_numpy(session.run(None, {given: x.numpy()})[0])


def eager(name: str) -> dict[str, Run]:
    """transformers in torch, with each of its implementations of experts."""
    return {kind: _module(_with_experts(MODELS[name](), kind)) for kind in ("eager", "grouped_mm", "batched_mm")}


def compiled_torch(name: str) -> dict[str, Run]:
    """torch.compile of the implementations that it takes without breaks, one program for each shape."""
    runs = {}
    for kind in ("grouped_mm", "batched_mm"):
        model = _with_experts(MODELS[name](), kind)
        model.forward = torch.compile(model.forward, dynamic=False)
        runs[kind] = _module(model)
    return runs


def _with_experts(model: Any, kind: str) -> Any:
    model.set_experts_implementation(kind)
    return model


def _module(model: torch.nn.Module) -> Run:
    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model(x).logits

    return run


def openvino(name: str) -> dict[str, Run]:
    """OpenVINO on transformers' ONNX export and on transformers' OpenVINO export, in f32 for one stream."""
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}

    def of(model: Any) -> Run:
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        return lambda x: torch.from_numpy(next(iter(request.infer([x.numpy()]).values())))

    runs = {"from ONNX": of(core.read_model(export_file(name, None)))}
    try:
        from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

        config = OpenVINOConfig(dynamic=True, stateful=False)
        exported = OpenVINOExporter().export(MODELS[name](), {"input_ids": ids(2, 16)}, config=config)
        runs["own export"] = of(exported.program)
    except Exception as error:  # its exporter is experimental; what it does not take is said, the other way counts
        print(f"openvino: transformers' exporter fails on {name}: {type(error).__name__}: {error}")
    return runs


def llama_cpp(name: str) -> dict[str, Run]:
    """llama.cpp on the model as a GGUF file in f32, where llama-cpp-python is installed."""
    from cpu_llama import Runner, write

    path = FOLDER / f"{name}.gguf"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        write(path, MODELS[name]())
    return {"plain attention": Runner(path, THREADS), "flash attention": Runner(path, THREADS, flash=True)}


CONTENDERS = {
    "onnx-export": Contender("transformers' ONNX export on ONNX Runtime", onnx_export),
    "eager": Contender("torch eager", eager),
    "torch.compile": Contender("torch.compile", compiled_torch),
    "openvino": Contender("OpenVINO", openvino),
    "llama.cpp": Contender("llama.cpp", llama_cpp),
}


def environment() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("torch", "transformers", "onnxruntime", "openvino", "llama-cpp-python", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    cpu = next((s.split(":", 1)[1].strip() for s in _cpuinfo() if s.startswith("model name")), "unknown")
    flags = next((s.split(":", 1)[1].split() for s in _cpuinfo() if s.startswith("flags")), [])
    return {
        "threads": THREADS,
        "cores": os.cpu_count(),
        "cpu": cpu,
        "vector units": [f for f in ("avx2", "avx512f", "avx512_vnni", "amx_tile") if f in flags],
        "spinning": True,
        "huge pages": os.environ.get("GLIBC_TUNABLES", "off"),
        "versions": copy.copy(versions),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
