"""ONNX models that ask an importer for more than they hold. Malformed ones: tests/frontend/onnx/test_files.py."""

from __future__ import annotations

import contextlib
import os
import pickle

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import moec
from moec.ir import CompileError

from .effects import harmless, refused
from .limits import limited
from .test_sizes import peak

N = 2**31  # elements: 8 to 16 GiB


def model(
    nodes: list, constants: dict[str, np.ndarray], result: int = TensorProto.FLOAT, functions=()
) -> onnx.ModelProto:
    """x [1] f32, and `nodes` that make y [M] of it."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", result, None)],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("f", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


FOLDS = {
    "ConstantOfShape": ([helper.make_node("ConstantOfShape", ["n"], ["c"])], {"n": i64(N)}),
    "Range": (
        [helper.make_node("Range", ["a", "b", "s"], ["c"])],
        {"a": np.int64(0), "b": np.int64(N), "s": np.int64(1)},
    ),
    "Expand": ([helper.make_node("Expand", ["v", "n"], ["c"])], {"v": i64(1), "n": i64(N)}),
    "Tile": ([helper.make_node("Tile", ["v", "n"], ["c"])], {"v": i64(1), "n": i64(N)}),
    "Pad": ([helper.make_node("Pad", ["v", "n"], ["c"])], {"v": i64(1), "n": i64(0, N)}),
    "OneHot": (
        [helper.make_node("OneHot", ["v", "n", "w"], ["c"])],
        {"v": i64(1), "n": np.int64(N), "w": i64(0, 1)},
    ),
    "EyeLike of ConstantOfShape": (
        [helper.make_node("ConstantOfShape", ["n"], ["e"]), helper.make_node("EyeLike", ["e"], ["c"])],
        {"n": i64(2**15, 2**16)},
    ),
    "a ladder of Concat": (
        [helper.make_node("Concat", [f"c{i}"] * 8, [f"c{i + 1}" if i < 10 else "c"], axis=0) for i in range(11)],
        {"c0": i64(1, 2)},
    ),
    "a ladder of outer products": (
        [
            helper.make_node("MatMul", ["a", "b"], ["m"]),
            helper.make_node("Reshape", ["m", "s"], ["r"]),
            helper.make_node("Reshape", ["m", "t"], ["q"]),
            helper.make_node("MatMul", ["r", "q"], ["c"]),
        ],
        {"a": np.ones((256, 1), np.int64), "b": np.ones((1, 256), np.int64), "s": i64(-1, 1), "t": i64(1, -1)},
    ),
    "Resize": (
        [helper.make_node("Resize", ["v", "", "", "n"], ["c"], mode="nearest")],
        {"v": np.ones((1, 1, 1), np.float32), "n": i64(1, 1, N)},
    ),
}


@limited(seconds=20)
@pytest.mark.parametrize("name", FOLDS)
def test_constants_are_not_folded_into_more_than_they_are(name):
    """Importing and compiling take no memory for the result, whatever becomes of it when it is run."""
    nodes, constants = FOLDS[name]
    rest = [
        helper.make_node("Cast", ["c"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["f"], ["r"], keepdims=0),
        helper.make_node("Add", ["r", "x"], ["y"]),
    ]
    before = peak()
    with contextlib.suppress(CompileError):
        moec.compile(model([*nodes, *rest], constants), backend="reference")
    assert peak() - before < 512 << 20


@limited(seconds=60)
def test_functions_that_multiply():
    """Forty functions that each use the next one twice."""
    functions = []
    for i in range(40):
        inner = [("f", f"F{i + 1}")] * 2 if i < 39 else [("", "Relu")]
        nodes = [
            helper.make_node(
                op, ["a" if k == 0 else f"v{k - 1}"], ["b" if k == len(inner) - 1 else f"v{k}"], domain=domain
            )
            for k, (domain, op) in enumerate(inner)
        ]
        functions.append(
            helper.make_function(
                "f", f"F{i}", ["a"], ["b"], nodes, [helper.make_opsetid("", 23), helper.make_opsetid("f", 1)]
            )
        )
    with refused("nodes|functions|calls"):
        moec.compile(model([helper.make_node("F0", ["x"], ["y"], domain="f")], {}, functions=functions))


@limited(seconds=60)
def test_loops_without_end_are_not_unrolled():
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Add", ["s", "s"], ["t"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("d", TensorProto.BOOL, []),
            helper.make_tensor_value_info("t", TensorProto.FLOAT, [1]),
        ],
    )
    for count in (2**62, 10**6):
        proto = model(
            [helper.make_node("Loop", ["m", "k", "x"], ["y"], body=body)], {"m": np.int64(count), "k": np.bool_(True)}
        )
        before = peak()
        with contextlib.suppress(CompileError):
            moec.compile(proto, backend="reference")
        assert peak() - before < 512 << 20


@limited(wall=60)
def test_a_model_file_that_becomes_something_else(tmp_path):
    """A FIFO, a device or a folder in its place: no waiting, no reading without end."""
    path = tmp_path / "m.onnx"
    onnx.save(model([helper.make_node("Relu", ["x"], ["y"])], {}), path)
    moec.compile(path, backend="reference")
    for make in (lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero"), path.mkdir):
        path.unlink()
        make()
        with refused("is no file"):
            moec.compile(path, backend="reference")
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
        path.touch()


@limited()
def test_pickles_and_huge_files(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'fired'}",))

    path = tmp_path / "m.onnx"
    path.write_bytes(pickle.dumps(Bomb()))
    with harmless(), pytest.raises(CompileError):
        moec.compile(path)
    path.write_bytes(b"")
    os.truncate(path, 1 << 40)
    with refused("1099511627776 bytes"):
        moec.compile(path)
    assert not (tmp_path / "fired").exists()
