"""Calling a compiled model: structure in and out, and arguments that do not fit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import moec
from moec.ir import ArgumentTypeError, ArgumentValueError, CompileError

ROWS = torch.export.Dim("T")


class Nested(nn.Module):
    """Takes and returns nested structures."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, pair, *, scale, extra=None):
        a, rest = pair
        y = self.linear(x) * scale + a + rest["b"]
        return {"y": y, "parts": (y + 1, [y * 2, None]), "a": a * 1}


@pytest.fixture(scope="module")
def nested():
    torch.manual_seed(0)
    return Nested().eval()


def arguments(rows: int = 3):
    return (torch.randn(rows, 4), (torch.randn(rows, 4), {"b": torch.randn(4)})), {"scale": 0.5}


@pytest.fixture(scope="module")
def compiled(nested):
    args, kwargs = arguments()
    shapes = {"x": {0: ROWS}, "pair": ({0: ROWS}, {"b": None}), "scale": None}
    return moec.compile(nested, args, kwargs, backend="reference", dynamic_shapes=shapes)


@pytest.mark.parametrize("rows", [0, 1, 3, 7])
def test_result_structure_is_the_models(nested, compiled, rows):
    args, kwargs = arguments(rows)
    got, want = compiled(*args, **kwargs), nested(*args, **kwargs)
    assert got.keys() == want.keys()
    assert type(got["parts"]) is tuple
    assert type(got["parts"][1]) is list
    assert got["parts"][1][1] is None
    for a, b in ((got["y"], want["y"]), (got["parts"][0], want["parts"][0]), (got["parts"][1][0], want["y"] * 2)):
        torch.testing.assert_close(a, b)
        assert not a.requires_grad


def test_arguments_by_position_or_name(compiled):
    (x, pair), kwargs = arguments()
    want = compiled(x, pair, **kwargs)["y"]
    assert torch.equal(compiled(pair=pair, x=x, **kwargs)["y"], want)
    assert torch.equal(compiled(x, pair=pair, **kwargs)["y"], want)


def test_strided_inputs(compiled, nested):
    (x, (a, rest)), kwargs = arguments()
    x, a = torch.randn(4, 3).T, torch.randn(3, 8)[:, ::2]
    torch.testing.assert_close(compiled(x, (a, rest), **kwargs)["y"], nested(x, (a, rest), **kwargs)["y"])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda x, a, b: ((x,), {"scale": 0.5}), ArgumentTypeError, ["pair"]),
        (lambda x, a, b: ((), {}), ArgumentTypeError, ["x"]),
        (lambda x, a, b: ((x, (a, {"b": b})), {}), ArgumentTypeError, ["scale"]),
        (lambda x, a, b: ((x, (a, {"b": b})), {"scale": 0.5, "mask": x}), ArgumentTypeError, ["mask"]),
        (lambda x, a, b: ((x, (a, {"b": b}), x), {"scale": 0.5}), ArgumentTypeError, ["positional", "3"]),
        (lambda x, a, b: ((x, (a, {"c": b})), {"scale": 0.5}), ArgumentTypeError, ["'c'"]),
        (lambda x, a, b: (([1.0], (a, {"b": b})), {"scale": 0.5}), ArgumentTypeError, []),
        (lambda x, a, b: (("x", (a, {"b": b})), {"scale": 0.5}), ArgumentTypeError, ["x", "str"]),
        (lambda x, a, b: ((x.double(), (a, {"b": b})), {"scale": 0.5}), ArgumentTypeError, ["'x'", "f64", "f32"]),
        (lambda x, a, b: ((x[0], (a, {"b": b})), {"scale": 0.5}), ArgumentValueError, ["'x'", "rank 1", "rank 2"]),
        (lambda x, a, b: ((x[:, :3], (a, {"b": b})), {"scale": 0.5}), ArgumentValueError, ["'x'", "axis 1", "3", "4"]),
        (lambda x, a, b: ((x, (a[:2], {"b": b})), {"scale": 0.5}), ArgumentValueError, ["axis 0", "2", "T = 3"]),
        (lambda x, a, b: ((x, (a, {"b": b})), {"scale": 0.25}), ArgumentValueError, ["scale", "0.5", "0.25"]),
        (lambda x, a, b: ((x, (a, {"b": b})), {"scale": x}), ArgumentValueError, ["scale", "0.5"]),
    ],
)
def test_arguments_that_do_not_fit(compiled, change, error, words):
    (x, (a, rest)), _ = arguments()
    args, kwargs = change(x, a, rest["b"])
    with pytest.raises(error) as caught:
        compiled(*args, **kwargs)
    assert isinstance(caught.value, CompileError)
    assert isinstance(caught.value, TypeError if error is ArgumentTypeError else ValueError)
    for word in words:
        assert word in str(caught.value)


