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


def test_another_meaning_is_refused_when_it_runs():
    text = """
graph(%x: f32[2, 2, 2]) -> (%y: f32[2, 2, 2]) {
  %0: f32[2, 2, 2] = extern.Hardmax(%x) {version=VERSION, types=[f32[2, 2, 2]], slots=[0]}
  return %0
}
"""
    with pytest.raises(CompileError, match=r"extern.Hardmax meant something else in opset 11"):
        run(parse(text.replace("VERSION", "11")), [torch.zeros(2, 2, 2)])
    (y,) = run(parse(text.replace("VERSION", "13")), [torch.zeros(2, 2, 2)])
    assert y[..., 0].eq(1).all()
