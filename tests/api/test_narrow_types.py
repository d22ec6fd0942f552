"""4-bit integers in files: of comparisons, of graphs, and for a process of its own."""

from __future__ import annotations

import pytest
import torch

import moec
from moec.comparing.store import Store
from moec.graph_file import load_graph, save_graph
from moec.ir import DType, Graph
from moec.ir.arrays import as_bytes, converted

TEXT = """
graph(%c: i4[R, 5], %s: f32[R, 1]) -> (%y: f32[3, 5], %z: f32[R, 5]) {
  weight @w: i4[3, 5]
  weight @scale: f32[3, 1]
  %0: f32[3, 5] = quant.dequantize(@w, @scale) {block=[1, 8]}
  %1: f32[R, 5] = quant.dequantize(%c, %s) {block=[1, 8]}
  return %0, %1
}
"""


@pytest.fixture
def codes() -> torch.Tensor:
    return converted(torch.arange(-7, 8).reshape(3, 5), DType.I4)


@pytest.fixture
def graph(codes: torch.Tensor) -> Graph:
    graph = moec.parse(TEXT)
    graph.bind_weights({"w": codes, "scale": torch.tensor([[1.0], [2.0], [3.0]])})
    return graph


def test_a_store_gives_back_what_was_put(codes, tmp_path):
    store = Store(tmp_path)
    store.put("codes", codes)
    store.put("bytes", as_bytes(codes))
    again = Store(tmp_path)
    assert again.types == store.types
    assert again.get("codes").dtype == torch.int4
    assert torch.equal(as_bytes(again.get("codes")), as_bytes(codes))
    assert torch.equal(again.get("bytes"), as_bytes(codes))


def test_a_graph_file_holds_inputs_and_weights(graph, codes, tmp_path):
    inputs = codes[:2], torch.ones(2, 1)
    save_graph(graph, tmp_path / "g.ir", inputs)
    again, given = load_graph(tmp_path / "g.ir")
    assert again == graph
    want = moec.compile(graph, backend="reference")(*inputs)
    got = moec.compile(again, backend="reference")(*given)
    assert torch.equal(want[0][2], torch.tensor([9.0, 12.0, 15.0, 18.0, 21.0]))
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("processes", [False, True])
def test_backends_take_them(graph, codes, processes):
    comparison = moec.compare(graph, (codes, torch.ones(3, 1)), processes=processes)
    assert comparison.ok
    assert len(comparison.outputs) == 2
