"""Grouped products, counts of ids and divisions as exporters write them, built by hand; and forms that look alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

import moec
from moec.frontend.onnx import import_onnx

from .builders import agrees, helper, model, value

RNG = np.random.default_rng(0)
E, K, N = 4, 9, 10  # matrices of more elements than constants are folded of


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def node(op: str, ins: str, outs: str, **attrs: Any) -> onnx.NodeProto:
    return helper.make_node(op, ins.split(), outs.split(), **attrs)


CONSTANTS = {
    "w": floats(E, K, N), "zeros": np.zeros(E, np.float32), "one": np.float32(1), "bin": np.float32((E - 1) / E),
    "low": np.array(0), "high": np.array(E - 1), "axis": np.array(0), "first": np.array([0]), "step": np.array(1),
    "flat": np.array([-1]), "two": np.array(2), "true": np.array(True), "last": np.array([-1]),
}  # fmt: skip
# the ids of the best of E scores, sorted with their places, and how often each occurs: histc as torch's exporter has it
SORTED = [
    node("ArgMax", "scores", "ids", axis=1, keepdims=0),
    node("Shape", "ids", "count"),
    node("TopK", "ids count", "ordered order", axis=0, largest=0),
    node("Cast", "ordered", "wide", to=1),
    node("Div", "wide bin", "part"),
    node("Cast", "part", "binned", to=7),
    node("Clip", "binned low high", "clamped"),
    node("Shape", "clamped", "many"),
    node("Expand", "one many", "ones"),
    node("ScatterElements", "zeros clamped ones", "histogram", reduction="add"),
    node("Cast", "histogram", "counts", to=7),
    node("Gather", "x order", "rows"),
]
RANGES = [
    node("CumSum", "counts axis", "ends"),
    node("Split", "ends", "e0 e1 e2 e3", num_outputs=E),
    node("Split", "w", "w0 w1 w2 w3", num_outputs=E),
    *[node("Squeeze", f"e{i} first", f"end{i}") for i in range(E)],
    *[node("Range", f"{f'end{i - 1}' if i else 'low'} end{i} step", f"range{i}") for i in range(E)],
    *[node("Gather", f"rows range{i}", f"x{i}", axis=0) for i in range(E)],
    *[node("Squeeze", f"w{i} first", f"m{i}") for i in range(E)],
    *[node("MatMul", f"x{i} m{i}", f"y{i}") for i in range(E)],
    node("Concat", "y0 y1 y2 y3", "y", axis=0),
]
SPLIT = [
    node("Split", "rows counts", "x0 x1 x2 x3"),
    *[node("MatMul", f"x{i} own{i}", f"y{i}") for i in range(E)],
    node("Concat", "y0 y1 y2 y3", "y", axis=0),
]


def built(nodes: list[onnx.NodeProto], **weights: np.ndarray) -> onnx.ModelProto:
    own = {f"own{i}": m for i, m in enumerate(CONSTANTS["w"])}
    used = {name for n in nodes for name in n.input}
    constants = {n: a for n, a in {**CONSTANTS, **own, **weights}.items() if n in used}
    ins = [value("x", ["T", K]), value("scores", ["T", E])]
    return model(nodes, ins, [value("y", ["R", N])], constants, opset=20)


def run_at_sizes(proto: onnx.ModelProto) -> dict[str, int]:
    for backend in ("reference", "onnxruntime"):
        compiled = moec.compile(proto, backend=backend)
        for tokens in (9, 1, 0):
            agrees(compiled, proto, {"x": floats(tokens, K), "scores": floats(tokens, E)})
    return import_onnx(proto).graph.count_ops()


@pytest.mark.parametrize("tail", [RANGES, SPLIT], ids=["ranges", "split"])
def test_one_product_for_each_group_is_a_grouped_product(tail):
    counts = run_at_sizes(built([*SORTED, *tail]))
    assert (counts["linear.grouped_matmul"], counts["tensor.histc"], counts["math.sort"]) == (1, 1, 1)
    assert not any(op.startswith("extern") for op in counts)


def test_many_experts():
    """Zeros of so many bins are no small constant, and bins are cut at other places."""
    experts = 300
    nodes = [n for n in SORTED if n.op_type != "Gather"]
    nodes.append(node("Cast", "counts", "y", to=1))
    given = {"zeros": np.zeros(experts, np.float32), "bin": np.float32((experts - 1) / experts)}
    proto = built(nodes, **given, high=np.array(experts - 1))
    proto.graph.input[1].type.tensor_type.shape.dim[1].dim_value = experts
    proto.graph.output[0].CopyFrom(value("y", [experts]))
    del proto.graph.input[0]
    assert import_onnx(proto).graph.count_ops()["tensor.histc"] == 1
    agrees(moec.compile(proto, backend="onnxruntime"), proto, {"scores": floats(500, experts)})


def test_groups_in_another_order_are_left():
    """The third group's rows with the second's matrix."""
    tail = [*RANGES[:-5], *[node("MatMul", f"x{i} m{j}", f"y{i}") for i, j in enumerate((0, 2, 1, 3))], RANGES[-1]]
    assert "linear.grouped_matmul" not in run_at_sizes(built([*SORTED, *tail]))


def test_counts_of_something_else_are_left():
    """Each expert counted twice: the rows do not add up. It fails in ONNX Runtime too."""
    nodes = [*SORTED[:-2], node("Cast", "histogram", "once", to=7), node("Add", "once once", "counts"), SORTED[-1]]
    counts = import_onnx(built([*nodes, *RANGES])).graph.count_ops()
    assert "linear.grouped_matmul" not in counts


def test_bins_that_are_cut_elsewhere_are_left():
    nodes = [*SORTED, *RANGES]
    counts = import_onnx(built(nodes, bin=np.float32(1.5))).graph.count_ops()
    assert "tensor.histc" not in counts
    assert "linear.grouped_matmul" not in counts


def test_division_with_a_correction_for_negative_numbers():
    """⌊a / 2⌋ as torch's exporter writes it, of places, which are never negative; and of numbers that may be."""
    tail = [
        node("Less", "a low", "negative"),
        node("Equal", "negative true", "differ"),
        node("Mod", "a two", "rest"),
        node("Cast", "rest", "uneven", to=9),
        node("And", "differ uneven", "down"),
        node("Cast", "down", "less", to=7),
        node("Div", "a two", "towards"),
        node("Sub", "towards less", "half"),
        node("Gather", "x half", "y"),
    ]
    proto = built([*SORTED[:3], node("Identity", "order", "a"), *tail])
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = K
    counts = import_onnx(proto).graph.count_ops()
    assert counts["math.floordiv"] == 1
    assert not {"math.mod", "math.sign", "math.and", "math.sub"} & counts.keys()
    for backend in ("reference", "onnxruntime"):
        agrees(moec.compile(proto, backend=backend), proto, {"x": floats(8, K), "scores": floats(8, E)})
    other = model(tail[:-1], [value("a", ["n"], np.int64)], [value("half", ["n"], np.int64)],
                  {n: CONSTANTS[n] for n in ("low", "true", "two")}, opset=20)  # fmt: skip
    for backend in ("reference", "onnxruntime"):
        agrees(moec.compile(other, backend=backend), other, {"a": np.array([-3, -2, -1, 0, 1, 5])})


def test_rows_that_a_loop_collects_are_stacked():
    """ONNX's own evaluator joins them end to end; the sizes are known, the number of iterations is one of them."""
    body = helper.make_graph(
        [node("Add", "s x", "t"), node("Identity", "c", "going"), node("Identity", "t", "row")],
        "body",
        [value("i", [], np.int64), helper.make_tensor_value_info("c", 9, []), value("s", [2, 3])],
        [helper.make_tensor_value_info("going", 9, []), value("t", [2, 3]), value("row", [2, 3])],
    )
    nodes = [
        node("Shape", "n", "many"),
        node("Squeeze", "many", "count"),
        helper.make_node("Loop", ["count", "", "x"], ["last", "y"], body=body),
    ]
    ins, outs = [value("x", [2, 3]), value("n", ["N"])], [value("y", ["N", 2, 3])]
    proto = model(nodes, ins, outs, opset=20)
    loop = import_onnx(proto).graph.find("extern.Loop")[0]
    assert [str(s) for s in loop.results[-1].shape] == ["N", "2", "3"]
    for backend in ("reference", "onnxruntime"):
        compiled = moec.compile(proto, backend=backend)
        for n in (4, 1):
            agrees(compiled, proto, {"x": floats(2, 3), "n": floats(n)})
