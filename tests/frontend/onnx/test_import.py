"""What comes in, and that it means what ONNX's evaluator says, on both backends, with passes and without."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

import moec
from moec.frontend.onnx import import_onnx, imports
from moec.ir import CompileError, run

from .builders import agrees, check, expected, helper, model, one_op, value

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


NATIVE = {
    "Add": ([floats(2, 3), floats(3)], {}),
    "Softmax axis 1": ([floats(2, 3, 4)], {"axis": 1}),
    "Gelu": ([floats(5)], {"approximate": "tanh"}),
    "ReduceMean": ([floats(2, 3, 4), ints(0, -1)], {"keepdims": 0}),
    "ReduceSum": ([floats(2, 3, 4)], {}),
    "LayerNormalization": ([floats(2, 3, 4), floats(3, 4), floats(3, 4)], {"axis": 1}),
    "MatMul": ([floats(4), floats(2, 4, 3)], {}),
    "Gemm": ([floats(4, 2), floats(3, 4), floats(3)], {"transA": 1, "transB": 1, "alpha": 0.5}),
    "Slice": ([floats(5, 6), ints(-3, 1), ints(9, -1), ints(0, 1), ints(1, 2)], {}),
    "Pad": ([floats(2, 3), ints(0, 1, 2, 0)], {}),
    "Transpose": ([floats(2, 3, 4)], {}),
    "Tile": ([floats(2, 3), ints(2, 1)], {}),
    "CumSum": ([floats(3, 4), np.array(1)], {}),
    "CumSum exclusive": ([floats(3, 4), np.array(0)], {"exclusive": 1}),
    "Trilu": ([floats(4, 5), np.array(1)], {"upper": 0}),
    "GatherElements": ([floats(3, 3), ints(-1, 0, 1).reshape(3, 1)], {"axis": 1}),
    "Gather": ([floats(5, 3), ints(4, -1)], {}),
    "Clip": ([floats(9), np.float32(-0.5), np.float32(0.25)], {}),
    "BatchNormalization": ([floats(2, 3, 2), floats(3), floats(3), floats(3), abs(floats(3))], {}),
    "Hardmax": ([floats(3, 4, 2).round()], {"axis": 1}),
    "Einsum": ([floats(3, 4), floats(4, 5)], {"equation": "ij,jk->ki"}),
    "Einsum of three, with a diagonal": ([floats(3, 3), floats(3, 4), floats(4, 2)], {"equation": "ii,ij...,j...->i"}),
    "Einsum with a batch": ([floats(2, 3, 4), floats(3, 5, 2, 4)], {"equation": "tkd, kftd -> ktf"}),
    "GatherND": ([floats(3, 4, 2), ints(0, -1, 2, 3).reshape(2, 2)], {}),
    "GatherND of rows": ([floats(3, 4), ints(-1, 0).reshape(2, 1)], {}),
    "Elu": ([floats(9) * 50], {"alpha": 0.5}),
    "Celu": ([floats(9)], {"alpha": 2.0}),
    "Selu": ([floats(9)], {}),
    "Shrink": ([floats(9)], {"lambd": 0.4, "bias": 0.1}),
    "IsInf": ([np.array([1, np.inf, -np.inf, np.nan], np.float32)], {"detect_negative": 0}),
    "IsInf of neither": ([np.array([np.inf, -np.inf], np.float32)], {"detect_negative": 0, "detect_positive": 0}),
    "ReduceLogSumExp": ([floats(2, 4) * 200, ints(1)], {"keepdims": 0}),
    "ArgMin": ([floats(3, 4).round()], {"axis": 1}),
    "GlobalAveragePool": ([floats(2, 3, 4, 5)], {}),
    "GlobalMaxPool": ([floats(2, 3, 4, 5)], {}),
    "Conv": ([floats(2, 4, 7, 8), floats(6, 4, 3, 2), floats(6)], {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
    "Conv of groups": ([floats(2, 4, 9), floats(6, 2, 3)], {"group": 2, "dilations": [2]}),
    "Conv padded to the same size": ([floats(2, 4, 7, 8), floats(6, 4, 3, 2)], {"auto_pad": "SAME_UPPER"}),
    "Conv padded in front": ([floats(2, 4, 7), floats(6, 4, 2)], {"auto_pad": "SAME_LOWER", "strides": [3]}),
    "Conv without padding": ([floats(1, 2, 4, 5, 3), floats(3, 2, 3, 2, 1)], {"auto_pad": "VALID"}),
    "Div of integers": ([ints(7, -7, 7, -8), ints(2, 2, -2, -4)], {}),
    "ScatterND": ([floats(4, 3), ints(-1, 0).reshape(2, 1), floats(2, 3)], {}),
    "ScatterND adds": ([floats(4, 3), ints(1, 2, 1, 2, -4, 0).reshape(3, 2), floats(3)], {"reduction": "add"}),
    "Compress": ([floats(4, 2), np.array([True, False, True, True])], {"axis": 0}),
    "Compress flat": ([floats(2, 2), np.array([False, True, True])], {}),
    "OneHot": ([ints(0, -1, 2, 7).reshape(2, 2), np.array(4), floats(2)], {"axis": 1}),
    "DepthToSpace": ([floats(1, 8, 2, 3)], {"blocksize": 2, "mode": "CRD"}),
    "SpaceToDepth": ([floats(1, 2, 4, 6)], {"blocksize": 2}),
    "HardSwish": ([floats(9)], {}),
    "Squeeze": ([floats(1, 3, 1), ints(0)], {}),
    "Expand": ([floats(3, 1), ints(2, 1, 4)], {}),
    "Dropout": ([floats(3, 4)], {}),
    "QuantizeLinear": ([floats(3, 4), np.float32(0.02), np.uint8(128)], {}),
    "DequantizeLinear": ([RNG.integers(0, 255, (3, 4), np.uint8), floats(4), np.zeros(4, np.uint8) + 7], {"axis": 1}),
}
# operands that are shapes, axes and the like: constants in most models
CONSTANT = {
    "ReduceMean": (1,), "ReduceLogSumExp": (1,), "OneHot": (1,), "Slice": (1, 2, 3, 4), "Pad": (1,), "Tile": (1,),
    "CumSum": (1,), "Trilu": (1,), "Clip": (1, 2), "Squeeze": (1,), "Expand": (1,),
}  # fmt: skip


@pytest.mark.parametrize("name", NATIVE)
def test_native_operators(name):
    arrays, attrs = NATIVE[name]
    arrays = [np.asarray(a) for a in arrays]
    op = name.split()[0]
    constant = CONSTANT.get(op, ())
    feeds = {f"x{i}": a for i, a in enumerate(arrays) if i not in constant}
    check(one_op(op, arrays, constant=constant, **attrs), feeds, native=True)


@pytest.mark.parametrize("name", ["Slice", "Pad", "Tile", "ReduceMean", "Expand"])
def test_shapes_known_only_at_run_time(name):
    """The same operators with their shapes and axes as inputs of the model: sizes of the results are new symbols."""
    arrays, attrs = NATIVE[name]
    arrays = [np.asarray(a) for a in arrays]
    attrs = {**attrs, "keepdims": 1} if name == "ReduceMean" else attrs
    imported = check(one_op(name, arrays, **attrs), {f"x{i}": a for i, a in enumerate(arrays)}, native=False)
    assert f"extern.{name}" in imported.graph.count_ops()


EXTERN = {
    "LpPool": ([floats(1, 2, 6, 6)], {"kernel_shape": [2, 2], "strides": [2, 2]}),
    "Unique": ([ints(3, 1, 3, 2)], {}),
    "Det": ([floats(3, 3)], {}),
    "Div of small integers": ([np.array([7, -7], np.int8), np.array([2, 2], np.int8)], {}),
    "ConstantOfShape": ([ints(2, 3)], {"value": onnx.numpy_helper.from_array(np.array([7], np.int64))}),
}


@pytest.mark.parametrize("name", EXTERN)
def test_extern_operators(name):
    arrays, attrs = EXTERN[name]
    imported = check(one_op(name.split()[0], arrays, **attrs), {f"x{i}": a for i, a in enumerate(arrays)}, native=False)
    assert list(imported.graph.count_ops()) == [f"extern.{name.split()[0]}"]


def test_l1_norm():
    """ONNX's evaluator sums without magnitudes here."""
    x = np.vstack([floats(2, 4), np.zeros((1, 4), np.float32)])
    graph = import_onnx(one_op("LpNormalization", [x], p=1, axis=1)).graph
    want = torch.nn.functional.normalize(torch.from_numpy(x), p=1.0, dim=1)
    for backend in ("reference", "onnxruntime"):
        torch.testing.assert_close(moec.compile(graph, backend=backend)(torch.from_numpy(x))[0], want)


