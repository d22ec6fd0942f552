"""`moec.compare`: that it agrees where it should, and finds the node where it should not."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import moec
from moec.backends import get_backend
from moec.comparing import transport
from moec.graph_file import load_graph
from moec.ir import ArgumentValueError, Builder, Dim, Graph, TensorType, Weight
from moec.passes.pipeline import Pipeline
from moec.program import Settings
from moec.testing import assert_backends_agree

from .faulty import FaultyBackend, scaled


def test_backends_agree(mlp, mlp_args):
    comparison = assert_backends_agree(mlp, mlp_args)
    assert comparison.ok
    assert comparison.first_divergence is None
    assert [o.output for o in comparison.outputs] == ["y", "kept"]
    text = str(comparison)
    assert "onnxruntime" in text
    assert "ΣK" in text
    assert text.strip().endswith("ok")


@pytest.mark.parametrize(("op", "module"), [("norm.rms", "norm"), ("linear.linear", "up"), ("math.silu", "act")])
@pytest.mark.parametrize("factor", [1.01, 0.99, 1.0001])
def test_the_first_faulty_node_is_named(mlp, mlp_args, op, module, factor):
    faulty = FaultyBackend(op, scaled(factor))
    comparison = moec.compare(mlp, mlp_args, backends=("reference", faulty))
    assert not comparison.ok
    found = comparison.first_divergence
    assert found.node.op == op
    assert found.location.startswith(module)
    assert found.error > found.tolerance > 0
    assert str(found) in str(comparison)
    assert "NOT ok" in str(comparison)
    with pytest.raises(AssertionError, match="backends disagree"):
        assert_backends_agree(mlp, mlp_args, backends=("reference", faulty))


def test_isolated_names_only_faulty_nodes(mlp, mlp_args):
    faulty = FaultyBackend("math.silu", scaled(1.01))
    comparison = moec.compare(mlp, mlp_args, backends=("reference", faulty), isolated=True)
    assert {n.op for n in comparison.nodes if not n.ok} == {"math.silu"}
    assert {n.op for n in comparison.nodes if n.ok} == {"norm.rms", "linear.linear"}
    assert not comparison.ok
    assert comparison.first_divergence.node.op == "math.silu"
    assert "3" in str(comparison)


def test_wrong_integers_are_seen(mlp, mlp_args):
    graph = moec.parse("graph(%i: i64[T]) -> (%j: i64[T]) {\n  %0: i64[T] = math.neg(%i)\n  return %0\n}")
    faulty = FaultyBackend("math.neg", lambda value, tensor: tensor + 1)
    assert not moec.compare(graph, (torch.arange(3),), backends=("reference", faulty)).ok


@pytest.mark.parametrize("quantize", ["fp8", "fp8-weight-only"])
def test_fp8_is_judged_node_by_node(mlp, mlp_args, quantize):
    comparison = assert_backends_agree(mlp, mlp_args, quantize=quantize, isolated=True)
    ops = {n.op for n in comparison.nodes}
    assert ops >= ({"quant.quantize", "quant.scaled_linear"} if quantize == "fp8" else {"quant.dequantize"})
    if quantize == "fp8":
        assert moec.compare(mlp, mlp_args, quantize=quantize).isolated


def test_a_faulty_fp8_linear_is_seen(mlp, mlp_args):
    faulty = FaultyBackend("quant.scaled_linear", scaled(1.01))
    comparison = moec.compare(mlp, mlp_args, backends=("reference", faulty), quantize="fp8")
    assert {n.op for n in comparison.nodes if not n.ok} == {"quant.scaled_linear"}


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_integers_are_judged_node_by_node(mlp, mlp_args, quantize):
    """Where a backend rounds activations to multiply by them, and end to end where it does not."""
    comparison = assert_backends_agree(mlp, mlp_args, quantize=quantize)
    assert comparison.isolated
    assert max(n.difference.relative_error for n in comparison.nodes if n.op == "linear.linear") > 1e-3
    assert not moec.compare(mlp, mlp_args, quantize=quantize, backends=("reference", "reference")).isolated
    assert not moec.compare(mlp, mlp_args, quantize=quantize, isolated=False).ok


@pytest.mark.parametrize("seed", range(2))
def test_rounded_rows_of_a_spiky_block_agree(seed):
    """What a gate times an up projection gives: the largest of a block is up to five times the root mean square."""
    torch.manual_seed(seed)
    model = moec.models.build(dataclasses.replace(moec.models.config("deepseek-v3-mini"), num_layers=2))
    assert_backends_agree(model, (torch.randint(0, 50, (2, 12)),), quantize="int8", threads=1)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_faulty_integer_linear_is_seen(mlp, mlp_args, quantize):
    """3% are beyond what rounding the rows explains; without that, 0.1% are too much."""
    rounding = FaultyBackend("linear.linear", scaled(1.03))
    rounding.coarse_sums = get_backend("onnxruntime").coarse_sums
    for faulty in (rounding, FaultyBackend("linear.linear", scaled(1.001))):
        comparison = moec.compare(mlp, mlp_args, backends=("reference", faulty), quantize=quantize, isolated=True)
        assert {n.op for n in comparison.nodes if not n.ok} == {"linear.linear"}


def test_what_is_written_of_an_integer_linear_shows_it(mlp, mlp_args, tmp_path, monkeypatch):
    """With its stored weights: dequantised ones would be multiplied in f32."""
    monkeypatch.setattr(type(get_backend("onnxruntime")), "coarse_sums", lambda self, node: (2.0**-24, 1))
    comparison = moec.compare(mlp, mlp_args, quantize="int4", isolated=True)
    found = comparison.first_divergence
    assert found.node.op == "linear.linear"
    comparison.save_repro(tmp_path)
    graph, inputs = load_graph(tmp_path / "node.ir")
    assert [n.op for n in graph.nodes] == ["quant.dequantize", "linear.linear"]
    assert not moec.compare(graph, inputs, isolated=False).ok


def test_integers_in_processes_of_their_own(mlp, mlp_args):
    comparison = assert_backends_agree(mlp, mlp_args, quantize="int4", processes=True)
    assert {n.op for n in comparison.nodes} >= {"quant.dequantize", "linear.linear"}


def test_eager_and_compiled_contenders(mlp, mlp_args):
    model = nn.Sequential(nn.Linear(4, 3), nn.SiLU())
    args = (torch.randn(2, 4),)
    comparison = assert_backends_agree(model, args, backends=("eager", "reference", "onnxruntime"))
    assert [o.backend for o in comparison.outputs] == ["reference", "onnxruntime"]
    assert comparison.reference == "eager"
    compiled = moec.compile(mlp, backend="onnxruntime", threads=1)
    assert assert_backends_agree(mlp, mlp_args, backends=("reference", compiled)).outputs[0].backend.startswith("comp")


def test_a_model_that_changed_since_is_seen():
    model = nn.Linear(4, 3)
    compiled = moec.compile(model, (torch.zeros(2, 4),), backend="onnxruntime", threads=1)
    with torch.no_grad():
        model.weight *= 1.01
    with pytest.raises(moec.CompileError, match="'weight' was modified in place"):  # values inside need it again
        moec.compare(model, (torch.ones(2, 4),), backends=("reference", compiled))


def test_bad_arguments(mlp, mlp_args):
    for backends in ("reference", ("reference",), ()):
        with pytest.raises(ArgumentValueError, match="at least two"):
            moec.compare(mlp, mlp_args, backends=backends)
    with pytest.raises(ArgumentValueError, match="eager"):
        moec.compare(mlp, mlp_args, backends=("reference", "eager"))
    with pytest.raises(ArgumentValueError, match="axis 1"):
        moec.compare(mlp, (torch.zeros(2, 5), torch.arange(2)))
    other = moec.compile(nn.Linear(4, 3), (torch.zeros(2, 4),), backend="reference")
    with pytest.raises(ArgumentValueError, match="no version of graph: it takes 1 input, the model 2"):
        moec.compare(mlp, mlp_args, backends=("reference", other))


def test_figures_of_outputs(mlp, mlp_args):
    comparison = moec.compare(mlp, mlp_args, backends=("reference", FaultyBackend("math.silu", scaled(1.5))))
    d = comparison.outputs[0].difference
    assert d.max_error >= d.mean_error > 0
    assert 0 < d.relative_error < 1
    assert d.cosine < 1
    data = json.loads(json.dumps(comparison.to_dict()))
    assert data["ok"] is False
    assert data["first_divergence"]["op"] == "math.silu"
    assert (data["first_divergence"]["file"], data["first_divergence"]["line"]) == ("model.py", 5)


def test_values_inside_are_judged_too(mlp, mlp_args):
    """A fault that the output does not show is one nevertheless."""
    text = """
