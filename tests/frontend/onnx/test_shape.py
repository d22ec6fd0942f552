"""Operators on shapes, where the number of outputs or the form of the operands says what they do."""

from __future__ import annotations

import numpy as np
import pytest

import moec
from moec.frontend.onnx import import_onnx
from moec.ir import CompileError

from .builders import agrees, check, helper, model, value

X = np.arange(6, dtype=np.float32)


def split(size: int | str, opset: int, used: str, **attrs: int) -> object:
    node = helper.make_node("Split", ["x"], ["a", "b", "c"], axis=0, **attrs)
    return model([node], [value("x", [size])], [value(name, None) for name in used], opset=opset)


@pytest.mark.parametrize("used", ["ab", "a", "b"])
@pytest.mark.parametrize("opset", [2, 11, 13])
def test_outputs_that_nothing_takes_are_parts_too(opset, used):
    imported = check(split(6, opset, used), {"x": X}, native=True)
    assert all(v.shape == (2,) for v in imported.graph.outputs)


def test_outputs_that_nothing_takes_are_parts_of_unknown_sizes_too():
    proto = split("n", 13, "ab")
    for backend in ("reference", "onnxruntime"):
        agrees(moec.compile(proto, backend=backend), proto, {"x": X})


def test_the_number_of_parts_is_that_of_the_outputs():
    proto = split(7, 18, "ab", num_outputs=3)
    for backend in ("reference", "onnxruntime"):
        agrees(moec.compile(proto, backend=backend), proto, {"x": np.arange(7, dtype=np.float32)})
    with pytest.raises(CompileError, match="Split: num_outputs is 2, 3 outputs are named"):
        import_onnx(split(6, 18, "abc", num_outputs=2))
