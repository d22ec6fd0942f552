"""Ops made from ONNX's schemas: their text, their checks, and that they are apart from our own ops."""

from __future__ import annotations

import pytest
import torch

from moec.ir import CompileError, Dim, Graph, TensorType, all_ops, lookup, parse, run
from moec.ir.arrays import BYTES, NUMPY, from_numpy, to_numpy
from moec.ir.dims import evaluate
from moec.ir.interpreter import sizes_of
from moec.ir.ops.extern import inferred, op_name, split_name, table

POOL = """
graph(%x: f32[N, 3, 6, 6]) -> (%y: f32[N, 3, 3, 3], %i: i64[N, 3, 3, 3]) {
  %0: f32[N, 3, 3, 3], %1: i64[N, 3, 3, 3] = extern.MaxPool(%x) {version=12, types=[f32[N, 3, 3, 3], i64[N, 3, 3, 3]], slots=[0, 1], kernel_shape=[2, 2], strides=[2, 2]}
  return %0, %1
}
"""  # noqa: E501  (one node)


def test_text_and_meaning():
    graph = parse(POOL)
    assert parse(str(graph)) == graph
    x = torch.randn(2, 3, 6, 6)
    y, i = run(graph, [x])
    want, index = torch.nn.functional.max_pool2d(x, 2, return_indices=True)
    torch.testing.assert_close(y, want)
    offsets = torch.arange(6).reshape(2, 3, 1, 1) * 36  # ONNX counts over the whole tensor
    assert torch.equal(i, index + offsets)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("version=12", "version=0", "MaxPool is not in opset 0; it came with 1"),
        ("extern.MaxPool", "extern.MaxPol", "unknown op 'extern.MaxPol'"),
        ("strides=[2, 2]", "stride=[2, 2]", "has no attribute 'stride'"),
        ("version=12", "version=1", "has output size 2"),
        ("version=12, types", "version=7, types", "has output size 2"),
        ("(%x)", "(%x, %x)", "2 inputs"),
        ("(%x)", "()", "0 inputs"),
        ("f32[N, 3, 3, 3]", "f32[N, 3, 4, 3]", "ONNX's inference says"),
        ("i64[N, 3, 3, 3]", "i32[N, 3, 3, 3]", "ONNX's inference says i64"),
        ("f32[N, 3, 3, 3]", "f32[N, 3, 3]", "ONNX's inference says"),
        ("slots=[0, 1]", "slots=[0]", "1 results, 2 types"),
        ("kernel_shape=[2, 2]", "kernel_shape=[2, 2, 2]", "ONNX's inference refuses it"),
        ("f32[N, 3, 6, 6]", "i64[N, 3, 6, 6]", "tensor(int64)"),
    ],
)
def test_what_does_not_fit_is_refused(old, new, message):
    with pytest.raises(CompileError) as caught:
        parse(POOL.replace(old, new))
    assert message in str(caught.value)


def test_they_are_apart_from_our_ops():
    assert lookup("extern.Conv") is lookup("extern.Conv")
    assert not [o for o in all_ops() if o.family == "extern"]
    assert lookup("softmax").name == "math.softmax"
    with pytest.raises(CompileError, match="unknown op 'Conv'"):
        lookup("Conv")


def test_every_operator_of_onnx_has_an_op():
    for domain, op_type in table():
        name = op_name(domain, op_type)
        assert split_name(name) == (domain, op_type)
        assert lookup(name).name == name


def test_sizes_that_inference_does_not_know():
    graph = Graph()
    x = graph.add_input("x", TensorType("i64", (Dim("T"),)))
    types = (TensorType("i64", (Dim("n"),)),)
    y = graph.create("extern.Unique", [x], {"version": 11, "types": types, "slots": (0,)}).result
    graph.add_output(graph.create("tensor.full", [], {"shape": (Dim("n"),), "value": 1, "dtype": "i64"}).result, "ones")
    graph.add_output(y, "y")
    graph.verify()
    given = [torch.tensor([3, 1, 3, 2])]
    assert [t.tolist() for t in run(graph, given)] == [[1, 1, 1], [1, 2, 3]]
    assert sizes_of(graph, given) == {"T": 4, "n": 3}
    assert evaluate(y.shape[0], sizes_of(graph, given)) == 3


def test_inference_knows_symbols():
    op = lookup("extern.Concat").instance([], {"version": 13, "types": (), "slots": (0,), "captures": (), "axis": 0})
    types = [TensorType("f32", (Dim("T"), 4)), TensorType("f32", (2, 4))]
    assert inferred(op, types) == [("f32", [None, 4])]
    op = lookup("extern.Relu").instance([], {"version": 14, "types": (), "slots": (0,), "captures": ()})
    assert inferred(op, types[:1]) == [("f32", ["T", 4])]


@pytest.mark.parametrize("dtype", NUMPY)
def test_arrays_come_back(dtype):
    """Every element type as a NumPy array and back, bit by bit."""
    import numpy as np

    if dtype in BYTES:
        low = 0 if dtype.value.startswith("u") else -(2 ** (dtype.bits - 1))
        array = np.arange(low, low + 2**dtype.bits, dtype=np.int16).astype(NUMPY[dtype])
    elif dtype == "bool":
        array = np.array([True, False])
    else:
        array = np.frombuffer(bytes(range(256)), dtype=NUMPY[dtype])
    tensor = from_numpy(array)
    assert tensor.dtype == dtype.torch
    back = to_numpy(tensor)
    assert back.dtype == array.dtype
    assert back.tobytes() == array.tobytes()


def test_read_only_and_foreign_arrays():
    import numpy as np

    array = np.arange(6, dtype=">i4").reshape(2, 3).T
    array.flags.writeable = False
    assert from_numpy(array).tolist() == [[0, 3], [1, 4], [2, 5]]
    for order in "<>":
        assert from_numpy(np.arange(6, dtype=f"{order}f4")).tolist() == [0, 1, 2, 3, 4, 5]
    assert from_numpy(np.broadcast_to(np.float32(3), (2, 2))).add_(1).tolist() == [[4, 4], [4, 4]]
    for bad in (np.array(["a"]), np.array([None]), np.array([1], "datetime64[s]")):
        with pytest.raises(CompileError, match="not supported"):
            from_numpy(bad)
