"""Bad files and malformed models: one clear error each, and nothing outside of the model's folder is read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import moec
from moec.frontend.onnx import control, import_onnx
from moec.ir import CompileError

from .builders import helper, model, value

W = np.arange(8, dtype=np.float32).reshape(2, 4)


def saved(folder: Path, **entries: str) -> Path:
    """A model whose weight lies in w.bin beside it; `entries` replace those of its external data."""
    proto = model([helper.make_node("Add", ["x", "w"], ["y"])], [value("x", [2, 4])], [value("y", [2, 4])])
    w = proto.graph.initializer.add(name="w", data_type=1, dims=[2, 4], data_location=onnx.TensorProto.EXTERNAL)
    for k, v in ({"location": "w.bin", "offset": "4", "length": "32"} | entries).items():
        w.external_data.add(key=k, value=v)
    (folder / "w.bin").write_bytes(b"____" + W.tobytes())
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    return folder / "m.onnx"


def refused(source: object, *words: str, code: str | None = None) -> CompileError:
    with pytest.raises(CompileError) as caught:
        import_onnx(source)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert code is None or caught.value.code == code
    return caught.value


def test_external_data_is_read_when_it_is_needed(tmp_path):
    path = saved(tmp_path)
    graph = import_onnx(path).graph
    x = torch.ones(2, 4)
    for backend in ("reference", "onnxruntime"):
        torch.testing.assert_close(moec.compile(path, backend=backend)(x)[0], x + torch.from_numpy(W))
    (tmp_path / "w.bin").write_bytes(b"____" + (2 * W).tobytes())
    torch.testing.assert_close(graph.weights["w"].weight.load(), torch.from_numpy(2 * W))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"location": "../w.bin"}, ["'../w.bin' is not inside the model's folder"]),
        ({"location": "a/../../w.bin"}, ["is not inside"]),
        ({"location": "/etc/passwd"}, ["is not inside"]),
        ({"location": "C:/w.bin"}, ["is not inside"]),
        ({"location": "..\\w.bin"}, ["is not inside"]),
        ({"location": ""}, ["is no place"]),
        ({"location": "missing.bin"}, ["cannot read 'missing.bin'", "No such file"]),
        ({"location": "."}, ["external data"]),
        ({"offset": "-4"}, ["is no place"]),
        ({"offset": "four"}, ["is no place"]),
        ({"length": "-1"}, ["is no place"]),
        ({"length": "16"}, ["has 32 bytes, its external data 16"]),
        ({"offset": "8"}, ["ends at byte 40 of 'w.bin', which has 36"]),
        ({"offset": str(2**63)}, ["ends at byte"]),
    ],
)
def test_places_of_external_data(tmp_path, entries, words):
    error = refused(saved(tmp_path, **entries), *words)
    assert "'w'" in error.message


@pytest.mark.parametrize("kind", ["symlink", "hard link", "fifo", "folder", "link in the path"])
def test_links_and_pipes_are_no_data(tmp_path, kind):
    folder = tmp_path / "model"
    folder.mkdir()
    path = saved(folder, **({"location": "sub/w.bin"} if kind == "link in the path" else {}))
    outside = tmp_path / "secret"
    outside.write_bytes((folder / "w.bin").read_bytes())
    (folder / "w.bin").unlink()
    if kind == "symlink":
        (folder / "w.bin").symlink_to(outside)
    elif kind == "hard link":
        os.link(outside, folder / "w.bin")
    elif kind == "fifo":
        os.mkfifo(folder / "w.bin")
    elif kind == "folder":
        (folder / "w.bin").mkdir()
    else:
        (tmp_path / "elsewhere").mkdir()
        outside.rename(tmp_path / "elsewhere" / "w.bin")
        (folder / "sub").symlink_to(tmp_path / "elsewhere")
    what = {"symlink": "by a link", "link in the path": "by a link", "hard link": "is a hard link"}
    refused(path, what.get(kind, "is no regular file"), code="external-data")


def test_a_file_that_is_replaced_after_the_check(tmp_path):
    path = saved(tmp_path)
    weight = import_onnx(path).graph.weights["w"].weight
    (tmp_path / "w.bin").unlink()
    (tmp_path / "w.bin").symlink_to("/etc/passwd")
    with pytest.raises(CompileError, match="by a link"):
        weight.load()
    (tmp_path / "w.bin").unlink()
    (tmp_path / "w.bin").write_bytes(b"short")
    with pytest.raises(CompileError, match="has become shorter"):
        weight.load()


def test_a_folder_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    """Between the last look at a folder on the way and the opening of the file in it."""
    folder, outside = tmp_path / "model", tmp_path / "outside"
    for at, data in ((folder / "sub", W), (outside, 7 * W)):
        at.mkdir(parents=True)
        (at / "w.bin").write_bytes(b"____" + data.tobytes())
    weight = import_onnx(saved(folder, location="sub/w.bin")).graph.weights["w"].weight
    opening = os.open

    def swapped(path, *args, **kwargs):
        if Path(path).name == "w.bin" and not (folder / "sub").is_symlink():
            (folder / "sub").rename(folder / "was")
            (folder / "sub").symlink_to(outside)
        return opening(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", swapped)
    torch.testing.assert_close(weight.load(), torch.from_numpy(W))
    with pytest.raises(CompileError, match="by a link"):
        weight.load()


def test_external_data_of_a_model_in_memory(tmp_path):
    proto = onnx.ModelProto.FromString(saved(tmp_path).read_bytes())
    refused(proto, "a model in memory has no folder")


@pytest.mark.parametrize("content", [b"", b"\x08\x07garbage", b"PK\x03\x04", b"\x80\x04\x95pickle"])
def test_files_that_are_no_models(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    refused(tmp_path / "m.onnx", "m.onnx" if content != b"PK\x03\x04" else "")


def test_missing_files_and_folders(tmp_path):
    refused(tmp_path / "none.onnx", "No such file")
    (tmp_path / "d.onnx").mkdir()
    refused(tmp_path / "d.onnx", "is no file")


def test_truncation_at_every_length(tmp_path):
    data = saved(tmp_path).read_bytes()
    for end in range(0, len(data), 7):
        (tmp_path / "m.onnx").write_bytes(data[:end])
        with pytest.raises(CompileError):
            import_onnx(tmp_path / "m.onnx")


ADD = helper.make_node("Add", ["x", "w"], ["y"], name="add")
X, Y = value("x", [2]), value("y", [2])
W2 = {"w": np.zeros(2, np.float32)}


def with_tensor(**fields: object) -> onnx.ModelProto:
    proto = model([ADD], [X], [Y])
    proto.graph.initializer.append(onnx.TensorProto(name="w", **fields))
    return proto


MALFORMED = {
    "missing initializer": (lambda: model([ADD], [X], [Y]), ["Add reads 'w'", "at add"]),
    "missing output": (lambda: model([ADD], [X], [value("z", [2])], W2), ["output 'z' is no input"]),
    "two inputs of a name": (lambda: model([ADD], [X, X], [Y], W2), ["duplicate input names: x"]),
    "two outputs of a name": (lambda: model([ADD], [X], [Y, Y], W2), ["duplicate output names"]),
    "defined twice": (lambda: model([ADD, ADD], [X], [Y], W2), ["'y' is defined twice"]),
    "input defined again": (
        lambda: model([helper.make_node("Neg", ["x"], ["x"])], [X], [X]),
        ["'x' is defined twice"],
    ),
    "cycle": (
        lambda: model([helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Neg", ["a"], ["b"])], [X],
                      [value("a", [2])]),
        ["the graph has a cycle"],
    ),
    "unknown operator": (
        lambda: model([helper.make_node("Adds", ["x", "w"], ["y"])], [X], [Y], W2),
        ["unknown operator Adds", "did you mean 'Add'?"],
    ),
    "unknown domain": (
        lambda: model([helper.make_node("Op", ["x"], ["y"], domain="my.ops")], [X], [Y], domains=["my.ops"]),
        ["unknown operator my.ops.Op"],
    ),
    "domain that is not imported": (
        lambda: model([helper.make_node("Op", ["x"], ["y"], domain="my.ops")], [X], [Y]),
        ["the model imports no opset of my.ops"],
    ),
    "operator of a later opset": (
        lambda: model([helper.make_node("Gelu", ["x"], ["y"])], [X], [Y], opset=13),
        ["Gelu is not in opset 13; it came with 20"],
    ),
    "removed operator": (
        lambda: model([helper.make_node("Upsample", ["x", "w"], ["y"])], [X], [Y], W2, opset=13),
        ["Upsample was removed from ONNX in opset 10"],
    ),
    "unknown opset": (lambda: model([ADD], [X], [Y], W2, opset=99), ["is of opset 99; 1 to"]),
    "opset 0": (lambda: model([ADD], [X], [Y], W2, opset=0), ["is of opset 0"]),
    "wrong shapes": (
        lambda: model([ADD], [X], [Y], {"w": np.zeros(3, np.float32)}),
        ["at add", "do not broadcast"],
    ),
    "wrong element types": (lambda: model([ADD], [X], [Y], {"w": np.zeros(2, np.int64)}), ["at add"]),
    "wrong declared output": (lambda: model([ADD], [X], [value("y", [3])], W2), ["output 'y' is declared f32[3]"]),
    "too many operands": (
        lambda: model([helper.make_node("Neg", ["x", "w"], ["y"])], [X], [Y], W2),
        ["Neg: takes 1 to 1 operands in opset 22, got 2", "at Neg_0"],
    ),
    "too many outputs": (
        lambda: model([helper.make_node("Neg", ["x"], ["y", "z"])], [X], [Y]),
        ["Neg: gives 1 outputs in opset 22, 2 are named", "at Neg_0"],
    ),
    "missing attribute": (
        lambda: model([helper.make_node("Concat", ["x", "w"], ["y"])], [X], [value("y", [4])], W2),
        ["Concat: attribute 'axis' is missing"],
    ),
    "unknown attribute": (
        lambda: model([helper.make_node("Neg", ["x"], ["y"], axis=1)], [X], [Y]),
        ["Neg: has no attribute 'axis' in opset 22"],
    ),
    "missing operand": (
        lambda: model([helper.make_node("Add", ["", "w"], ["y"])], [], [Y], W2),
        ["Add: operand 'A' is missing"],
    ),
    "negative size": (lambda: with_tensor(data_type=1, dims=[-2]), ["negative size"]),
    "product overflow": (lambda: with_tensor(data_type=1, dims=[2**40, 2**40]), ["larger than any memory"]),
    "truncated data": (lambda: with_tensor(data_type=1, dims=[2], raw_data=b"1234"), ["truncated or malformed"]),
    "too much data": (lambda: with_tensor(data_type=1, dims=[2], float_data=[1, 2, 3]), ["truncated or malformed"]),
    "huge without data": (lambda: with_tensor(data_type=1, dims=[2**34]), ["truncated or malformed"]),
    "unknown element type": (lambda: with_tensor(data_type=77, dims=[2], raw_data=b"12345678"), ["element type 77"]),
    "unknown rank": (
        lambda: model([ADD], [helper.make_tensor_value_info("x", 1, None)], [Y], W2),
        ["input 'x'", "its rank must be known"],
    ),
    "no graph": (onnx.ModelProto, ["holds no graph"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_models(name):
    make, words = MALFORMED[name]
    refused(make(), *words)


def function(name: str, callee: str) -> onnx.FunctionProto:
    return helper.make_function("f", name, ["a"], ["b"], [helper.make_node(callee, ["a"], ["b"], domain="f")],
                                [helper.make_opsetid("", 22), helper.make_opsetid("f", 1)])  # fmt: skip


@pytest.mark.parametrize("cycle", [["A"], ["A", "B"], ["A", "B", "C"]])
def test_recursive_functions(cycle):
    functions = [function(n, cycle[(i + 1) % len(cycle)]) for i, n in enumerate(cycle)]
    proto = model([helper.make_node("A", ["x"], ["y"], domain="f")], [X], [Y], functions=functions, domains=["f"])
    refused(proto, "recursive function: f.A")


def test_functions_of_another_opset():
    body = [helper.make_node("Softmax", ["x"], ["y"], axis=1)]
    soft = helper.make_function("my", "Soft", ["x"], ["y"], body, [helper.make_opsetid("", 11)])
    proto = model([helper.make_node("Soft", ["x"], ["y"], domain="my")], [X], [Y], functions=[soft], domains=["my"])
    refused(proto, "function my.Soft is of opset 11 of ai.onnx, the model of opset 22", "not supported",
            code="unsupported-model")  # fmt: skip


def test_functions_that_expand_without_end():
    """Each function calls the one before it ten times: 10¹² nodes in a file of a few kilobytes."""
    functions = [helper.make_function("f", "F0", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])],
                                      [helper.make_opsetid("", 22)])]  # fmt: skip
    for i in range(1, 13):
        names = ["a", *(f"v{k}" for k in range(9)), "b"]
        calls = [helper.make_node(f"F{i - 1}", [names[k]], [names[k + 1]], domain="f") for k in range(10)]
        imports = [helper.make_opsetid("", 22), helper.make_opsetid("f", 1)]
        functions.append(helper.make_function("f", f"F{i}", ["a"], ["b"], calls, imports))
    call = helper.make_node("F12", ["x"], ["y"], domain="f")
    refused(model([call], [X], [Y], functions=functions, domains=["f"]), "expand to 1000000000000 nodes", code="size")


def test_loops_that_unroll_without_end(monkeypatch):
    monkeypatch.setattr(control, "MOST_NODES", 500)
    body = helper.make_graph(
        [helper.make_node("Neg", ["v"], ["w"]), helper.make_node("Identity", ["g"], ["h"])],
        "body",
        [value("i", [], np.int64), value("g", [], np.bool_), value("v", [2])],
        [value("h", [], np.bool_), value("w", [2])],
    )
    for depth in range(4):
        loop = helper.make_node("Loop", ["n", "", "v"], ["w"], body=body)
        inputs = [value(f"i{depth}", [], np.int64), value(f"g{depth}", [], np.bool_), value("v", [2])]
        keep = helper.make_node("Identity", [f"g{depth}"], [f"h{depth}"])
        body = helper.make_graph([loop, keep], "body", inputs, [value(f"h{depth}", [], np.bool_), value("w", [2])])
    outer = helper.make_node("Loop", ["n", "", "x"], ["y"], body=body)
    refused(model([outer], [X], [Y], {"n": np.array(60)}), "loops unroll to more than", code="size")


@pytest.mark.parametrize(
    "make",
    [
        lambda: (helper.make_node("ConstantOfShape", ["s"], ["y"]), {"s": np.array([2**20, 2**20])}),
        lambda: (helper.make_node("Expand", ["v", "s"], ["y"]), {"v": np.array(1), "s": np.array([2**20, 2**20])}),
        lambda: (helper.make_node("Tile", ["v", "s"], ["y"]), {"v": np.zeros((2, 2)), "s": np.array([2**19, 2**19])}),
        lambda: (helper.make_node("Range", ["a", "b", "c"], ["y"]),
                 {"a": np.array(0), "b": np.array(2**40), "c": np.array(1)}),
        lambda: (helper.make_node("Pad", ["v", "s"], ["y"]),
                 {"v": np.zeros((1, 1)), "s": np.array([0, 0, 2**20, 2**20])}),
    ],
)  # fmt: skip
def test_huge_constants_are_not_computed(make, monkeypatch):
    """While importing and in the passes: the types say how large they are."""
    computed = []
    monkeypatch.setattr("onnx.reference.ReferenceEvaluator", lambda *_: computed.append(1))
    node, weights = make()
    outs = [helper.make_value_info("y", onnx.TypeProto())]
    graph = import_onnx(model([node], [], outs, weights)).graph
    after, _ = moec.passes.default_pipeline().run(graph)
    assert not computed
    assert all(not isinstance(s, int) or s <= 2**41 for s in after.outputs[0].shape)


LONG = ["(a+b)**16**16", "+".join("ab" * 40), "(a+b)*" * 12 + "a", "(" * 90]


@pytest.mark.parametrize("text", [*LONG, "f32", "1x", "é", " ", "a b", "-1", "2*N", "N+1"])
def test_names_of_sizes(text):
    """Whatever a model calls a size: an expression where it is a short one, else a name."""
    x = value("x", [text, 2])
    graph = import_onnx(model([helper.make_node("Neg", ["x"], ["y"])], [x], [x.__class__(name="y")])).graph
    assert moec.parse(str(graph)) == graph
    if text == "2*N":
        assert str(graph.inputs[0].type) == "f32[2*N, 2]"


def test_nodes_out_of_order_are_sorted():
    nodes = [helper.make_node("Neg", ["a"], ["y"]), helper.make_node("Abs", ["x"], ["a"])]
    graph = import_onnx(model(nodes, [X], [Y])).graph
    assert [n.op for n in graph.nodes] == ["math.abs", "math.neg"]


def test_deep_chains_and_deep_bodies():
    chain = [helper.make_node("Neg", [f"v{i}"], [f"v{i + 1}"]) for i in range(3000)]
    graph = import_onnx(model(chain, [value("v0", [2])], [value("v3000", [2])])).graph
    assert len(graph) == 3000
    body = helper.make_graph([helper.make_node("Neg", ["x"], ["z"])], "body", [], [value("z", [2])])
    for _ in range(20):
        node = helper.make_node("If", ["c"], ["z"], then_branch=body, else_branch=body)
        del node.attribute[1:]
        body = helper.make_graph([node], "body", [], [value("z", [2])])
    proto = model(body.node, [X, value("c", [], np.bool_)], [value("z", [2])])
    refused(proto, "nested more than 16 deep")


def test_the_model_is_not_changed():
    nodes = [helper.make_node("Neg", ["a"], ["y"]), helper.make_node("Abs", ["x"], ["a"])]
    proto = model(nodes, [X], [Y])
    before = proto.SerializeToString(deterministic=True)
    import_onnx(proto)
    assert proto.SerializeToString(deterministic=True) == before
