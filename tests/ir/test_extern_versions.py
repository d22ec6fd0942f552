"""An operator is not computed in the meaning of another opset."""

from __future__ import annotations

import pytest
import torch

from moec.ir import CompileError, parse, run
from moec.ir.ops.extern_versions import evaluator_knows


@pytest.mark.parametrize(
    ("op", "before", "since"),
    [("Softmax", 12, 13), ("LogSoftmax", 12, 13), ("Hardmax", 11, 13), ("Add", 6, 7), ("Equal", 1, 7), ("Tile", 5, 6),
     ("Resize", 10, 11), ("RoiAlign", 10, 16)],
)  # fmt: skip
def test_since_when_the_evaluator_knows_an_operator(op, before, since):
    assert not evaluator_knows(op, before)
    assert evaluator_knows(op, since)


@pytest.mark.parametrize("op", ["Slice", "Squeeze", "Clip", "ReduceSum", "Cast", "Relu", "Concat", "Gather", "Shape"])
def test_what_it_has_a_class_for_or_says_the_same_by_now(op):
    assert all(evaluator_knows(op, opset) for opset in range(6, 23))


@pytest.mark.parametrize(("version", "ones"), [(11, [0]), (13, [0, 2])])
def test_rows_of_older_opsets(version, ones):
    """Of the first or the only maximum of all axes from the first on, or of the last axis."""
    text = f"""
graph(%x: f32[1, 2, 2]) -> (%y: f32[1, 2, 2]) {{
  %0: f32[1, 2, 2] = extern.Hardmax(%x) {{version={version}, types=[f32[1, 2, 2]], slots=[0]}}
  return %0
}}
"""
    (y,) = run(parse(text), [torch.zeros(1, 2, 2)])
    assert y.flatten().nonzero().flatten().tolist() == ones


def test_another_meaning_is_refused_when_it_runs():
    text = """
graph(%x: f32[1, 1, 2, 4], %s: f32[4]) -> (%y: f32[1, 1, 1, 2]) {
  %0: f32[1, 1, 1, 2] = extern.Resize(%x, %s) {version=10, types=[f32[1, 1, 1, 2]], slots=[0]}
  return %0
}
"""
    with pytest.raises(CompileError, match=r"Resize meant something else in opset 10"):
        run(parse(text), [torch.zeros(1, 1, 2, 4), torch.ones(4)])
