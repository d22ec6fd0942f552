"""Feeding, running, tapping, saving and loading; errors that name what is wrong."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from moec.backends import get_backend
from moec.ir import (
    ArgumentTypeError,
    ArgumentValueError,
    ArtifactError,
    Builder,
    CompileError,
    Graph,
    Location,
    Weight,
    run,
)

from .conftest import agrees, compiled, graph_of, typed, weight

FLOATS = {"f64": 1e-14, "f32": 1e-6, "f16": 2e-3, "bf16": 2e-2}


def mlp(rng: torch.Generator, dtype: str = "f32") -> Graph:
    w = torch.randn(6, 4, generator=rng).to(typed(dtype).dtype.torch)
    return graph_of({"x": typed(dtype, "T", 4)}, lambda b, x: b.silu(b.op("linear.linear", [x, weight(b, "w", w)])))


@pytest.mark.parametrize("dtype", FLOATS)
def test_float_dtypes_at_the_edges(dtype: str, rng: torch.Generator):
    exe = compiled(mlp(rng, dtype))
    for t in (0, 1, 5):
        got = agrees(exe, [torch.randn(t, 4, generator=rng).to(typed(dtype).dtype.torch)], rtol=FLOATS[dtype])
        assert got[0].dtype == typed(dtype).dtype.torch


@pytest.mark.parametrize("dtype", ["i64", "i32", "i16", "i8", "u8"])
def test_integer_arithmetic_wraps_and_rounds_like_torch(dtype: str):
    info = torch.iinfo(typed(dtype).dtype.torch)
    low, high = max(info.min, -120), min(info.max, 120)
    a = torch.tensor([low, high, 7, -7 if low else 7, 0, 1]).to(typed(dtype).dtype.torch)
    c = torch.tensor([3, 5, 2, 2, 4, high]).to(typed(dtype).dtype.torch)
    types = {"a": typed(dtype, "N"), "c": typed(dtype, "N")}

    def build(b: Any, x: Any, y: Any) -> Any:
        elementwise = (b.add(x, y), b.mul(x, y), b.sub(x, y), b.floordiv(x, y), b.mod(x, y), b.max(x, y), b.min(x, y))
        signs = (b.neg(x), b.abs(x), b.sign(x), b.relu(x), b.clamp(x, low=1, high=5), b.where(b.lt(x, y), x, y))
        scans = (b.sum(x, axes=(0,)), b.amax(x, axes=(0,)), b.cumsum(x, axis=0), b.argmax(x), *b.sort(x), b.eq(x, y))
        return (*elementwise, *signs, *scans, b.pad(x, before=(1,), after=(0,), value=3), b.cast(x, dtype="f32"))

    agrees(compiled(graph_of(types, build)), [a, c])


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_awkward_floats(dtype: str):
    """NaN, infinities, signed zeros, ties of rounding."""
    inf, nan = torch.inf, torch.nan
    a = torch.tensor([nan, inf, -inf, 0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -3.0, 3.0, 1.0, 1e30, -100.0, 1e-12])
    c = torch.tensor([1.0, nan, 2.0, 1.0, -1.0, 0.1, -0.4, inf, -inf, 2.0, -2.0, 0.1, 3.0, 0.0, 1.0])
    a, c = a.to(typed(dtype).dtype.torch), c.to(typed(dtype).dtype.torch)
    types = {"a": typed(dtype, "N"), "c": typed(dtype, "N")}

    def build(b: Any, x: Any, y: Any) -> Any:
        binary = (b.max(x, y), b.min(x, y), b.floordiv(x, y), b.mod(x, y), b.div(x, y), b.pow(x, y))
        compare = (b.eq(x, y), b.ne(x, y), b.lt(x, y), b.ge(x, y), b.isnan(x))
        unary = (b.relu(x), b.sign(x), b.round(x), b.floor(x), b.abs(x), b.silu(x), b.log1p(x), b.clamp(x, low=-1.0))
        more = (b.softplus(x), b.sigmoid(x), b.tanh(x), b.argmax(x), b.amax(x, axes=(0,)), b.amin(y, axes=(0,)))
        more += (b.softmax(x), b.log_softmax(x), b.log_softmax(b.where(b.isnan(x), y, x)))
        z = b.min(x, 1e38)  # NaN ties with +∞ in ONNX Runtime's orders
        order = (*b.sort(z), *b.sort(z, descending=True), *b.topk(z, k=4), b.cast(x, dtype="bool"))
        return (*binary, *compare, *unary, *more, *order)

    exe = compiled(graph_of(types, build))
    want, got = run(exe.graph, [a, c]), exe.run([a, c])
    for g, w, v in zip(got, want, exe.graph.outputs, strict=True):
        torch.testing.assert_close(g, w, rtol=2e-6, atol=1e-7, equal_nan=True, msg=lambda m, v=v: f"{v}: {m}")


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_reducing_an_empty_axis(dtype: str):
    def build(b: Any, x: Any) -> Any:
        y = b.gt(x, 0.0)
        sums = (b.sum(x, axes=(0,)), b.mean(x, axes=(0,)), b.all(y, axes=(0,)), b.any(y, axes=(0,)))
        return (*sums, b.softmax(x, axis=0), b.log_softmax(x, axis=0), b.cumsum(x, axis=0))

    exe = compiled(graph_of({"x": typed(dtype, "N", 3)}, build))
    for n in (0, 1, 4):
        agrees(exe, [torch.randn(n, 3).to(typed(dtype).dtype.torch)])


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_small_values_of_sigmoid(dtype: str):
    exe = compiled(graph_of({"x": typed(dtype, "N")}, lambda b, x: b.sigmoid(x)))
    x = torch.tensor(
        [-800.0, -300.0, -80.0, -40.0, -18.0, -1.0, -0.0, 0.0, 40.0, 800.0, torch.inf, -torch.inf, torch.nan]
    )
    x = x.to(typed(dtype).dtype.torch)
    (got,), (want,) = exe.run([x]), run(exe.graph, [x])
    torch.testing.assert_close(got, want, rtol=1e-6 if dtype == "f32" else 1e-14, atol=0.0, equal_nan=True)


def test_small_values_of_float64_silu():
    exe = compiled(graph_of({"x": typed("f64", "N")}, lambda b, x: (b.silu(x), b.swiglu(x, x))))
    x = torch.tensor([-800.0, -300.0, -40.0, -1.0, 0.0, 40.0, 800.0, torch.inf, torch.nan], dtype=torch.float64)
    for got, want in zip(exe.run([x]), run(exe.graph, [x]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-14, atol=0.0, equal_nan=True)


def test_a_computed_bias_that_is_read_elsewhere_too(rng: torch.Generator):
    """A fusion of ONNX Runtime removes what computes it."""

    def build(b: Any, x: Any, w: Any, c: Any) -> Any:
        bias = b.slice(c, axis=0, end=2)
        return b.op("linear.linear", [x, w, bias]), bias

    exe = compiled(graph_of({"x": typed("f32", 2, 3, 4), "w": typed("f32", 2, 4), "c": typed("f32", 4)}, build))
    agrees(exe, [torch.randn(s, generator=rng) for s in ((2, 3, 4), (2, 4), (4,))])


def test_inputs_that_are_not_plain(rng: torch.Generator):
    """Transposed, strided, expanded, requiring gradients, 0-d, and bool inputs; torch's memory is not kept."""
    types = {"x": typed("f32", "A", "B"), "s": typed("f32"), "m": typed("bool", "B")}
    exe = compiled(graph_of(types, lambda b, x, s, m: (b.where(m, b.mul(x, s), x), b.not_(m))))
    s, m = torch.tensor(3.0, requires_grad=True), torch.tensor([True, False, True, False])[::2]
    for x in (torch.randn(2, 5).T, torch.randn(10, 4)[::2, ::2], torch.randn(1, 2).expand(3, 2), torch.randn(0, 2)):
        agrees(exe, [x, s, m])
    x = torch.randn(3, 2)
    first = exe.run([x, s, m])
    kept = [t.clone() for t in first]
    exe.run([x + 1, s, m])
    assert all(torch.equal(a, c) for a, c in zip(first, kept, strict=True))


