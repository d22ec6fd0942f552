"""Benches that reach into the package go on with it: each runs once, on the smallest sizes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def _bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(f"{BENCH}/"):
            del sys.modules[name]


@pytest.mark.usefixtures("_bench")
def test_load():
    from cpu_load import STEPS, measure, show

    options = argparse.Namespace(experts=4, hidden=32, width=16, quantize=None, memory="fast")
    row = measure(1, options)
    assert row["experts"]
    assert all(row[step] > 0 for step in STEPS)
    assert show([row], 60, 2.0) == 0
    assert show([row], 0, 2.0) == 1


@pytest.mark.usefixtures("_bench")
def test_floor():
    import torch
    from cpu_floor import Machine, products

    import moec

    model, shapes = moec.models.build("mixtral-8x7b-mini"), {"input_ids": {0: "B", 1: "S"}}
    given = (torch.zeros(2, 8, dtype=torch.int64),)
    compiled = moec.compile(model, given, dynamic_shapes=shapes, backend="onnxruntime", threads=1)
    one, two = (products(compiled, torch.zeros(1, n, dtype=torch.int64)) for n in (1, 2))
    assert sum(p.flops for p in two) > 1.9 * sum(p.flops for p in one) > 0
    assert sum(p.bytes for p in one) < 4 * sum(w.weight.load().numel() for w in compiled.graph.weights.values())
    machine = Machine(bandwidth=1e9, peak=1e9)
    assert machine.floor(one) == pytest.approx(sum(max(p.bytes, p.flops) for p in one) / 1e9)
