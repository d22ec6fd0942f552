"""Bugs that show only in what a backend's tuning passes make: the pass, or the node that it made, is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import moec
from moec import models
from moec.backends import Backend, get_backend
from moec.backends.onnxruntime import attention_blocks
from moec.ir import Node
from moec.passes.clean.sink_transposes import SinkBelowRoPE
from moec.passes.fuse import deinterleave_rope, merge_linear

from .planted import AS_IT_IS, BOTH, compare, reweighted, same, subject
from .planted_bugs import BUGS
from .planted_changes import number, scaled

ORT = get_backend("onnxruntime")
MODELS = ("mixtral-8x7b", "deepseek-v3")


def lowered_wrongly(op: str, where: Callable[[Node], bool], wrong: Callable[..., Any]) -> Backend:
    """ONNX Runtime with `wrong(right, e, node)` for nodes of `op` for which `where` holds."""
    right = ORT.lowerings[op]

    def lowering(e: Any, node: Node) -> Any:
        return wrong(right, e, node) if where(node) else right(e, node)

    return dataclasses.replace(ORT, name="faulty", lowerings={**ORT.lowerings, op: lowering})


def modules(node: Node) -> list[str]:
    return [f.module.rpartition(".")[2] for f in node.location.frames]


def run(model: str, backend: str | Backend, mode: str, inputs: str = "ids") -> moec.Comparison:
    return compare(subject(model).graph, subject(model).inputs[inputs], backend, mode)


# -- lowerings of what only tuned programs have


def merged(node: Node) -> bool:
    return "+" in node.operand("weight").weight.name


def last_row_forgotten(right: Any, e: Any, node: Node) -> Any:
    return right(e, reweighted(node, "weight", lambda w: torch.cat((w[:-1], 0 * w[-1:]))))


@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize(
    ("model", "parts"),
    [("mixtral-8x7b", ["q_proj", "k_proj", "v_proj"]), ("deepseek-v3", ["q_a_proj", "kv_a_proj_with_mqa"])],
)
def test_a_merged_linear_is_named_with_all_that_it_is_made_of(model, parts, mode):
    found = run(model, lowered_wrongly("linear.linear", merged, last_row_forgotten), mode)
    first = found.first_divergence
    assert not found.ok
    assert first is not None, str(found)
    assert first.node.op == "linear.linear"
    assert modules(first.node) == parts
    assert (first.layer, first.tuning, first.meaning, first.isolated) == (0, "merge_linears", False, True)
    assert all(part in str(first) for part in parts)
    # the saved node shows it again
    graph, inputs = first.case
    backend = lowered_wrongly("linear.linear", merged, last_row_forgotten)
    assert not moec.compare(graph, inputs, backends=("reference", backend), passes=AS_IT_IS).ok


@pytest.mark.parametrize("mode", BOTH)
def test_a_rotation_in_the_tuned_layout_is_named(mode):
    """Heads after the sequence: what transposes sink below."""

    def sunk(node: Node) -> bool:
        return node.operand("cos").shape[-2] == 1 and node.location.under("model.layers.1")

    def wrong(right: Any, e: Any, node: Node) -> Any:
        return e.op("Mul", right(e, node), number(1.02))

    first = run("mixtral-8x7b", lowered_wrongly("rope.apply", sunk, wrong), mode).first_divergence
    assert first is not None
    assert (first.node.op, first.layer, first.tuning) == ("rope.apply", 1, "sink_transposes")


@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize("model", MODELS)
def test_attention_of_heads_side_by_side_is_named(model, mode, monkeypatch):
    """The blocks of queries, as they are where the transposes have gone into the attention."""
    right = attention_blocks.Causal._blocks

    def wrong(self: Any, e: Any, bounds: Any) -> Any:
        y = right(self, e, bounds)
        return scaled(1.02)(e, y) if self.axis == 1 else y

    monkeypatch.setattr(attention_blocks.Causal, "_blocks", wrong)
    monkeypatch.setattr(attention_blocks, "SHORTEST", 8)
    found = run(model, ORT, mode, "long")
    first = found.first_divergence
    assert not found.ok
    assert first is not None, str(found)
    assert (first.node.op, first.layer, first.isolated) == ("attention.sdpa", 0, True)
    assert first.tuning == "sink_transposes"


@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize("model", MODELS)
def test_attention_in_blocks_is_named(model, mode, monkeypatch):
    """With a bug in both forms it is the model's own node, and not one that tuning made."""
    right = attention_blocks.Causal._mask

    def wrong(self: Any, e: Any, start: Any, end: Any, seen: Any) -> Any:
        return right(self, e, start + 1, end + 1, seen)

    monkeypatch.setattr(attention_blocks.Causal, "_mask", wrong)
    monkeypatch.setattr(attention_blocks, "SHORTEST", 8)
    first = run(model, ORT, mode, "long").first_divergence
    assert first is not None
    assert (first.node.op, first.layer, first.tuning, first.isolated) == ("attention.sdpa", 0, "", True)


