"""What a model takes for granted of sizes, conditions that arguments decide, and arguments that are numbers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

import moec
from moec.frontend.onnx import import_onnx
from moec.ir import ArgumentTypeError, ArgumentValueError, CompileError

from .builders import TensorProto, agrees, helper, model, session, value

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def branch(name: str, nodes: list[onnx.NodeProto], out: str) -> onnx.GraphProto:
    return helper.make_graph(nodes, name, [], [helper.make_value_info(out, onnx.TypeProto())])


def squeezed(n: str | int = "n", more: list[onnx.NodeProto] | None = None) -> onnx.ModelProto:
    """torch's `squeeze(-1)` of an axis of unknown size, as its older exporter writes it, of a strided convolution; what
    follows takes two axes only, unless given otherwise."""
    squeeze = branch("then", [helper.make_node("Squeeze", ["h", "last"], ["s"])], "s")
    keep = branch("else", [helper.make_node("Identity", ["h"], ["k"])], "k")
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["h"], strides=[4]),
        helper.make_node("Shape", ["h"], ["shape"]),
        helper.make_node("Gather", ["shape", "last"], ["size"]),
        helper.make_node("Equal", ["size", "one"], ["is_one"]),
        helper.make_node("If", ["is_one"], ["v"], then_branch=squeeze, else_branch=keep),
        *(more or [helper.make_node("Gemm", ["v", "w"], ["y"])]),
    ]
    weights = {
        "kernel": floats(3, 2, 4),
        "last": np.array([-1]),
        "one": np.array([1]),
        "w": floats(3, 5),
    }
    return model(nodes, [value("x", ["b", 2, n])], [value("y", ["b", "m"])], weights, opset=16)


@pytest.mark.parametrize("backend", ["reference", "onnxruntime"])
def test_a_branch_that_must_be_taken_bounds_the_size(backend):
    """⌊(n − 4) / 4⌋ + 1 = 1 where 4 ≤ n ≤ 7: other sizes fail in ONNX Runtime too, and are refused by name."""
    proto = squeezed()
    imported = import_onnx(proto)
    assert not imported.extern
    assert imported.signature.bounds == {"n": (4, 7)}
    compiled = moec.compile(proto, backend=backend)
    for n in range(4, 8):
        agrees(compiled, proto, {"x": floats(2, 2, n)})
    for n in (3, 8):
        with pytest.raises(ArgumentValueError, match=f"dimension n is {n}"):
            compiled(torch.randn(2, 2, n))


def test_bounds_are_kept_in_saved_folders(tmp_path):
    moec.compile(squeezed(), backend="onnxruntime").save(tmp_path / "saved")
    with pytest.raises(ArgumentValueError, match="dimension n is 9"):
        moec.load(tmp_path / "saved")(torch.randn(2, 2, 9))


def test_a_known_size_decides():
    for n in (6, 12):
        proto = squeezed(n, [helper.make_node("Relu", ["v"], ["y"])])
        proto.graph.output[0].type.tensor_type.ClearField("shape")
        imported = import_onnx(proto)
        assert not imported.extern
        assert imported.graph.outputs[0].type.rank == (2 if n == 6 else 3)


def test_example_arguments_decide_where_both_ways_are_possible():
    proto = squeezed(more=[helper.make_node("Relu", ["v"], ["y"])])
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(CompileError, match="are both possible") as caught:
        import_onnx(proto)
    assert "example arguments" in str(caught.value)
    for n, bounds in ((5, (4, 7)), (13, (8, None))):
        compiled = moec.compile(proto, (torch.randn(2, 2, n),), backend="onnxruntime")
        agrees(compiled, proto, {"x": floats(3, 2, n)})
        assert import_onnx(proto, (torch.randn(2, 2, n),)).signature.bounds == {"n": bounds}


def test_a_reshape_that_fits_one_size_only():
    """[b, 3, h, n] → [b, 3, n]: a text line's height must be what its convolutions make one row of."""
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["h"], strides=[8, 1]),
        helper.make_node("Shape", ["h"], ["shape"]),
        helper.make_node("Gather", ["shape", "kept"], ["target"]),
        helper.make_node("Reshape", ["h", "target"], ["y"]),
    ]
    ins, outs = [value("x", ["b", 2, "?", "n"])], [value("y", ["b", 3, "m"])]
    proto = model(nodes, ins, outs, {"kernel": floats(3, 2, 8, 2), "kept": np.array([0, 1, 3])})
    imported = import_onnx(proto)
    assert not imported.extern
    ((symbol, bounds),) = imported.signature.bounds.items()
    assert bounds == (8, 15)
    compiled = moec.compile(proto, backend="onnxruntime")
    for b, h, n in ((2, 8, 5), (1, 15, 9)):
        agrees(compiled, proto, {"x": floats(b, 2, h, n)})
    with pytest.raises(ArgumentValueError, match=f"dimension {symbol} is 16"):
        compiled(torch.randn(1, 2, 16, 5))


