"""`fallback="reference"`: graphs split between a backend and the reference interpreter."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import moec
from moec.backends import get_backend
from moec.backends.partition import PartitionedExecutable, fallbacks, partition
from moec.ir import CompileError, run

GRAPH = """
graph(%x: f32[B, S, 8], %y: f32[B*S, 8]) -> (%a: f32[B, S, 8], %b: f32[B*S, 8], %c: f32[B, S, 8], %w: f32[8]) {
  weight @w: f32[8, 8]
  weight @n: f32[8]
  %0: f32[B, S, 8] = linear.linear(%x, @w) loc("first" "m.py":1) origin("p")
  %1: f32[B, S, 8] = math.sin(%0) loc("second" "m.py":2) origin("q")
  %2: f32[B*S, 8] = tensor.reshape(%1) {shape=[B*S, 8]}
  %3: f32[B*S, 8] = math.add(%2, %y)
  %4: f32[B*S, 8] = math.sin(%3) loc("third" "m.py":3) origin("r")
  %5: f32[B*S, 8] = math.mul(%4, %3)
  %6: f32[B, S, 8] = math.mul(%x, %x)
  return %1, %5, %6, @n
}
"""


class Without(type(get_backend("onnxruntime"))):
    """ONNX Runtime without some ops."""

    def missing(self, node):
        return f"no {node.op} today" if node.op in self.lacking else super().missing(node)


def without(*ops):
    base = get_backend("onnxruntime")
    backend = dataclasses.replace(base)
    backend.__class__ = Without
    backend.lacking = ops
    return backend


@pytest.fixture
def graph():
    g = moec.parse(GRAPH)
    g.bind_weights({"w": torch.randn(8, 8), "n": torch.ones(8)})
    return g


@pytest.mark.parametrize(("b", "s"), [(2, 3), (1, 1), (3, 0)])
def test_split_graphs_run(graph, b, s):
    executable = PartitionedExecutable(graph, without("math.sin"), threads=1)
    inputs = [torch.randn(b, s, 8), torch.randn(b * s, 8)]
    for got, want in zip(executable.run(inputs), run(graph, inputs), strict=True):
        torch.testing.assert_close(got, want)


def test_segments_are_few_and_valid(graph):
    segments = partition(graph, without("math.sin"))
    assert [s.in_reference for s in segments] == [False, True, False, True, False]
    for s in segments:
        s.graph.verify()
    assert sum(len(s.graph) for s in segments) == len(graph)
    assert [s.in_reference for s in partition(graph, without())] == [False]
    everything = partition(graph, without(*graph.count_ops()))
    assert [s.in_reference for s in everything] == [True]


def test_each_fallback_is_reported_with_its_place_and_reason(graph):
    found = fallbacks(graph, without("math.sin"))
    assert [(f.op, f.location, f.reason) for f in found] == [
        ("math.sin", "second m.py:2", "no math.sin today"),
        ("math.sin", "third m.py:3", "no math.sin today"),
    ]
    compiled = moec.compile(graph, backend=without("math.sin"), fallback="reference")
    report = compiled.report.to_dict()["programs"]["forward"]
    assert [f["location"] for f in report["fallbacks"]] == ["second m.py:2", "third m.py:3"]
    assert "third m.py:3 runs in the reference: no math.sin today" in str(compiled.report)
    assert report["backend"]["reference nodes"] == 2
    inputs = [torch.randn(2, 3, 8), torch.randn(6, 8)]
    for got, want in zip(compiled(*inputs), run(graph, inputs), strict=True):
        torch.testing.assert_close(got, want)


def test_without_fallback_it_is_an_error(graph):
    with pytest.raises(CompileError) as caught:
        moec.compile(graph, backend=without("math.sin"))
    text = str(caught.value)
    for word in ("math.sin", "second m.py:2", "no math.sin today", 'fallback="reference"'):
        assert word in text


def test_taps_reach_every_segment(graph):
    executable = PartitionedExecutable(graph, without("math.sin"), threads=1)
    inputs = [torch.randn(2, 3, 8), torch.randn(6, 8)]
    wanted = [r for n in graph.nodes for r in n.results]
    seen = executable.tap(inputs, wanted)
    assert seen.keys() == set(wanted)
    reference = {}
    run(graph, inputs, tap=lambda v, t: reference.setdefault(v, t) is None or None)
    for v in wanted:
        torch.testing.assert_close(seen[v], reference[v])


def test_wrong_inputs_are_refused(graph):
    executable = PartitionedExecutable(graph, without("math.sin"), threads=1)
    with pytest.raises(CompileError, match="axis 0"):
        executable.run([torch.randn(2, 3, 8), torch.randn(5, 8)])