graph(%x: f32[T, 4]) -> (%y: f32[T, 4]) {
  %0: f32[T, 4] = math.tanh(%x) loc("layers.2.act" "m.py":3) origin("tanh")
  %1: f32[T, 4] = math.clamp(%0) {low=0.0, high=0.0} origin("none of it")
  return %1
}
"""
    graph = moec.parse(text)
    comparison = moec.compare(graph, (torch.ones(3, 4),), backends=("reference", FaultyBackend("math.tanh", scaled(2))))
    assert comparison.outputs[0].difference.ok
    assert not comparison.ok
    assert comparison.first_divergence.layer == 2
    assert "layer 2" in str(comparison)
    assert "1 of 2 values inside" in str(comparison)


def test_the_node_to_blame_is_not_the_one_where_it_shows():
    """A small error, in tolerance end to end, that a later node makes large."""
    graph = Graph()
    b = Builder(graph)
    x = graph.add_input("x", TensorType("f32", (Dim("T"), 64)))
    up = b.linear(x, graph.add_weight(Weight.of("w", torch.randn(64, 64) / 8)))
    back = b.sub(b.add(up, 3.0), up)
    graph.add_output(b.mul(b.sub(back, 3.0), 1e6))
    for i, node in enumerate(graph.nodes):
        for r in node.results:
            r.origins = frozenset([f"v{i}"])
    x = torch.randn(5, 64)
    shifted = FaultyBackend("math.add", lambda value, tensor: tensor + 1e-5)
    found = moec.compare(graph, (x,), backends=("reference", shifted), passes=moec.passes.Pipeline(()))
    assert not found.ok
    assert found.first_divergence.node.op == "math.add"
    assert found.first_divergence.isolated


def test_a_tolerance_of_the_callers_own(mlp, mlp_args):
    faulty = FaultyBackend("math.silu", scaled(1.01))
    for isolated in (False, True):
        assert moec.compare(mlp, mlp_args, backends=("reference", faulty), tolerance=0.05, isolated=isolated).ok
        assert not moec.compare(mlp, mlp_args, backends=("reference", faulty), tolerance=1e-4, isolated=isolated).ok
    with pytest.raises(ArgumentValueError, match="tolerance"):
        moec.compare(mlp, mlp_args, tolerance=-1)


@pytest.mark.parametrize("isolated", [False, True])
def test_backends_in_processes_of_their_own(mlp, mlp_args, isolated):
    here = moec.compare(mlp, mlp_args, isolated=isolated, processes=False)
    there = moec.compare(mlp, mlp_args, isolated=isolated, processes=True)
    assert here.to_dict() | {"peak_bytes": 0} == there.to_dict() | {"peak_bytes": 0}
    assert set(there.peak_bytes) == {"reference", "onnxruntime"}
    assert there.peak_bytes["reference"] > 50 << 20


def test_what_cannot_travel_stays_here(mlp, mlp_args):
    faulty = FaultyBackend("math.silu", scaled(1.01))
    with pytest.raises(ArgumentValueError, match="faulty is an object of this process"):
        moec.compare(mlp, mlp_args, backends=("reference", faulty), processes=True)


def test_a_process_that_dies_is_an_error(mlp, mlp_args, monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os\nif os.environ.get('DIE'): os.kill(os.getpid(), 11)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DIE", "1")
    with pytest.raises(moec.CompileError, match="process that ran reference ended with signal 11"):
        moec.compare(mlp, mlp_args, processes=True)


def test_no_files_are_left(mlp, mlp_args, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    moec.compare(mlp, mlp_args, backends=("reference", FaultyBackend("math.silu", scaled(2.0))))
    with pytest.raises(moec.CompileError):
        moec.compare(mlp, (torch.zeros(2, 5), torch.arange(2)))
    assert list(tmp_path.iterdir()) == []


def test_saved_outputs(mlp, mlp_args, tmp_path):
    first = moec.compare(mlp, mlp_args, save=tmp_path / "kept")
    assert first.ok
    outputs = tmp_path / "kept" / "onnxruntime" / "outputs.safetensors"
    again = moec.compare(mlp, mlp_args, backends=(outputs, "reference"))
    assert again.ok
    assert [o.output for o in again.outputs] == ["y", "kept"]
    faulty = FaultyBackend("math.silu", scaled(1.01))
    wrong = moec.compare(mlp, mlp_args, backends=(str(outputs), faulty))
    assert not wrong.ok
    assert wrong.first_divergence.node.op == "math.silu"  # by the reference's values
    assert any("no values inside" in n for n in wrong.notes)
    np.savez(tmp_path / "some.npz", y=np.zeros(3))
    with pytest.raises(ArgumentValueError, match=r"some\.npz has no outputs kept; it holds y"):
        moec.compare(mlp, mlp_args, backends=("reference", tmp_path / "some.npz"))
    with pytest.raises(ArgumentValueError, match="not an empty folder"):
        moec.compare(mlp, mlp_args, save=tmp_path / "kept")


def test_pickles_are_not_read(mlp, mlp_args, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    np.savez(tmp_path / "evil.npz", y=np.array([Evil()], dtype=object), kept=np.zeros(2))
    with pytest.raises(ArgumentValueError, match=r"evil\.npz"):
        moec.compare(mlp, mlp_args, backends=("reference", tmp_path / "evil.npz"))
    assert not (tmp_path / "executed").exists()


def test_saved_folders_and_compiled_models(mlp, mlp_args, tmp_path):
    compiled = moec.compile(mlp, backend="onnxruntime", threads=1)
    compiled.save(tmp_path / "saved")
    for model in (compiled, tmp_path / "saved", str(tmp_path / "saved")):
        comparison = moec.compare(model, mlp_args)
        assert comparison.ok
        assert comparison.values
    loaded = moec.load(tmp_path / "saved")
    both = moec.compare(compiled, mlp_args, backends=(compiled, loaded, "reference"))
    assert both.ok
    assert [o.backend for o in both.outputs[::2]] == ["compiled onnxruntime #2", "reference"]
    assert all(o.difference.max_error == 0 for o in both.outputs[:2])


def test_a_wrong_front_end_is_told_from_a_wrong_backend():
    """Eager is the truth: where the reference parts from it too, the trace or a pass is wrong."""
    model = nn.Sequential(nn.Linear(4, 3), nn.SiLU())
    args = (torch.randn(2, 4),)
    faulty = FaultyBackend("math.silu", scaled(1.01))
    comparison = moec.compare(model, args, backends=("eager", faulty))
    assert not comparison.ok
    assert comparison.first_divergence.node.op == "math.silu"


def test_a_repro_shows_the_fault_again(mlp, mlp_args, tmp_path):
    faulty = FaultyBackend("norm.rms", scaled(1.01))
    comparison = moec.compare(mlp, mlp_args, backends=("reference", faulty))
    folder = comparison.save_repro(tmp_path / "repro")
    assert sorted(p.name for p in folder.iterdir()) == [
        "comparison.json", "comparison.txt", "node.ir", "node.safetensors",
    ]  # fmt: skip
    graph, inputs = load_graph(folder / "node.ir")
    assert [n.op for n in graph.nodes] == ["norm.rms"]
    again = moec.compare(graph, inputs, backends=("reference", faulty))
    assert again.first_divergence.node.op == "norm.rms"
    assert moec.compare(graph, inputs).ok
    with pytest.raises(moec.CompileError, match="nothing diverges"):
        moec.compare(mlp, mlp_args).save_repro(tmp_path / "none")


UNUSUAL = {
    "an input as an output": "graph(%x: f32[T, 4]) -> (%y: f32[T, 4], %z: f32[T, 4]) {\n"
    "  %0: f32[T, 4] = math.neg(%x)\n  return %x, %0\n}",
    "no node": "graph(%x: f32[T, 4]) -> (%y: f32[T, 4]) {\n  return %x\n}",
    "a weight as an output": "graph(%x: f32[T, 4]) -> (%y: f32[2], %z: f32[T, 4]) {\n  weight @w: f32[2]\n"
    "  %0: f32[T, 4] = math.neg(%x)\n  return @w, %0\n}",
    "one value twice": "graph(%x: f32[T, 4]) -> (%y: f32[T, 4], %z: f32[T, 4]) {\n"
    "  %0: f32[T, 4] = math.neg(%x)\n  return %0, %0\n}",
    "NaN and infinities": "graph(%x: f32[T, 4]) -> (%y: f32[T, 4]) {\n  %0: f32[T, 4] = math.log(%x)\n  return %0\n}",
    "codes": "graph(%x: f32[T, 4]) -> (%c: f8e4m3fn[T, 4], %s: f32[T, 1]) {\n"
    "  %0: f8e4m3fn[T, 4], %1: f32[T, 1] = quant.quantize(%x) {block=[1, 128]}\n  return %0, %1\n}",
    "sizes known when run": "graph(%x: f32[T, 4]) -> (%y: i64[N, 2]) {\n  %0: bool[T, 4] = math.cast(%x) {dtype=bool}\n"
    "  %1: i64[N, 2] = tensor.nonzero(%0) {count=N}\n  return %1\n}",
    "a function": 'graph(%x: f32[T, 4]) -> (%y: f32[T, 4]) {\n'
    '  %0: f32[T, 4] = call.graph(%x) {callee="f", dims=[["N", T]]}\n  return %0\n}\n'
    "function @f(%a: f32[N, 4]) -> (%b: f32[N, 4]) {\n  %0: f32[N, 4] = math.exp(%a)\n  return %0\n}",
}  # fmt: skip


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("what", UNUSUAL)
def test_unusual_graphs(what, isolated, rows):
    graph = moec.parse(UNUSUAL[what])
    graph.bind_weights({n: torch.ones(2) for n in graph.weights})
    x = torch.randn(4, rows).T  # not contiguous
    x[:1, :3] = torch.tensor([math.nan, math.inf, 0.0])
    assert_backends_agree(graph, (x,), isolated=isolated, passes=moec.passes.Pipeline(()))
    if rows == 5 and what in ("an input as an output", "NaN and infinities", "one value twice"):
        moved = FaultyBackend(next(graph.nodes).op, lambda value, tensor: tensor + 1)
        passes = moec.passes.Pipeline(())
        assert not moec.compare(graph, (x,), backends=("reference", moved), isolated=isolated, passes=passes).ok


def test_names_of_backends_are_no_paths(mlp, mlp_args, tmp_path):
    names = ["..", "a/b", "a b", "inputs", "../../x", "pinned-y"]
    backends = []
    for name in names:
        backend = FaultyBackend("math.silu", lambda value, tensor: tensor)
        backend.name = name
        backends.append(backend)
    found = moec.compare(mlp, mlp_args, backends=("reference", *backends), save=tmp_path / "in" / "kept")
    assert found.ok
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["kept"]
    assert len(list((tmp_path / "in" / "kept").rglob("outputs.safetensors"))) == 1 + len(names)


def test_tolerances_by_name(mlp, mlp_args):
    faulty = FaultyBackend("math.silu", scaled(1.01))
    named = {"math.silu": 0.05, "y": 0.05}
    assert not moec.compare(mlp, mlp_args, backends=("reference", faulty), tolerance={"y": 0.05}).ok
    assert moec.compare(mlp, mlp_args, backends=("reference", faulty), tolerance={"": 0.05}).ok
    assert moec.compare(mlp, mlp_args, backends=("reference", faulty), tolerance=named, isolated=True).ok
    with pytest.raises(ArgumentValueError, match=r"'math\.silo'") as e:
        moec.compare(mlp, mlp_args, tolerance={"math.silo": 0.1})
    assert "math.silu" in str(e.value)


def test_a_full_disk_is_an_error_and_leaves_nothing(mlp, mlp_args, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def full(tensors, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moec.comparing.store.save_file", full)
    with pytest.raises(moec.CompileError, match="No space left") as e:
        moec.compare(mlp, mlp_args)
    assert "TMPDIR" in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_settings_reach_another_process():
    backend = get_backend("onnxruntime")
    settings = Settings(backend, Pipeline(()), "reference", 2, memory="fp8", tuning=1, more={"experts": "if"})
    assert transport.settings_of(json.loads(json.dumps(transport.describe(settings)))) == settings
