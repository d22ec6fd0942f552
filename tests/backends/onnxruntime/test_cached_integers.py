"""Integer weights in cached and in mapped sessions: the same outputs, and an entry for each format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from moec.backends import get_backend
from moec.ir import Graph, run
from moec.ir.weight import PackedSource, Weight

from .conftest import agrees
from .test_cache import compiled, said
from .test_integers import INTEGERS, experts_graph, linear_graph

MEMORY = ["fast", "fp8", "mapped"]


def graph_of_kind(kind: str, dtype: str) -> Graph:
    """Products that take codes as they are, a linear layer whose blocks they do not take, experts."""
    rng = torch.Generator().manual_seed(0)
    match kind:
        case "linear":
            return linear_graph(64, 256, dtype, (1, 32), rng, bias=True)
        case "odd blocks":
            return linear_graph(8, 60, dtype, (1, 24), rng)
    return experts_graph(dtype, rng, biases=2)


def inputs_of(graph: Graph) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(5, int(str(v.shape[1])), generator=rng) for v in graph.inputs]


CASES: list[tuple[str, dict[str, Any]]] = [
    *(("linear", {"memory": m}) for m in MEMORY),
    *(("linear", {"memory": m, "portable": True}) for m in MEMORY),
    *(("odd blocks", {"memory": m}) for m in MEMORY),
    *(("experts", {"memory": m}) for m in MEMORY),
    *(("experts", {"memory": m, "portable": True}) for m in MEMORY),
    *(("experts", {"memory": m, "experts": "unrolled"}) for m in MEMORY),
    *(("experts", {"memory": m, "experts": "loop"}) for m in ("fast", "mapped")),  # it takes all experts in f32
]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_the_second_session_is_bit_equal(tmp_path: Path, kind: str, options: dict[str, Any], dtype: str):
    graph = graph_of_kind(kind, dtype)
    inputs = inputs_of(graph)
    (plain,) = compiled(graph, None, **options).run(inputs)
    for result in ("miss", "hit"):
        executable = compiled(graph_of_kind(kind, dtype), tmp_path, **options)
        assert said(executable)["result"] == result
        assert "warning" not in said(executable)
        assert torch.equal(executable.run(inputs)[0], plain)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("kind", ["linear", "odd blocks", "experts"])
def test_mapped_sessions_round_no_activations(kind: str, dtype: str):
    """Products that lay nothing out widen the codes instead: they are as exact as f32."""
    graph = graph_of_kind(kind, dtype)
    inputs = inputs_of(graph)
    agrees(compiled(graph, None, memory="mapped"), inputs)
    if kind != "odd blocks":
        (got,), (want,) = compiled(graph, None, memory="fast").run(inputs), run(graph, inputs)
        assert float((got - want).norm() / want.norm()) > 1e-3, "the comparison sees rows that are rounded"


def trained() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.SiLU(), torch.nn.Linear(128, 64)).eval()


def test_every_format_has_an_entry_of_its_own(tmp_path: Path):
    args = (torch.randn(3, 64),)
    formats = [None, "fp8-weight-only", "int8", "int4", moec.Quantization("i4", None, block=(1, 64))]
    keys = []
    for wanted in ("cache miss", "cache hit"):
        for quantize in formats:
            made = moec.compile(trained(), args, backend="onnxruntime", quantize=quantize, cache=tmp_path)
            assert any(wanted in note for note in made.report.notes())
            keys.append(made.report.to_dict()["programs"]["forward"]["backend"]["cache"]["key"])
    assert len(set(keys)) == len(formats)
    assert keys[: len(formats)] == keys[len(formats) :]
    assert {p.name for p in tmp_path.iterdir()} == set(keys)


@pytest.mark.parametrize("name", ["c", "scale"])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_one_code_or_scale_counts(tmp_path: Path, dtype: str, name: str):
    compiled(graph_of_kind("linear", dtype), tmp_path)
    graph = graph_of_kind("linear", dtype)
    stored = graph.weights[name].weight
    assert stored is not None
    data = stored.load()
    raw = data.view(torch.int8 if name == "c" else torch.int32).clone()
    raw[3, 5] ^= 1
    graph.bind_weights({name: raw.view(data.dtype)})
    assert said(compiled(graph, tmp_path))["result"] == "miss"


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_saved_models_share_entries(tmp_path: Path, quantize: str, memory: str):
    """4-bit codes are packed in the file: their digest is that of the codes, which nothing has to unpack for it."""
    x, cache = torch.linspace(-1, 1, 192).reshape(3, 64), tmp_path / "cache"
    first = moec.compile(trained(), (x,), backend="onnxruntime", quantize=quantize, memory=memory, cache=cache)
    first.save(tmp_path / "saved")
    loaded = moec.load(tmp_path / "saved", cache=cache)
    assert any("cache hit" in note for note in loaded.report.notes())
    assert len(list(cache.iterdir())) == 1
    assert loaded.report.to_dict()["programs"]["forward"]["backend"]["memory"]["mode"] == memory
    assert torch.equal(loaded(x), first(x))
    assert torch.equal(moec.load(tmp_path / "saved")(x), first(x))


def test_digests_of_packed_weights_are_those_of_the_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(3, 64)
    moec.compile(trained(), (x,), backend="onnxruntime", quantize="int4", cache=tmp_path / "cache").save(
        tmp_path / "saved"
    )
    read: list[Weight] = []
    real = Weight.load

    def load(weight: Weight) -> torch.Tensor:
        read.append(weight)
        return real(weight)

    monkeypatch.setattr(Weight, "load", load)
    loaded = moec.load(tmp_path / "saved", cache=tmp_path / "cache")
    assert any("cache hit" in note for note in loaded.report.notes())
    packed = [v.weight for v in loaded.graph.weights.values() if isinstance(v.weight and v.weight.source, PackedSource)]
    assert packed
    assert not {id(w) for w in packed} & {id(w) for w in read}


@pytest.mark.parametrize("dtype", INTEGERS)
def test_what_does_not_fit_is_counted_as_integers(dtype: str, monkeypatch: pytest.MonkeyPatch):
    graph = graph_of_kind("linear", dtype)
    most = get_backend("onnxruntime").compile(graph).stats["memory"]["weight_bytes_resident"]["fast"]
    assert most < 64 * 256 * 4 / 3
    for available, mode in ((2 * most, "fast"), (most, "mapped")):
        monkeypatch.setattr("moec.backends.onnxruntime.memory.available_memory", lambda n=available: n)
        assert compiled(graph, None).stats["memory"]["mode"] == mode
