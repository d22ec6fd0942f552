"""Where the weights of a session are: in memory of its own, or in the mapped file alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import moec
from moec.backends import get_backend
from moec.backends.onnxruntime import memory
from moec.backends.onnxruntime.lower import lower
from moec.backends.onnxruntime.options import Options
from moec.ir import Graph
from moec.ir.fp8 import quantize_exactly
from moec.ir.weight import SafetensorsSource, Weight

from .conftest import agrees, compiled, graph_of, typed, weight

WIDTH, LAYERS = 1024, 12  # 48 MiB: beyond what is handed over in memory
SIZE = LAYERS * WIDTH * WIDTH * 4


def chain(file: Path, gated: bool = False) -> Graph:
    """Products whose weights lie in a safetensors file; `gated`: two of an input each, which tuning merges."""
    kind = typed("f32", WIDTH, WIDTH)

    def build(b: Any, x: Any) -> Any:
        def product(i: int) -> Any:
            return b.linear(x, b.graph.add_weight(Weight(f"w{i}", kind, SafetensorsSource(file, f"w{i}"))))

        if gated:
            for i in range(0, LAYERS, 2):
                x = b.swiglu(product(i), product(i + 1))
        else:
            for i in range(LAYERS):
                x = product(i)
        return x

    return graph_of({"x": typed("f32", "T", WIDTH)}, build)


MEASURE = """
import json, sys
from pathlib import Path
import torch, moec
from tests.backends.onnxruntime.test_memory import WIDTH, chain
how, memory, folder, cache = sys.argv[1:5]

def anonymous():
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss_Anon:"))

def start():
    if how == "load":
        return moec.load(Path(folder) / memory, threads=1, cache=cache or None)
    graph = chain(Path(folder) / "weights.safetensors", how == "gated")
    return moec.compile(graph, backend="onnxruntime", threads=1, memory=memory, cache=cache or None)

x = torch.ones(2, WIDTH)
tiny = moec.parse("graph(%x: f32[T, 4]) -> (%y: f32[T, 4]) {\\n  %0: f32[T, 4] = math.silu(%x)\\n  return %0\\n}")
moec.compile(tiny, backend="onnxruntime", threads=1)(torch.ones(2, 4))
before = anonymous()
compiled = start()
(y,) = compiled(x)
used = anonymous() - before
if how == "save":
    compiled.save(Path(folder) / memory)
print(json.dumps([used, float(y.abs().sum()), compiled.report.notes()]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large")
    g = torch.Generator().manual_seed(0)
    weights = {f"w{i}": torch.randn(WIDTH, WIDTH, generator=g) / WIDTH**0.5 for i in range(LAYERS)}
    save_file(weights, path / "weights.safetensors")
    for kind in ("fast", "mapped"):
        used(path, "save", kind)
    return path


def used(folder: Path, how: str, kind: str, cache: str = "") -> tuple[float, float, list[str]]:
    """Anonymous memory that a program takes in a process of its own, as a part of its weights; what it computes."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", MEASURE, how, kind, str(folder), cache]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    bytes_, value, notes = json.loads(done.stdout)
    return bytes_ / SIZE, value, notes


linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells how much memory is whose")


@linux
@pytest.mark.parametrize("how", ["compile", "load", "gated"])
def test_mapped_weights_are_not_copied(folder: Path, how: str):
    fast, mapped = used(folder, how, "fast"), used(folder, how, "mapped")
    assert 0.9 < fast[0] < 1.3, "the measurement sees a copy"
    assert mapped[0] < 0.15
    assert mapped[1] == pytest.approx(fast[1], rel=1e-4)


@linux
def test_a_cached_session_maps_its_layouts(folder: Path, tmp_path: Path):
    first = used(folder, "compile", "fast", str(tmp_path))  # it opens what it has just written
    again = used(folder, "compile", "fast", str(tmp_path))
    loaded = used(folder, "load", "fast", str(tmp_path))
    for got, result in ((first, "miss"), (again, "hit"), (loaded, "hit")):
        assert f"cache {result}" in got[2][0]
        assert got[0] < (0.6 if result == "miss" else 0.15)
        assert got[1] == first[1]


@pytest.mark.parametrize("shape", [(96, 256), (100, 300)])
def test_fp8_weights_are_widened_when_the_model_is_written(shape: tuple[int, int], rng: torch.Generator):
    """Ragged blocks too; the values are those that folding at load gives."""
    codes, scale = quantize_exactly(torch.randn(*shape, generator=rng), (128, 128))

    def build(b: Any, x: Any) -> Any:
        stored = [weight(b, "codes", codes.view(torch.float8_e4m3fn)), weight(b, "scale", scale)]
        return b.op("linear.linear", [x, b.op("quant.dequantize", stored, {"block": (128, 128)})])

    graph = graph_of({"x": typed("f32", "T", shape[1])}, build)
    x = torch.randn(5, shape[1], generator=rng)
    agrees(compiled(graph, memory="mapped"), [x])
    kinds = {
        kind: {n.op_type for n in lower(graph, Options(memory=kind), get_backend("onnxruntime")).model.graph}
        for kind in ("fast", "mapped")
    }
    assert "DequantizeLinear" in kinds["fast"]
    assert "DequantizeLinear" not in kinds["mapped"]


def small(rng: torch.Generator) -> Graph:
    w = torch.randn(64, 32, generator=rng)
    return graph_of({"x": typed("f32", "T", 32)}, lambda b, x: b.op("linear.linear", [x, weight(b, "w", w)]))


def test_what_does_not_fit_is_mapped_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator):
    monkeypatch.setattr(memory, "available_memory", lambda: 64 * 32 * 4 + 1)
    model = moec.compile(small(rng), backend="onnxruntime", threads=1)
    stats = model.report.to_dict()["programs"]["forward"]["backend"]["memory"]
    assert stats["mode"] == "mapped"
    assert any("do not fit into the" in note for note in model.report.notes())
    monkeypatch.setattr(memory, "available_memory", lambda: 64 * 32 * 4 * 2)
    assert moec.compile(small(rng), backend="onnxruntime").report.notes() == []


@pytest.mark.parametrize("asked", ["fp8", "mapped"])
def test_what_was_asked_for_stays(asked: str, monkeypatch: pytest.MonkeyPatch, rng: torch.Generator):
    monkeypatch.setattr(memory, "available_memory", lambda: 0)
    assert compiled(small(rng), memory=asked).stats["memory"]["mode"] == asked


def test_a_saved_model_stays_as_it_was_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: torch.Generator):
    graph = small(rng)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_memory", lambda: 0)
        compiled(graph).save(tmp_path)
    loaded = get_backend("onnxruntime").load(graph, tmp_path)
    assert loaded.stats["memory"]["mode"] == "mapped"


def test_available_memory():
    found = memory.available_memory()
    assert found is None or 1 << 20 < found < 1 << 50


@pytest.mark.parametrize(
    ("limit", "stat", "want"),
    [("max", "anon 5\n", None), ("1000", "file 7\nanon 300\n", 700), ("10", "anon 300\n", 0), ("x", "", None)],
)
def test_limits_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, stat: str, want: int | None
):
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.stat").write_text(stat)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory._of_group() == want
