"""Weights that tuning passes merged or reordered: found in the cache by what they are made of, held no more than once,
and stored integers left as they are."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from moec.backends import get_backend
from moec.backends.onnxruntime import cache_key
from moec.backends.onnxruntime.lower import lower
from moec.backends.onnxruntime.options import Options
from moec.ir import Graph, parse
from moec.ir.weight import ComputedSource, Weight, joined_rows, ordered_rows
from moec.models import build, config
from moec.passes.pipeline import default_pipeline
from moec.program import Settings, legalise

from .conftest import graph_of, typed

MEMORY = ["fast", "fp8", "mapped"]
IDS = torch.arange(24).reshape(2, 12) % 50


@functools.cache
def model() -> torch.nn.Module:
    """Two layers of latent attention with a rotation that reorders its rows, one of them with a dense MLP."""
    small = dataclasses.replace(config("deepseek-v3-mini"), num_layers=2)
    return build(small)


@functools.cache
def graph() -> Graph:
    return moec.trace(model(), (IDS,), dynamic_shapes="auto")


def compiled(what: Any = None, **options: Any) -> moec.CompiledModel:
    """The graph, or a model with what it generates with."""
    if what is None:
        return moec.compile(graph(), backend="onnxruntime", threads=1, **options)
    return moec.compile(what, (IDS,), backend="onnxruntime", dynamic_shapes="auto", threads=1, **options)


def computed(graph: Graph) -> dict[str, ComputedSource]:
    """The weights of a graph that tuning made."""
    found = {n: v.weight.source for n, v in graph.weights.items() if v.weight is not None}
    return {n: s for n, s in found.items() if isinstance(s, ComputedSource) and s.of}


@pytest.mark.parametrize("memory", MEMORY)
def test_a_saved_model_is_found_without_reading_its_weights(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
):
    cache, generates = tmp_path / "cache", memory == "fast"
    first = compiled(model() if generates else None, memory=memory, cache=cache)
    made = computed(first.program.legal)
    assert any("+" in n for n in made), "something was merged"
    assert any(n.endswith(".deinterleaved") for n in made), "something was reordered"
    assert all(s._value is None for s in made.values()), "no merged weight is held beside the session's"
    first.save(tmp_path / "saved")
    kept = set(cache.iterdir())
    read: list[str] = []
    real = Weight.load

    def load(weight: Weight) -> torch.Tensor:
        read.append(weight.name)
        return real(weight)

    monkeypatch.setattr(Weight, "load", load)
    loaded = moec.load(tmp_path / "saved", cache=cache)
    programs = loaded.report.to_dict()["programs"]
    assert ("cached" in programs) == generates
    assert {p["backend"]["cache"]["result"] for p in programs.values()} == {"hit"}
    assert {n.rpartition(".")[2] for n in read} <= {"e_score_correction_bias"}, "a router looks at its biases"
    assert set(cache.iterdir()) == kept
    assert all(map(torch.equal, loaded(IDS), first(IDS)))
    assert all(map(torch.equal, moec.load(tmp_path / "saved")(IDS), first(IDS)))
    held = programs["forward"]["backend"]["memory"]
    assert held["mode"] == memory
    assert held["weight_bytes_resident"]["mapped"] == 0


def test_with_and_without_tuning_share_no_entry(tmp_path: Path):
    settings = Settings(get_backend("onnxruntime"), default_pipeline())
    after, _ = settings.pipeline.run(graph())
    keys = set()
    for count in (0, 1, None):
        legal, records, _ = legalise(after, dataclasses.replace(settings, tuning=count))
        assert len(records) == 1 + len(dataclasses.replace(settings, tuning=count).tuning_passes)
        keys.add(cache_key.content_key(lower(legal, Options(), settings.backend), Options()))
    assert len(keys) == 3


def key(*sources: ComputedSource) -> str:
    """The key of products with weights of one name each."""

    def products(b: Any, x: Any) -> Any:
        held = (Weight(f"w{i}", typed("f32", 6, 4), s) for i, s in enumerate(sources))
        return tuple(b.linear(x, b.graph.add_weight(w)) for w in held)

    lowered = lower(graph_of({"x": typed("f32", "T", 4)}, products), Options(), get_backend("onnxruntime"))
    return cache_key.content_key(lowered, Options())


def test_what_is_made_of_which_weights_counts(rng: torch.Generator):
    a, b, c = (Weight.of(n, torch.randn(2, 4, generator=rng)) for n in "abc")
    whole = Weight.of("whole", torch.cat([a.load(), b.load(), c.load()]))
    order = torch.tensor([0, 2, 4, 1, 3, 5])
    again = joined_rows([Weight("a", a.type, a.source, a.with_digest().digest), b, c])  # its digest is known
    nested = ordered_rows(Weight("m", whole.type, joined_rows([a, b, c])), order)
    assert key(again) == key(joined_rows([a, b, c]))
    different = [
        joined_rows([a, b, c]),
        joined_rows([a, c, b]),
        joined_rows([a, b, a]),
        ordered_rows(whole, order),
        ordered_rows(whole, order.flip(0)),
        nested,
        ComputedSource(lambda: whole.load()),
    ]
    assert len({key(s) for s in different}) == len(different)
    torch.testing.assert_close(nested.load(), whole.load()[order], rtol=0, atol=0)
    data = b.load().clone()
    data[1, 2] += 1
    assert key(joined_rows([a, Weight.of("b", data), c])) != key(again)


ATTENTION = """graph(%q: f32[B, 4, S, 8], %k: f32[B, 4, T, 8], %x: f32[N, 8])
  -> (%y: f32[B, 4, S, 8], %z: f32[N, 512]) {
  weight @w: f32[512, 8]
  %0: f32[B, 4, S, 8] = attention.sdpa(%q, %k, %k, _, _) {scale=0.5}
  %1: f32[N, 512] = linear.linear(%x, @w, _)
  return %0, %1
}"""


@pytest.mark.parametrize("memory", ["fast", "mapped"])
def test_a_session_for_empty_axes_has_an_entry_of_its_own(tmp_path: Path, memory: str, rng: torch.Generator):
    graph = parse(ATTENTION)
    graph.bind_weights({"w": torch.randn(512, 8, generator=rng)})
    given = {t: [torch.randn(2, 4, 3, 8), torch.randn(2, 4, t, 8), torch.randn(3, 8)] for t in (5, 0)}
    backend = get_backend("onnxruntime")
    plain = backend.compile(graph, threads=1, options={"memory": memory})
    for known in (0, 2):  # entries, before
        assert len(list(tmp_path.iterdir())) == known
        exe = backend.compile(graph, threads=1, options={"memory": memory, "cache": tmp_path})
        for t in (5, 0, 5):
            assert all(map(torch.equal, exe.run(given[t]), plain.run(given[t])))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", MEMORY)
def test_tuned_weights_take_as_many_bytes(memory: str, dtype: torch.dtype):
    """In every way of holding them: nothing is there twice."""
    backend = get_backend("onnxruntime")
    settings = Settings(backend, default_pipeline())
    graph = moec.trace(build(dataclasses.replace(config("deepseek-v3-mini"), num_layers=2)).to(dtype), (IDS,))
    after, _ = settings.pipeline.run(graph)
    found = []
    for count in (0, None):
        legal, _, _ = legalise(after, dataclasses.replace(settings, tuning=count))
        assert bool(computed(legal)) == (count is None)
        found.append(lower(legal, Options(memory=memory), backend).resident)
    plain, tuned = found
    assert tuned == plain
    assert plain["fp8"] < plain["fast"] or dtype == torch.float32


# -- integer weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_integers_stay_as_they_are_stored(quantize: str, memory: str):
    """Tuning takes no dequantised weight apart, so that products take the codes that they take without it."""
    tuned = compiled(quantize=quantize, memory=memory)
    settings = dataclasses.replace(tuned.settings, tuning=0)
    legal, _, _ = legalise(tuned.program.graph, settings)
    plain = settings.backend.compile(legal, threads=1, options={"memory": memory})
    forms = tuned.program.executable.stats["forms"]
    assert forms.get("linear.nbits") == plain.stats["forms"].get("linear.nbits")
    codes = {n for n in legal.weights if n.endswith((".codes", ".scale"))}
    assert codes
    assert codes <= set(tuned.program.legal.weights)
    (want,) = plain.run([IDS])
    torch.testing.assert_close(tuned(IDS)[0], want, rtol=2e-3, atol=2e-3 * float(want.std()))


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_comparisons_find_tuned_integers_right(quantize: str):
    mixtral = build(dataclasses.replace(config("mixtral-8x7b-mini"), num_layers=2))
    found = moec.compare(mixtral, (IDS,), backends=("reference", "onnxruntime"), quantize=quantize, threads=1)
    assert found.ok, str(found)


@pytest.mark.parametrize("isolated", [False, True])
def test_comparisons_write_to_no_cache(tmp_path: Path, isolated: bool):
    """Neither what is compiled without tuning, nor nodes by themselves."""
    made = compiled(cache=tmp_path)
    kept = set(tmp_path.iterdir())
    found = moec.compare(model(), (IDS,), backends=("reference", made), isolated=isolated, threads=1)
    assert found.ok, str(found)
    assert kept == set(tmp_path.iterdir())
