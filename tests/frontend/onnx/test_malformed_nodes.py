"""Nodes that no operator takes end in one error that names them, whatever an import function makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moec.frontend.onnx import import_onnx, imports
from moec.ir import CompileError

from .builders import helper, model, one_op, value

MATRIX, CUBE = np.ones((2, 3), np.float32), np.ones((2, 3, 4), np.float32)
PLANES, KERNEL = np.ones((1, 4, 2, 2), np.float32), np.ones((2, 4, 1, 1), np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


# operator, operands (the first is the model's input), attributes, what is said
CASES: dict[str, tuple[str, list[Any], dict[str, Any], str]] = {
    "product of another rank": ("Einsum", [CUBE, np.ones((4, 5), np.float32)], {"equation": "ab,bc->ac"},
                                r"equation 'ab,bc->ac' of f32\[2, 3, 4\]"),
    "repeats of fewer axes": ("Tile", [MATRIX, ints(2)], {}, r"repeats \(2,\) of f32\[2, 3\]"),
    "joined ranks": ("Concat", [MATRIX, np.ones(3, np.float32)], {"axis": 0}, "they differ in rank"),
    "bounds of different lengths": ("Slice", [MATRIX, ints(0, 0), ints(1), ints(0)], {}, "2 starts, 1 ends, 1 axes"),
    "too few scales": ("Resize", [MATRIX, np.zeros(0, np.float32), np.ones(1, np.float32) * 2], {},
                       r"1 scales or sizes for 2 axes"),
    "too few strides": ("Conv", [PLANES, KERNEL], {"strides": [2]}, r"strides \(2,\), dilations \(1, 1\)"),
    "too many dilations": ("Conv", [PLANES, KERNEL], {"dilations": [1, 1, 1], "auto_pad": "SAME_UPPER"},
                           r"dilations \(1, 1, 1\) of a kernel \(1, 1\)"),
    "a stride of nothing": ("MaxPool", [PLANES], {"kernel_shape": [1, 1], "strides": [0, 1]}, r"strides \(0, 1\)"),
    "too much output padding": ("ConvTranspose", [PLANES, PLANES[:, :1].repeat(4, 0)], {"output_padding": [0]},
                                r"output_padding \(0,\)"),
    "blocks of nothing": ("DepthToSpace", [PLANES], {"blocksize": 0}, "in blocks of 0"),
    "space in blocks of nothing": ("SpaceToDepth", [PLANES], {"blocksize": 0}, "in blocks of 0"),
    "no groups": ("GroupNormalization", [PLANES, np.ones(4, np.float32), np.ones(4, np.float32)], {"num_groups": 0},
                  "4 channels in 0 groups"),
    "how many": ("TopK", [MATRIX, ints()], {}, r"k is \(\), expected one number"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_said(name):
    op, arrays, attrs, said = CASES[name]
    proto = one_op(op, arrays, 2 if op == "TopK" else 1, constant=range(1, len(arrays)), **attrs)
    with pytest.raises(CompileError, match=said) as e:
        import_onnx(proto)
    assert f"{op}_0" in str(e.value)


def test_pieces_of_nothing():
    nodes = [helper.make_node("SplitToSequence", ["x", "n"], ["s"]), helper.make_node("SequenceLength", ["s"], ["y"])]
    proto = model(nodes, [value("x", [2, 3])], [value("y", [], np.int64)], {"n": np.array(0)})
    with pytest.raises(CompileError, match=r"SplitToSequence: into pieces of \(0,\)\n  at SplitToSequence_0"):
        import_onnx(proto)


@pytest.mark.parametrize("error", [ValueError("2 and 3"), ZeroDivisionError("by 0"), IndexError("3"), TypeError("no")])
def test_what_an_import_does_not_check_names_the_node_as_well(error):
    @imports("Elu", since=22)
    def elu(c, x, *, alpha):
        raise error

    with pytest.raises(CompileError, match=r"Elu: its operands and attributes do not fit together .*\n  at Elu_0") as e:
        import_onnx(one_op("Elu", [MATRIX], alpha=0.5))
    assert e.value.__cause__ is error
