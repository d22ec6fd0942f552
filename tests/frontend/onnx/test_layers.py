"""Layers of vision and speech models: pools, transposed convolutions, resizing, padding, recurrent layers. They come in
as ops of ours and are what ONNX Runtime makes of them, at sizes that are known and at sizes that are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import moec
from moec.frontend.onnx import import_onnx

from .builders import agrees, check, one_op

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def scales(*factors: float) -> np.ndarray:
    return np.array([1.0, 1.0, *factors], np.float32)


NONE = np.zeros(0, np.float32)
X = floats(2, 4, 7, 9)
# operator, operands of which the first is not constant, attributes
CASES: dict[str, tuple[str, list[np.ndarray], dict[str, Any]]] = {
    "max": ("MaxPool", [X], {"kernel_shape": [3, 2]}),
    "max padded": ("MaxPool", [X], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 0]}),
    "max dilated": ("MaxPool", [X], {"kernel_shape": [2, 3], "dilations": [3, 2]}),
    "max ceil": ("MaxPool", [X], {"kernel_shape": [2, 3], "strides": [2, 3], "ceil_mode": 1}),
    "max of one axis": ("MaxPool", [floats(1, 3, 8)], {"kernel_shape": [3], "strides": [2]}),
    "average": ("AveragePool", [X], {"kernel_shape": [3, 2], "strides": [3, 2]}),
    "average padded": ("AveragePool", [X], {"kernel_shape": [3, 3], "pads": [1, 0, 1, 2]}),
    "average counts padding": ("AveragePool", [X], {"kernel_shape": [3, 3], "pads": [1, 0, 1, 2],
                                                    "count_include_pad": 1}),
    "average ceil": ("AveragePool", [X], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    "transposed": ("ConvTranspose", [X, floats(4, 3, 2, 2), floats(3)], {"strides": [2, 2]}),
    "transposed padded": ("ConvTranspose", [X, floats(4, 3, 3, 3)], {"strides": [2, 1], "pads": [1, 1, 1, 1],
                                                                      "output_padding": [1, 0]}),
    "transposed groups": ("ConvTranspose", [X, floats(4, 3, 3, 2)], {"group": 2, "dilations": [2, 1]}),
    "transposed cropped": ("ConvTranspose", [X, floats(4, 1, 2, 2)], {"pads": [2, 1, 0, 3]}),
    "transposed audio": ("ConvTranspose", [floats(1, 4, 9), floats(4, 2, 7)], {"strides": [3], "pads": [2, 2]}),
    "transposed to the same size": ("ConvTranspose", [X, floats(4, 3, 3, 4)], {"strides": [2, 3],
                                                                               "auto_pad": "SAME_UPPER"}),
    "transposed by less than its steps": ("ConvTranspose", [X, floats(4, 3, 1, 4)],
                                          {"strides": [3, 1], "auto_pad": "SAME_LOWER"}),
    "nearest": ("Resize", [X, NONE, scales(2, 3)], {"mode": "nearest", "nearest_mode": "floor",
                                                    "coordinate_transformation_mode": "asymmetric"}),
    "nearest by halves": ("Resize", [X, NONE, scales(1.5, 0.5)], {"mode": "nearest"}),
    "linear": ("Resize", [X, NONE, scales(2, 0.5)], {"mode": "linear"}),
    "linear aligned": ("Resize", [X, NONE, scales(2, 2)], {"mode": "linear",
                                                           "coordinate_transformation_mode": "align_corners"}),
    "reflected": ("Pad", [X, np.array([0, 0, 2, 0, 0, 0, 1, 3])], {"mode": "reflect"}),
    "repeated at the edge": ("Pad", [X, np.array([0, 0, 2, 0, 0, 0, 1, 3])], {"mode": "edge"}),
    "wrapped": ("Pad", [X, np.array([0, 0, 2, 0, 0, 0, 1, 3])], {"mode": "wrap"}),
    "cropped": ("Pad", [X, np.array([0, 0, -2, 1, 0, 0, 1, -3])], {}),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CASES)
def test_layers_of_planes(name, dynamic):
    op, arrays, attrs = CASES[name]
    constant = range(1, len(arrays))
    proto = one_op(op, arrays, constant=constant, dynamic=dynamic, opset=21, **attrs)
    imported = import_onnx(proto)
    assert not imported.extern
    shapes = [arrays[0].shape]
    if dynamic:
        shapes += [(1, s[1], *(n + 3 for n in s[2:])) for s in shapes]
        shapes += [(3, s[1], *(n + 4 for n in s[2:])) for s in shapes[:1]]
    for backend in ("reference", "onnxruntime"):
        compiled = moec.compile(proto, backend=backend)
        for shape in shapes:
            agrees(compiled, proto, {"x0": floats(*shape)})


@pytest.mark.parametrize("factors", [(0.6, 0.6), (1.5, 0.5), (0.5, 3.0)])
def test_nearest_of_opset_10(factors):
    """Up where an axis shrinks, down where it grows; ONNX's evaluator does not know this operator."""
    x = np.arange(1, 9, dtype=np.float32).reshape(1, 1, 2, 4)
    proto = one_op("Resize", [x, scales(*factors)], constant=[1], opset=10, mode="nearest")
    proto.ir_version = 7
    assert not import_onnx(proto).extern
    for backend in ("reference", "onnxruntime"):
        agrees(moec.compile(proto, backend=backend), proto, {"x0": x})


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_reflections_that_go_there_and_back(dynamic):
    """ONNX Runtime refuses them, ONNX's evaluator turns around as often as need be."""
    for n in (1, 2, 3, 5):
        x = np.arange(n, dtype=np.float32)
        proto = one_op("Pad", [x, np.array([3, 4])], constant=[1], dynamic=dynamic, opset=18, mode="reflect")
        check(proto, {"x0": x}, native=True)