def test_static_sizes_are_checked():
    compiled = moec.compile(nn.Linear(4, 2), (torch.zeros(3, 4),), backend="reference")
    assert compiled(torch.ones(3, 4)).shape == (3, 2)
    with pytest.raises(ArgumentValueError, match="axis 0 has size 4, expected 3"):
        compiled(torch.ones(4, 4))


def test_model_output():
    from transformers import modeling_outputs as outputs

    class Model(nn.Module):
        def forward(self, x):
            return outputs.CausalLMOutputWithPast(logits=x * 2, hidden_states=(x, x + 1))

    compiled = moec.compile(Model(), (torch.ones(2, 3),), backend="reference")
    got = compiled(torch.full((2, 3), 2.0))
    assert isinstance(got, outputs.CausalLMOutputWithPast)
    assert got.loss is None
    assert got.logits[0, 0] == 4
    assert got["hidden_states"][1][0, 0] == 3


def test_graphs_take_tensors_in_order(mlp, mlp_args):
    compiled = moec.compile(mlp, backend="reference")
    y, kept = compiled(*mlp_args)
    assert y.shape == (5, 8)
    assert torch.equal(kept, mlp_args[1])
    assert torch.equal(compiled(keep=mlp_args[1], x=mlp_args[0])[0], y)
    with pytest.raises(ArgumentTypeError, match="do not apply"):
        moec.compile(mlp, mlp_args)


def test_exported_programs(nested):
    args, kwargs = arguments()
    program = torch.export.export(nested, args, kwargs, strict=False)
    compiled = moec.compile(program, backend="reference")
    torch.testing.assert_close(compiled(*args, **kwargs)["y"], nested(*args, **kwargs)["y"])


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("model.onnx", {}, ["model.onnx", "No such file"]),
        ("some/folder", {}, ["some/folder", "no folder and no .onnx or .gguf file", "checkpoint folder"]),
        ("model.gguf", {}, ["model.gguf", "missing"]),
        (42, {}, ["int", "a .gguf file"]),
        (nn.Identity(), {"args": torch.ones(2)}, ["args", "args=(tensor,)"]),
        (nn.Identity(), {"args": (torch.ones(2),), "kwargs": [1]}, ["kwargs", "list"]),
        (nn.Identity(), {"args": (torch.ones(2),), "backend": "tvm"}, ["tvm", "onnxruntime"]),
        (nn.Identity(), {"args": (torch.ones(2),), "fallback": "eager"}, ["fallback", "reference"]),
        (nn.Identity(), {"args": (torch.ones(2),), "threads": 0}, ["threads"]),
        (nn.Identity(), {"args": (torch.ones(2),), "quantize": "int3"}, ["int3", "fp8"]),
    ],
)
def test_bad_compile_arguments(model, options, words):
    with pytest.raises(CompileError) as caught:
        moec.compile(model, **options)
    for word in words:
        assert word in str(caught.value)


def test_threads_share_a_compiled_model(mlp):
    compiled = moec.compile(mlp, backend="onnxruntime", threads=1)
    batches = [(torch.randn(n, 16), torch.arange(n)) for n in range(1, 17)]
    want = [compiled(*b)[0] for b in batches]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            for a, b in zip(pool.map(lambda b: compiled(*b)[0], batches), want, strict=True):
                assert torch.equal(a, b)


def test_dump_writes_every_pass(mlp, tmp_path):
    moec.compile(mlp, backend="reference", dump=tmp_path / "dump")
    names = sorted(p.name for p in (tmp_path / "dump").glob("*.ir"))
    assert names[0] == "00_input.ir"
    assert names[-1].endswith("_legalise.ir")
    assert '"name":"legalise"' in (tmp_path / "dump" / "replay.html").read_text()
    for path in (tmp_path / "dump").glob("*.ir"):
        moec.parse(path.read_text()).verify()
    assert moec.parse((tmp_path / "dump" / "00_input.ir").read_text()) == mlp