def test_log_sum_exp_of_nothing():
    """ln Σ exp(−∞) is −∞; ONNX's evaluator gives NaN."""
    x = np.full((2, 3), -np.inf, np.float32)
    graph = import_onnx(one_op("ReduceLogSumExp", [x, ints(1)], constant=(1,), keepdims=0)).graph
    for backend in ("reference", "onnxruntime"):
        assert moec.compile(graph, backend=backend)(torch.from_numpy(x))[0].tolist() == [-np.inf] * 2


def test_wide_unsigned_integers():
    x = np.array([2**63 + 1, 5, 2**32], np.uint64)
    check(one_op("Add", [x, x[:1] // 3], opset=14), {"x0": x, "x1": x[:1] // 3}, native=False)
    check(one_op("Transpose", [x.reshape(3, 1)]), {"x0": x.reshape(3, 1)}, native=True)


@pytest.mark.parametrize("opset", [1, 6, 7, 9, 11, 13, 18, 21, 23, 24, 25, 27])
def test_opsets(opset):
    """The same reduction, as each opset writes it; and an operator that has changed since, beside new ones."""
    x = floats(2, 3, 4)
    if opset >= 18:
        proto = one_op("ReduceMax", [x, ints(1)], opset=opset, constant=(1,))
    else:
        proto = one_op("ReduceMax", [x], opset=opset, axes=[1])
    check(proto, {"x0": x}, native=True)


def test_softmax_meant_something_else_before_opset_13():
    x = floats(2, 3, 4)
    old, new = (import_onnx(one_op("Softmax", [x], opset=o, axis=1)).graph for o in (12, 13))
    assert run(old, [torch.from_numpy(x)])[0].sum() == pytest.approx(2.0)
    assert run(new, [torch.from_numpy(x)])[0].sum() == pytest.approx(8.0)
    for backend in ("reference", "onnxruntime"):
        got = moec.compile(one_op("Softmax", [x], opset=11, axis=1), backend=backend)(torch.from_numpy(x))[0]
        torch.testing.assert_close(got, torch.from_numpy(x).flatten(1).softmax(1).reshape(2, 3, 4))


def test_an_old_operator_beside_our_ops():
    """The model of a graph is written in one opset: what has changed since is converted."""
    nodes = [
        helper.make_node("Upsample", ["x", "s"], ["u"]),
        helper.make_node("LeakyRelu", ["u"], ["v"]),
        helper.make_node("ReduceMean", ["v"], ["y"], axes=[3]),
    ]
    x = floats(1, 1, 2, 2)
    proto = model(nodes, [value("x", [1, 1, 2, 2])], [value("y", [1, 1, 4, 1])],
                  {"s": np.array([1, 1, 2, 2], np.float32)}, opset=9)  # fmt: skip
    got = moec.compile(proto, backend="onnxruntime")(torch.from_numpy(x))[0]
    want = expected(proto, {"x": x})[0]
    torch.testing.assert_close(got, torch.from_numpy(want))


def test_dynamic_sizes_flow_through_shape_arithmetic():
    """x [B, S, 8] → heads [B, S, 2, 4] by Shape, Gather, Concat and Reshape, as exporters write it."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["b"]),
        helper.make_node("Gather", ["shape", "one"], ["s"]),
        helper.make_node("Unsqueeze", ["b", "axis"], ["b1"]),
        helper.make_node("Unsqueeze", ["s", "axis"], ["s1"]),
        helper.make_node("Concat", ["b1", "s1", "heads"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["h"]),
        helper.make_node("Transpose", ["h"], ["y"], perm=[0, 2, 1, 3]),
    ]
    weights = {"zero": np.array(0), "one": np.array(1), "axis": ints(0), "heads": ints(2, 4)}
    proto = model(nodes, [value("x", ["B", "S", 8])], [value("y", ["B", 2, "S", 4])], weights)
    imported = import_onnx(proto)
    assert imported.graph.count_ops() == {"tensor.reshape": 1, "tensor.transpose": 1}
    compiled = moec.compile(imported.graph, backend="onnxruntime")
    for b, s in ((2, 3), (1, 1), (0, 5), (4, 0)):
        x = floats(b, s, 8)
        check(proto, {"x": x}, native=True)
        assert compiled(torch.from_numpy(x))[0].shape == (b, 2, s, 4)


@pytest.mark.parametrize(("start", "end"), [(1, 2**63 - 1), (0, -1), (-2, 9), (2, 4), (-1, -3), (3, 1), (-9, 2)])
def test_slices_of_an_axis_of_unknown_size(start, end):
    """Bounds beyond the axis are those of NumPy, whatever the size turns out to be."""
    nodes = [helper.make_node("Slice", ["x", "start", "end", "axes"], ["y"])]
    weights = {"start": ints(start), "end": ints(end), "axes": ints(1)}
    proto = model(nodes, [value("x", [2, "S"])], [value("y", [2, "R"])], weights)
    for n in (0, 1, 2, 3, 7):
        x = floats(2, n)
        graph = check(proto, {"x": x}, native=True).graph
        np.testing.assert_array_equal(run(graph, [torch.from_numpy(x)])[0].numpy(), x[:, start:end])


def test_neighbours_are_as_long_as_each_other():
    """x[:, 1:] − x[:, :-1], which masks of packed sequences are made of, stays in our ops."""
    nodes = [helper.make_node("Slice", ["x", "one", "most", "one"], ["late"]),
             helper.make_node("Slice", ["x", "zero", "last", "one"], ["early"]),
             helper.make_node("Sub", ["late", "early"], ["y"])]  # fmt: skip
    weights = {"one": ints(1), "zero": ints(0), "last": ints(-1), "most": ints(2**63 - 1)}
    proto = model(nodes, [value("x", ["B", "S"])], [value("y", ["B", "R"])], weights)
    for n in (0, 1, 5):
        check(proto, {"x": floats(2, n)}, native=True)


def test_names_order_and_locations():
    nodes = [helper.make_node("Add", ["left", "right"], ["sum"], name="/model/add"),
             helper.make_node("Neg", ["sum"], ["negated"])]  # fmt: skip
    nodes[0].metadata_props.add(key="pkg.torch.onnx.stack_trace", value='File "/home/me/net.py", line 7, in forward')
    proto = model(nodes, [value("left", [2]), value("right", [2])], [value("negated", [2]), value("sum", [2])])
    graph = import_onnx(proto).graph
    assert [v.name for v in graph.inputs] == ["left", "right"]
    assert graph.output_names == ["negated", "sum"]
    first, second = graph.nodes
    assert first.location.describe() == "/model/add net.py:7"
    assert second.location.describe() == "Neg_1"
    compiled = moec.compile(proto, backend="reference")
    negated, total = compiled(right=torch.ones(2), left=torch.zeros(2))
    assert (negated.tolist(), total.tolist()) == ([-1, -1], [1, 1])


def function(name: str, nodes: list[onnx.NodeProto], inputs: list[str], outputs: list[str]) -> onnx.FunctionProto:
    return helper.make_function("local", name, inputs, outputs, nodes,
                                [helper.make_opsetid("", 22), helper.make_opsetid("local", 1)])  # fmt: skip


def test_functions_are_inlined():
    twice = function("Twice", [helper.make_node("Add", ["a", "a"], ["b"])], ["a"], ["b"])
    outer = function("Outer", [helper.make_node("Twice", ["p"], ["q"], domain="local"),
                               helper.make_node("Twice", ["q"], ["r"], domain="local")], ["p"], ["r"])  # fmt: skip
    proto = model([helper.make_node("Outer", ["x"], ["y"], domain="local")], [value("x", [3])], [value("y", [3])],
                  functions=[twice, outer], domains=["local"])  # fmt: skip
    assert check(proto, {"x": floats(3)}, native=True).graph.count_ops() == {"math.add": 2}


def branches(condition_known: bool) -> onnx.ModelProto:
    then = helper.make_graph([helper.make_node("Add", ["x", "w"], ["t"])], "then", [], [value("t", [2])])
    other = helper.make_graph([helper.make_node("Mul", ["x", "w"], ["e"])], "else", [], [value("e", [2])])
    node = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    weights = {"w": floats(2)} | ({"c": np.array(False)} if condition_known else {})
    inputs = [value("x", [2])] + ([] if condition_known else [value("c", [], np.bool_)])
    return model([node], inputs, [value("y", [2])], weights)


def test_a_known_branch_takes_the_place_of_its_condition():
    imported = check(branches(True), {"x": floats(2)}, native=True)
    assert imported.graph.count_ops() == {"math.mul": 1}


@pytest.mark.parametrize("condition", [True, False])
def test_a_branch_known_at_run_time_keeps_its_bodies(condition):
    proto = branches(False)
    imported = check(proto, {"x": floats(2), "c": np.array(condition)}, native=False)
    assert imported.graph.count_ops() == {"extern.If": 1}


def loop(count_known: bool) -> onnx.ModelProto:
    body = helper.make_graph(
        [helper.make_node("Mul", ["v", "x"], ["w"]), helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [value("i", [], np.int64), value("go", [], np.bool_), value("v", [2])],
        [value("on", [], np.bool_), value("w", [2])],
    )
    node = helper.make_node("Loop", ["n", "", "x"], ["y"], body=body)
    weights = {"n": np.array(3)} if count_known else {}
    inputs = [value("x", [2])] + ([] if count_known else [value("n", [], np.int64)])
    return model([node], inputs, [value("y", [2])], weights)


def test_loops():
    """ONNX's evaluator does not run a loop without a condition, so the expected values are written out."""
    x = torch.from_numpy(floats(2))
    known = import_onnx(loop(True)).graph
    assert known.count_ops() == {"math.mul": 3}
    torch.testing.assert_close(run(known, [x])[0], x**4)
    for backend in ("reference", "onnxruntime"):
        compiled = moec.compile(loop(False), backend=backend)
        for n in (0, 1, 4):
            torch.testing.assert_close(compiled(x, torch.tensor(n))[0], x ** (n + 1))


def test_sequences_and_strings_are_refused_by_name():
    sequence = helper.make_tensor_sequence_value_info("x", 1, [2])
    proto = model([helper.make_node("ConcatFromSequence", ["x"], ["y"], axis=0)], [sequence], [value("y", [4])])
    with pytest.raises(CompileError, match="input 'x': is a sequence"):
        import_onnx(proto)
    nodes = [helper.make_node("SplitToSequence", ["x"], ["s"]), helper.make_node("SequenceAt", ["s", "i"], ["y"])]
    proto = model(nodes, [value("x", [2]), value("i", [], np.int64)], [value("y", [1])])
    with pytest.raises(CompileError, match="the position is not a constant number"):
        import_onnx(proto)
    proto = model(nodes[:1], [value("x", [2])], [helper.make_tensor_sequence_value_info("s", 1, [1])])
    with pytest.raises(CompileError, match="output 's' is a sequence"):
        import_onnx(proto)
    sequence = helper.make_tensor_sequence_value_info("s", 1, None)
    branch = helper.make_graph(nodes[:1], "branch", [], [sequence])
    node = helper.make_node("If", ["c"], ["s"], then_branch=branch, else_branch=branch)
    proto = model([node], [value("x", [2]), value("c", [], np.bool_)], [sequence])
    with pytest.raises(CompileError, match="'s' is a sequence, no tensor"):
        import_onnx(proto)
    text = helper.make_tensor_value_info("x", onnx.TensorProto.STRING, [2])
    proto = model([helper.make_node("Identity", ["x"], ["y"])], [text], [text])
    with pytest.raises(CompileError, match="elements of type string"):
        import_onnx(proto)


def test_sequences_inside_a_graph_are_resolved():
    """Pieces of x, put together in another order: no sequence is left."""
    nodes = [
        helper.make_node("SplitToSequence", ["x", "sizes"], ["s"], axis=0),
        helper.make_node("SequenceAt", ["s", "last"], ["a"]),
        helper.make_node("SequenceErase", ["s", "last"], ["t"]),
        helper.make_node("Identity", ["t"], ["u"]),
        helper.make_node("SequenceInsert", ["u", "a", "zero"], ["v"]),
        helper.make_node("SequenceLength", ["v"], ["n"]),
        helper.make_node("ConcatFromSequence", ["v"], ["y"], axis=0),
    ]
    weights = {"sizes": ints(1, 2, 1), "last": np.array(-1), "zero": np.array(0)}
    outs = [value("y", [4, 3]), value("n", [], np.int64)]
    x = floats(4, 3)
    graph = check(model(nodes, [value("x", [4, 3])], outs, weights), {"x": x}, native=True).graph
    y, n = run(graph, [torch.from_numpy(x)])
    np.testing.assert_array_equal(y.numpy(), x[[3, 0, 1, 2]])
    assert n == 3
    stacked = [helper.make_node("SequenceConstruct", ["x", "x"], ["s"]),
               helper.make_node("ConcatFromSequence", ["s"], ["y"], axis=1, new_axis=1)]  # fmt: skip
    check(model(stacked, [value("x", [4, 3])], [value("y", [4, 2, 3])]), {"x": x}, native=True)


@pytest.mark.parametrize("place", [-3, -2, -1, 0, 2, 3, -4])
def test_places_in_a_sequence_are_counted_from_either_end(place):
    """-n up to n for an insertion into n items; a negative one is n more."""
    nodes = [
        helper.make_node("SplitToSequence", ["x"], ["s"]),
        helper.make_node("SequenceInsert", ["s", "z", "at"], ["t"]),
        helper.make_node("ConcatFromSequence", ["t"], ["y"], axis=0),
    ]
    proto = model(nodes, [value("x", [3]), value("z", [1])], [value("y", [4])], {"at": np.array(place)})
    if place == -4:
        with pytest.raises(CompileError, match="position -4 of 3"):
            import_onnx(proto)
    else:
        # ONNX's evaluator takes n for 0
        agrees(moec.compile(proto, backend="reference"), proto, {"x": floats(3), "z": floats(1)})


def test_an_attribute_that_an_import_does_not_take_is_not_ignored():
    @imports("Elu", since=22)
    def elu(c, x):
        return c.b.neg(x)

    x = floats(3)
    check(one_op("Elu", [x], alpha=0.5), {"x0": x}, native=False)
    assert not import_onnx(one_op("Elu", [x])).extern  # without it the import is asked


def test_triton_refuses_extern_by_name_and_falls_back():
    x = floats(3, 3)
    proto = one_op("Det", [x])
    with pytest.raises(CompileError, match=r"extern.Det cannot run on triton: no kernels for ONNX operators"):
        moec.compile(proto, backend="triton")
    compiled = moec.compile(proto, backend="triton", fallback="reference")
    torch.testing.assert_close(compiled(torch.from_numpy(x))[0], torch.from_numpy(x).det())