def test_outputs_that_are_inputs_weights_or_repeated(rng: torch.Generator):
    g = Graph("edges")
    x = g.add_input("x", typed("f32", "N"))
    y = Builder(g).neg(x)
    for v, name in ((x, "x"), (y, "y"), (y, "again"), (weight(Builder(g), "y", torch.ones(2)), "weight")):
        g.add_output(v, name)
    agrees(compiled(g), [torch.randn(3)])


def test_names_that_collide():
    """Inputs, outputs and weights may share a name in the IR."""
    g = Graph("names")
    x = g.add_input("a", typed("f32", 2))
    b = Builder(g)
    g.add_output(b.add(b.mul(x, weight(b, "a", torch.tensor([2.0, 3.0]))), x), "a")
    agrees(compiled(g), [torch.randn(2)])


def test_wrong_inputs_are_named(rng: torch.Generator):
    exe = compiled(
        graph_of({"ids": typed("i64", "B", "S"), "mask": typed("i64", "B", "S")}, lambda b, x, m: b.mul(x, m))
    )
    good = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ArgumentTypeError, match="expected 2 tensor inputs"):
        exe.run([good])
    with pytest.raises(ArgumentTypeError, match="'mask' has dtype f32, expected i64"):
        exe.run([good, good.float()])
    with pytest.raises(ArgumentValueError, match=r"'ids' has rank 1 .* expected rank 2"):
        exe.run([good[0], good])
    with pytest.raises(ArgumentValueError, match="'mask' axis 1 has size 4, expected 3"):
        exe.run([good, torch.zeros(2, 4, dtype=torch.int64)])


