"""What is computed while importing is what the nodes give when they run, in their own opset."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import moec
from moec.frontend.onnx import import_onnx

from .builders import agrees, check, helper, model, value

RNG = np.random.default_rng(0)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_steps_of_a_slice_of_sizes_without_axes():
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Slice", ["s", "start", "end", "", "step"], ["t"]),
        helper.make_node("ConstantOfShape", ["t"], ["y"]),
    ]
    weights = {"start": ints(0), "end": ints(4), "step": ints(2)}
    proto = model(nodes, [value("x", ["n", "m", 2, 3])], [value("y", None)], weights)
    imported = check(proto, {"x": np.zeros((2, 1, 2, 3), np.float32)}, native=True)
    assert str(imported.graph.outputs[0].type) == "f32[n, 2]"
    nodes[1] = helper.make_node("Slice", ["s", "start", "end", "axes", "step"], ["t"])
    proto = model(nodes, [value("x", ["n", "m", 2, 3])], [value("y", None)], weights | {"axes": ints(-1)})
    check(proto, {"x": np.zeros((2, 1, 2, 3), np.float32)}, native=True)


@pytest.mark.parametrize("scalar", [False, True])
def test_a_table_of_numbers_by_a_size(scalar):
    nodes = [helper.make_node("Shape", ["x"], ["s"])]
    nodes += [helper.make_node("Squeeze", ["s"], ["i"])] if scalar else []
    nodes += [helper.make_node("Gather", ["table", "i" if scalar else "s"], ["y"])]
    proto = model(nodes, [value("x", ["n"])], [value("y", None, np.int64)], {"table": np.arange(100, 164)})
    for n in (1, 5):
        check(proto, {"x": np.zeros(n, np.float32)}, native=True)


@pytest.mark.parametrize("opset", [13, 22])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_the_product_of_sizes_is_a_size(opset, keepdims):
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("ReduceProd", ["s"], ["p"], keepdims=keepdims),
        helper.make_node("Reshape", ["p", "flat"], ["q"]),
        helper.make_node("Reshape", ["x", "q"], ["y"]),
    ]
    proto = model(nodes, [value("x", ["n", 4])], [value("y", None)], {"flat": ints(1)}, opset=opset)
    imported = check(proto, {"x": RNG.standard_normal((3, 4)).astype(np.float32)}, native=True)
    assert str(imported.graph.outputs[0].type) == "f32[4*n]"


def test_products_of_other_numbers_stay_what_they_are():
    x = ints(2, 3, 4)
    nodes = [helper.make_node("ReduceProd", ["x"], ["y"])]
    check(model(nodes, [value("x", ["n"], np.int64)], [value("y", None, np.int64)]), {"x": x}, native=False)
    # without axes, it may be asked to do nothing
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("ReduceProd", ["s"], ["y"], noop_with_empty_axes=1),
    ]
    check(model(nodes, [value("x", ["n", 4])], [value("y", None, np.int64)]), {"x": np.zeros((3, 4), np.float32)})


SQUARE = np.array([[[1, 2], [4, 3]]], np.float32)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("opset", [11, 13])
def test_constants_have_the_meaning_of_their_opset(op, axis, opset):
    """Until opset 12 these were over all axes from `axis` on, which was 1 by default."""
    attrs = {} if axis is None else {"axis": axis}
    nodes = [helper.make_node(op, ["c"], ["s"], **attrs), helper.make_node("Add", ["x", "s"], ["y"])]
    proto = model(nodes, [value("x", [1, 2, 2])], [value("y", [1, 2, 2])], {"c": SQUARE}, opset=opset)
    proto.ir_version = 7
    for backend in ("reference", "onnxruntime"):
        agrees(moec.compile(proto, backend=backend), proto, {"x": np.zeros((1, 2, 2), np.float32)})


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("axis", [None, 1, -1])
@pytest.mark.parametrize("opset", [11, 13])
def test_bodies_have_the_meaning_of_their_opset(op, axis, opset):
    attrs = {} if axis is None else {"axis": axis}
    node = helper.make_node(op, ["x"], ["r"], **attrs)
    then = helper.make_graph([node], "then", [], [value("r", [1, 2, 2])])
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["r"])], "other", [], [value("r", [1, 2, 2])])
    choice = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    ins = [value("x", [1, 2, 2]), value("c", [], np.bool_)]
    proto = model([choice], ins, [value("y", [1, 2, 2])], opset=opset)
    proto.ir_version = 7
    for backend in ("reference", "onnxruntime"):
        agrees(moec.compile(proto, backend=backend), proto, {"x": SQUARE, "c": np.array(True)})


def test_constants_that_are_aligned_by_an_attribute():
    """As opset 6 has it; ONNX Runtime has no such operator, and ONNX's evaluator no such meaning."""
    nodes = [
        helper.make_node("Add", ["c", "d"], ["s"], broadcast=1, axis=0),
        helper.make_node("Add", ["x", "s"], ["y"]),
    ]
    weights = {"c": np.zeros((2, 2), np.float32), "d": np.array([1, 2], np.float32)}
    proto = model(nodes, [value("x", [2, 2])], [value("y", [2, 2])], weights, opset=6)
    (y,) = moec.compile(proto, backend="reference")(torch.zeros(2, 2))
    assert y.tolist() == [[1, 1], [2, 2]]


def test_shapes_are_computed_in_old_opsets_too():
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Cast", ["s"], ["f"], to=1),
        helper.make_node("Mul", ["f", "two"], ["g"]),
        helper.make_node("Floor", ["g"], ["h"]),
        helper.make_node("Cast", ["h"], ["t"], to=7),
        helper.make_node("Expand", ["one", "t"], ["y"]),
    ]
    weights = {"two": np.array([2], np.float32), "one": np.ones(1, np.float32)}
    proto = model(nodes, [value("x", [3, 4])], [value("y", None)], weights, opset=9)
    assert str(import_onnx(proto).graph.outputs[0].type) == "f32[6, 8]"