def test_two_axes_called_question_mark_are_two_sizes():
    nodes = [helper.make_node("GlobalMaxPool", ["x"], ["y"])]
    proto = model(nodes, [value("x", ["?", 2, "?", "?"])], [value("y", ["?", 2, 1, 1])])
    agrees(moec.compile(proto, backend="onnxruntime"), proto, {"x": floats(3, 2, 5, 7)})


def test_sizes_without_names_that_must_be_equal():
    nodes = [helper.make_node("Concat", ["x", "z"], ["y"], axis=1)]
    proto = model(nodes, [value("x", [None, 2]), value("z", [None, 3])], [value("y", [None, 5])])
    imported = import_onnx(proto)
    assert not imported.extern
    assert imported.graph.inputs[0].shape[0] == imported.graph.inputs[1].shape[0]
    compiled = moec.compile(proto, backend="onnxruntime")
    agrees(compiled, proto, {"x": floats(3, 2), "z": floats(3, 3)})
    with pytest.raises(ArgumentValueError):
        compiled(torch.randn(3, 2), torch.randn(4, 3))


def switched() -> onnx.ModelProto:
    """Twice x or minus x, as an integer input says."""
    double = branch("then", [helper.make_node("Add", ["x", "x"], ["d"])], "d")
    negative = branch("else", [helper.make_node("Neg", ["x"], ["m"])], "m")
    nodes = [
        helper.make_node("Equal", ["rate", "wanted"], ["same"]),
        helper.make_node("If", ["same"], ["y"], then_branch=double, else_branch=negative),
    ]
    ins = [value("x", ["n", 4]), value("rate", [], np.int64)]
    return model(nodes, ins, [value("y", ["n", 4])], {"wanted": np.array(16000)}, opset=16)


@pytest.mark.parametrize("backend", ["reference", "onnxruntime"])
def test_a_number_takes_the_place_of_an_input(backend):
    proto, x = switched(), floats(3, 4)
    for rate in (16000, 8000):
        compiled = moec.compile(proto, kwargs={"rate": rate}, backend=backend)
        assert not any("extern" in op for op in compiled.graph.count_ops())
        got = compiled(torch.from_numpy(x), rate)
        (want,) = session(proto, {"x": x, "rate": np.array(rate)})
        np.testing.assert_array_equal(got[0].numpy(), want)
        with pytest.raises(ArgumentValueError, match="argument 'rate' was"):
            compiled(torch.from_numpy(x), rate + 1)
    open_ = moec.compile(proto, backend=backend)
    assert open_.graph.count_ops()["extern.If"] == 1
    for rate in (16000, 8000):
        agrees(open_, proto, {"x": x, "rate": np.array(rate)})


def test_wrong_arguments():
    for number in (0.5, 2**70, float("inf"), float("nan")):
        with pytest.raises(CompileError, match=r"input 'rate': is i64\[\], .* is none of those"):
            import_onnx(switched(), kwargs={"rate": number})
    with pytest.raises(CompileError, match="input 'x'"):
        import_onnx(switched(), (3, 16000))
    with pytest.raises(ArgumentTypeError, match="no argument 'rates'; there are x, rate"):
        import_onnx(switched(), kwargs={"rates": 1})
    with pytest.raises(ArgumentTypeError, match="given twice"):
        import_onnx(switched(), (torch.zeros(1, 4),), {"x": torch.zeros(1, 4)})
    with pytest.raises(ArgumentTypeError, match="expected 2 positional arguments, got 3"):
        import_onnx(switched(), (1, 2, 3))


def test_a_planted_difference_is_seen():
    proto = squeezed()
    compiled = moec.compile(proto, backend="onnxruntime")
    (weight,) = (t for t in proto.graph.initializer if t.name == "w")
    assert weight.data_type == TensorProto.FLOAT
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.01, "w"))
    with pytest.raises(AssertionError):
        agrees(compiled, proto, {"x": floats(2, 2, 5)})