def located_gather() -> Graph:
    g = Graph("gather")
    table, index = g.add_input("table", typed("f32", "V", 2)), g.add_input("index", typed("i64", "N"))
    b = Builder(g, location=Location.at("model.embed", "model.py", 12))
    g.add_output(b.gather(table, index))
    return g


def test_runtime_error_names_op_and_location():
    exe = compiled(located_gather())
    with pytest.raises(CompileError) as caught:
        exe.run([torch.zeros(3, 2), torch.tensor([0, 5])])
    assert caught.value.code == "onnxruntime"
    assert caught.value.location.module == "model.embed"
    assert "tensor.gather failed while running" in str(caught.value)
    assert "model.py:12" in str(caught.value)


def test_node_names_lead_to_the_ir(tmp_path: Path):
    compiled(located_gather()).save(tmp_path)
    names = [n.name for n in onnx.load(tmp_path / "model.onnx").graph.node]
    assert "model.embed/tensor.gather_0:Gather" in names


def test_what_has_no_f64_kernel_is_refused():
    graph = graph_of({"x": typed("f64", 3)}, lambda b, x: b.erf(x))
    node = next(iter(graph.nodes))
    assert "no f64 kernel" in get_backend("onnxruntime").missing(node)
    graph = graph_of({"x": typed("f64", 3)}, lambda b, x: b.gelu(x, approximate="tanh"))
    agrees(compiled(graph), [torch.randn(3, dtype=torch.float64)], rtol=1e-14)


def test_unknown_option_is_an_error(rng: torch.Generator):
    with pytest.raises(ArgumentValueError, match="no option 'portabel'"):
        compiled(mlp(rng), portabel=True)
    with pytest.raises(ArgumentValueError, match="experts='best'"):
        compiled(mlp(rng), experts="best")


def test_portable_has_standard_operators_only(tmp_path: Path, rng: torch.Generator):
    def build(b: Any, x: Any) -> Any:
        y, total = b.add_rms(b.silu(x), x, weight(b, "g", torch.ones(4)))
        return b.swiglu(y, total)

    for portable in (False, True):
        exe = compiled(graph_of({"x": typed("f32", "T", 4)}, build), portable=portable)
        agrees(exe, [torch.randn(3, 4, generator=rng)])
        exe.save(tmp_path / str(portable))
        model = onnx.load(tmp_path / str(portable) / "model.onnx")
        assert ("com.microsoft" in {n.domain for n in model.graph.node}) is not portable
        assert ("com.microsoft" in {o.domain for o in model.opset_import}) is not portable
        onnx.checker.check_model(model)


def test_tap(rng: torch.Generator):
    """Every value of the lowered graph, in its IR dtype; inputs and weights too."""
    graph = mlp(rng, "bf16")
    exe = compiled(graph)
    x = torch.randn(3, 4, generator=rng).bfloat16()
    wanted = [graph.inputs[0], *graph.weights.values(), *(r for n in graph.nodes for r in n.results)]
    seen: dict[Any, torch.Tensor] = {}
    run(graph, [x], tap=lambda v, t: seen.__setitem__(v, t))
    tapped = exe.tap([x], wanted)
    assert set(tapped) == set(wanted)
    for v in (graph.inputs[0], *(r for n in graph.nodes for r in n.results)):
        torch.testing.assert_close(tapped[v], seen[v], rtol=2e-2, atol=1e-2)
    with pytest.raises(CompileError, match="is not a value of the lowered graph"):
        exe.tap([x], [graph.clone().outputs[0]])


def test_stats(rng: torch.Generator):
    stats = compiled(mlp(rng)).stats
    assert stats["weight_bytes"] >= 6 * 4 * 4
    assert stats["nodes"] > 1
    assert stats["load_seconds"] > 0