# -- passes


def other_rows(monkeypatch):
    right = deinterleave_rope._source
    monkeypatch.setattr(deinterleave_rope, "_source", lambda x, order: right(x, order.roll(1)))


def parts_in_reverse(monkeypatch):
    right = merge_linear._joined
    monkeypatch.setattr(merge_linear, "_joined", lambda b, parts: right(b, parts[::-1]))


def angles_swapped(monkeypatch):
    right = SinkBelowRoPE.replace

    def wrong(self: Any, b: Any, m: Any) -> Any:
        m.cos, m.sin = m.sin, m.cos
        return right(self, b, m)

    monkeypatch.setattr(SinkBelowRoPE, "replace", wrong)


@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize(
    ("plant", "model", "guilty", "op"),
    [
        (other_rows, "deepseek-v3", "deinterleave_rope", "rope.apply"),
        (parts_in_reverse, "mixtral-8x7b", "merge_linears", "linear.linear"),
        (angles_swapped, "mixtral-8x7b", "sink_transposes", "rope.apply"),
    ],
)
def test_the_pass_that_changes_the_meaning_is_named(plant, model, guilty, op, mode, monkeypatch):
    plant(monkeypatch)
    found = run(model, ORT, mode)
    first = found.first_divergence
    assert not found.ok
    assert first is not None, str(found)
    assert (first.node.op, first.layer, first.tuning, first.meaning) == (op, 0, guilty, True)
    assert f"tuning pass {guilty} changes the meaning" in str(first)
    assert any(same(first.node, n) for n in subject(model).graph.nodes)


# -- what is said of bugs that tuning hides, and of nothing


def test_a_bug_that_tuning_hides_is_told_from_one_that_runs():
    bug = next(b for b in BUGS if b.name == "rotary pairs as halves for interleaved")
    found = run(bug.subject, bug.plant(), "propagated")
    assert all(o.difference.ok for o in found.outputs)
    assert not found.ok
    assert any("only lowered without the backend's tuning passes" in note for note in found.notes)
    assert found.first_divergence.tuning == ""


def test_a_compiled_model_is_judged_as_it_is():
    """Without tuning it would be wrong, but that is not what runs."""
    bug = next(b for b in BUGS if b.name == "rotary pairs as halves for interleaved")
    s = subject(bug.subject)
    compiled = moec.compile(s.graph, backend=bug.plant(), passes=AS_IT_IS, threads=1)
    assert moec.compare(s.graph, s.inputs["ids"], backends=("reference", compiled), passes=AS_IT_IS).ok


def test_a_compiled_model_with_a_merged_linear_that_is_wrong():
    s = subject("mixtral-8x7b")
    backend = lowered_wrongly("linear.linear", merged, last_row_forgotten)
    compiled = moec.compile(s.graph, backend=backend, passes=AS_IT_IS, threads=1)
    found = moec.compare(s.graph, s.inputs["ids"], backends=("reference", compiled), passes=AS_IT_IS)
    assert found.first_divergence.tuning == "merge_linears"


def test_values_in_another_layout_are_not_taken_for_the_same():
    """As many tokens as heads: then the shapes of both layouts are equal."""
    heads = next(n.result.shape[1] for n in subject("deepseek-v3").graph.nodes if n.op == "attention.sdpa")
    ids = torch.arange(heads).reshape(1, heads)
    found = moec.compare(models.build("deepseek-v3-mini"), (ids,), threads=1)
    assert found.ok, str(found)


@pytest.mark.parametrize("mode", BOTH)
def test_the_tuned_backend_may_come_first(mode):
    s = subject("mixtral-8x7b")
    found = moec.compare(
        s.graph, s.inputs["ids"], backends=("onnxruntime", "reference"), passes=AS_IT_IS, isolated=mode == "isolated"
    )
    assert found.ok, str(found)
    assert not any("no values inside" in note for note in found.notes)


@pytest.mark.parametrize("mode", BOTH)
def test_processes_of_their_own(mode):
    """The same rows as in this process."""
    s = subject("deepseek-v3")

    def rows(processes: bool) -> list[tuple]:
        found = moec.compare(
            s.graph, s.inputs["ids"], passes=AS_IT_IS, isolated=mode == "isolated", processes=processes, threads=1
        )
        assert found.ok, str(found)
        return [(r.op, r.location, r.ok) for r in (*found.nodes, *found.values)]

    assert rows(True) == rows(False)


def test_bisect_names_it_too():
    s = subject("mixtral-8x7b")
    backend = lowered_wrongly("linear.linear", merged, last_row_forgotten)
    culprit = moec.bisect(s.graph, s.inputs["ids"], backend=backend, passes=AS_IT_IS, seconds=0)
    assert culprit.kind == "backend"
    assert culprit.divergence.tuning == "merge_linears"
    assert "merge_linears" in str(culprit)