def test_resize_to_sizes_of_another_value():
    """The sizes of an image that comes along, as feature pyramids ask for them."""
    from .builders import helper, model, value

    nodes = [
        helper.make_node("Shape", ["like"], ["shape"]),
        helper.make_node("Resize", ["x", "", "", "shape"], ["y"], mode="linear"),
    ]
    ins = [value("x", [1, 2, "h", "w"]), value("like", [1, 2, "H", "W"])]
    proto = model(nodes, ins, [value("y", [1, 2, "H", "W"])], opset=19)
    assert not import_onnx(proto).extern
    for backend in ("reference", "onnxruntime"):
        compiled = moec.compile(proto, backend=backend)
        for small, large in (((4, 5), (8, 9)), ((6, 3), (5, 5))):
            agrees(compiled, proto, {"x": floats(1, 2, *small), "like": floats(1, 2, *large)})


def recurrent(op: str, gates: int, ways: int, **attrs: Any) -> Any:
    steps, batch, given, hidden = 5, 3, 4, 6
    arrays = [
        floats(steps, batch, given),
        floats(ways, gates * hidden, given) * 0.5,
        floats(ways, gates * hidden, hidden) * 0.5,
        floats(ways, 2 * gates * hidden),
        np.full(batch, steps, np.int32),
        *[floats(ways, batch, hidden)] * (2 if op == "LSTM" else 1),
    ]
    return arrays, {"hidden_size": hidden, **attrs}


RECURRENT = {
    "RNN": recurrent("RNN", 1, 1, activations=["Relu"]),
    "RNN backwards": recurrent("RNN", 1, 1, direction="reverse"),
    "GRU": recurrent("GRU", 3, 2, direction="bidirectional"),
    "GRU reset after": recurrent("GRU", 3, 1, linear_before_reset=1),
    "LSTM": recurrent("LSTM", 4, 1),
    "LSTM both ways": recurrent("LSTM", 4, 2, direction="bidirectional"),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name):
    arrays, attrs = RECURRENT[name]
    op = name.split()[0]
    outputs = 3 if op == "LSTM" else 2
    proto = one_op(op, arrays, outputs, constant=(1, 2, 3), **attrs)
    (node,) = proto.graph.node
    node.input[4] = ""  # all rows have all steps
    del proto.graph.input[1]
    feeds = {f"x{i}": a for i, a in enumerate(arrays) if i in (0, 5, 6)}
    assert not import_onnx(proto).extern
    for backend in ("reference", "onnxruntime"):
        agrees(moec.compile(proto, backend=backend), proto, feeds)


@pytest.mark.parametrize("name", [n for n in RECURRENT if n != "GRU"])
def test_recurrent_layers_of_unknown_length(name):
    arrays, attrs = RECURRENT[name]
    op = name.split()[0]
    proto = one_op(op, arrays[:4], 3 if op == "LSTM" else 2, constant=(1, 2, 3), **attrs)
    for axis, size in enumerate(("T", "B")):
        proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = size
    imported = import_onnx(proto)
    assert not imported.extern
    assert len(imported.graph.find(f"recurrent.{op.lower()}")) == arrays[1].shape[0]
    for backend in ("reference", "onnxruntime"):
        compiled = moec.compile(proto, backend=backend)
        for steps, batch in ((1, 1), (5, 3), (90, 2)):
            agrees(compiled, proto, {"x0": floats(steps, batch, 4)})


def test_long_recurrent_layers_of_another_kind_stay_themselves():
    arrays, attrs = RECURRENT["GRU"]
    arrays = [np.repeat(arrays[0], 20, 0), *arrays[1:3]]
    proto = one_op("GRU", arrays, 2, constant=(1, 2), **attrs)
    imported = import_onnx(proto)
    assert "over 100 steps" in imported.extern["GRU"]
    agrees(moec.compile(proto, backend="onnxruntime"), proto, {"x0": arrays[0]})