# -- save and load ------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, rng: torch.Generator) -> tuple[Graph, Path]:
    w = torch.randn(64, 32, generator=rng)
    graph = graph_of({"x": typed("f32", "T", 32)}, lambda b, x: b.op("linear.linear", [x, weight(b, "w", w)]))
    compiled(graph, portable=True).save(tmp_path / "a")
    return graph, tmp_path / "a"


def test_save_and_load_are_bit_equal(saved: tuple[Graph, Path], rng: torch.Generator):
    graph, folder = saved
    assert sorted(p.name for p in folder.iterdir()) == ["model.onnx", "model.onnx.data", "onnxruntime.json"]
    exe = get_backend("onnxruntime").load(graph, folder, threads=1)
    x = torch.randn(5, 32, generator=rng)
    assert torch.equal(exe.run([x])[0], compiled(graph, portable=True).run([x])[0])
    assert exe.options.portable
    node = next(iter(graph.nodes))
    assert torch.equal(exe.tap([x], [node.result])[node.result], exe.run([x])[0])


def test_large_models_go_through_a_file(saved: tuple[Graph, Path], rng: torch.Generator, monkeypatch: Any):
    from moec.backends.onnxruntime import session

    monkeypatch.setattr(session, "IN_MEMORY", 0)
    agrees(compiled(saved[0]), [torch.randn(2, 32, generator=rng)])


def load(saved: tuple[Graph, Path]) -> None:
    get_backend("onnxruntime").load(saved[0], saved[1])


def relocate(folder: Path, location: str, **entries: str) -> None:
    """Point the weights of the model elsewhere."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
            entry.value = entries.get(entry.key, entry.value)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


@pytest.mark.parametrize("where", ["../secret", "/etc/hostname", "other.data", "./model.onnx.data", "model.onnx"])
def test_external_data_stays_in_its_file(saved: tuple[Graph, Path], where: str):
    (saved[1].parent / "secret").write_bytes(b"0" * 100_000)
    relocate(saved[1], where)
    with pytest.raises(ArtifactError, match=re.escape("not model.onnx.data")):
        load(saved)


@pytest.mark.parametrize(("key", "value"), [("offset", "99999999"), ("offset", "-8"), ("length", "4"), ("offset", "x")])
def test_external_data_stays_in_bounds(saved: tuple[Graph, Path], key: str, value: str):
    relocate(saved[1], "model.onnx.data", **{key: value})
    with pytest.raises(ArtifactError):
        load(saved)


def test_truncated_data(saved: tuple[Graph, Path]):
    with open(saved[1] / "model.onnx.data", "r+b") as f:
        f.truncate(100)
    with pytest.raises(ArtifactError, match="has 100 bytes"):
        load(saved)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "onnxruntime.json"])
@pytest.mark.parametrize("how", ["missing", "symlink", "hardlink", "fifo", "folder"])
def test_files_that_are_not_plain(saved: tuple[Graph, Path], name: str, how: str):
    path = saved[1] / name
    moved = saved[1].parent / "moved"
    path.rename(moved)
    if how == "symlink":
        path.symlink_to(moved)
    elif how == "hardlink":
        os.link(moved, path)
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    with pytest.raises(ArtifactError):
        load(saved)


@pytest.mark.parametrize("content", [b"", b"\x00" * 50, b"garbage" * 9])
def test_corrupt_model(saved: tuple[Graph, Path], content: bytes):
    (saved[1] / "model.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        load(saved)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"experts": "best"}', '{"bogus": 1}', '{"portable": "yes"}'])
def test_corrupt_options(saved: tuple[Graph, Path], text: str):
    (saved[1] / "onnxruntime.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"onnxruntime\.json"):
        load(saved)


def test_model_of_another_graph(saved: tuple[Graph, Path]):
    other = graph_of({"y": typed("f32", "T", 32)}, lambda b, x: b.neg(x))
    with pytest.raises(ArtifactError, match=r"inputs .*'x'.* the graph has .*'y'"):
        get_backend("onnxruntime").load(other, saved[1])


def test_failed_save_leaves_nothing(tmp_path: Path, rng: torch.Generator):
    class Broken:
        def load(self) -> torch.Tensor:
            raise OSError("gone")

    graph = mlp(rng)
    exe = compiled(graph)
    v = graph.weights["w"]
    v.weight = Weight("w", v.type, Broken())
    with pytest.raises(OSError, match="gone"):
        exe.save(tmp_path / "a")
    assert not list((tmp_path / "a").glob("*"))


def test_options_are_json(saved: tuple[Graph, Path]):
    expected = {"portable": True, "experts": "auto", "memory": "fast", "huge_pages": True}
    assert json.loads((saved[1] / "onnxruntime.json").read_text()) == expected
