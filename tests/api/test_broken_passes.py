"""Passes that leave graphs that are no graphs: one CompileError that names the pass, from compile, check_pass and
bisect alike, and no crash of the tools that print them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import moec
from moec.ir import CompileError, parse
from moec.passes import Pass, Pipeline
from moec.testing import check_pass

GRAPH = """
graph(%x: f32[T, 4]) -> (%y: f32[4, T]) {
  weight @w: f32[4]
  %0: f32[T, 4] = norm.rms(%x, @w) {eps=1e-06}
  %1: f32[4, T] = tensor.transpose(%0) {perm=[1, 0]}
  return %1
}
"""


class Broken(Pass):
    def run(self, graph):
        graph = graph.clone()
        self.spoil(graph)
        return graph

    def node(self, graph, op):
        return graph.find(op)[0]


class UnknownAttribute(Broken):
    def spoil(self, graph):
        self.node(graph, "norm.rms").attrs["epsilon"] = 1.0


class ListForTuple(Broken):
    def spoil(self, graph):
        self.node(graph, "tensor.transpose").attrs["perm"] = [1, 0]


class IntForFloat(Broken):
    def spoil(self, graph):
        self.node(graph, "norm.rms").attrs["eps"] = 1


class MissingAttribute(Broken):
    def spoil(self, graph):
        del self.node(graph, "norm.rms").attrs["eps"]


class NoAttributeValue(Broken):
    def spoil(self, graph):
        self.node(graph, "norm.rms").attrs["eps"] = torch.ones(2)


class NoOutputs(Broken):
    def spoil(self, graph):
        graph.outputs.clear()


class NoOutputsAtAll(Broken):
    def spoil(self, graph):
        graph.outputs.clear()
        graph.output_names.clear()


class OtherInputs(Broken):
    def spoil(self, graph):
        graph.inputs[0].name = "z"


SAYS = {
    UnknownAttribute: ("norm.rms has no attribute 'epsilon'", "did you mean 'eps'?"),
    ListForTuple: ("tensor.transpose: attribute 'perm' must be tuple, got list [1, 0]", "here tuple (1, 0)"),
    IntForFloat: ("norm.rms: attribute 'eps' must be float, got int 1", "here float 1.0"),
    MissingAttribute: ("norm.rms: attribute 'eps' is missing", ""),
    NoAttributeValue: ("attribute 'eps' must be float, got Tensor tensor([1., 1.])", ""),
    NoOutputs: ("the graph has 0 outputs and 1 names for them", "set_output"),
    NoOutputsAtAll: ("outputs are (), expected (y: f32[4, T])", ""),
    OtherInputs: ("inputs are (z: f32[T, 4]), expected (x: f32[T, 4])", ""),
}


@pytest.mark.parametrize(("cls", "says"), SAYS.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_every_tool_says_the_same(cls, says):
    graph, here = parse(GRAPH), f"pass {cls().name} ({__file__}:"
    graph.bind_weights({"w": torch.ones(4)})
    before = str(graph)
    with pytest.raises(CompileError) as e:
        moec.compile(graph, backend="reference", passes=[cls()])
    assert all(part in str(e.value) for part in (here, *says)), e.value
    with pytest.raises(AssertionError) as e:
        check_pass(cls(), graph)
    assert all(part in str(e.value) for part in (here, *says)), e.value
    culprit = moec.bisect(graph, passes=Pipeline((cls(),)), seconds=5)
    assert culprit.kind == "pass"
    assert culprit.culprit == cls()
    assert all(part in str(culprit) for part in says), str(culprit)
    assert str(graph) == before


@pytest.mark.parametrize("cls", SAYS)
def test_a_broken_graph_can_be_printed(cls):
    broken = cls().run(parse(GRAPH))
    assert "= norm.rms(" in str(broken)
    assert repr(broken)


def test_a_pass_that_changes_its_input_changes_a_copy():
    class InPlace(Pass):
        def run(self, graph):
            graph.find("norm.rms")[0].attrs["eps"] = 7.0
            return graph

    graph = parse(GRAPH)
    with pytest.raises(AssertionError, match="changed its input graph"):
        check_pass(InPlace(), graph)
    assert graph == parse(GRAPH)


CRASH = "import moec.cli_compare, moec.cli; moec.cli_compare.passes_of = lambda _: 1 / 0; moec.cli.main()"


def test_a_crash_of_the_tool_is_no_answer(tmp_path):
    """1 means that there is a difference or a culprit."""
    (tmp_path / "g.ir").write_text(GRAPH)
    done = subprocess.run(
        [sys.executable, "-c", CRASH, "compare", str(tmp_path / "g.ir")], capture_output=True, text=True
    )
    assert done.returncode == 3, done.stderr
    assert "ZeroDivisionError" in done.stderr
