"""What somebody new gets wrong: the message says what was expected, and no raw error of ours comes through."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import moec
from moec.ir import ArgumentTypeError, ArgumentValueError, CompileError, Location, parse
from moec.ir.location import Frame
from moec.ir.printer import excerpt, shorten
from moec.passes import FuseSwiGLU, Pipeline

X = (torch.randn(2, 4),)


# -- arguments ----------------------------------------------------------------------------------------


class Two(nn.Module):
    def forward(self, x, y, *, z=None):
        return x + y


@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((), None, "missing arguments: x, y"),
        (X, None, "missing arguments: y"),
        (X, {"x": X[0]}, "multiple values for argument 'x'"),
        (X * 3, None, "too many positional arguments"),
        (X * 2, {"w": 1}, "unexpected keyword argument 'w'"),
    ],
)
def test_arguments_that_forward_does_not_take(args, kwargs, says):
    for call in (moec.compile, moec.trace):
        with pytest.raises(ArgumentTypeError, match=says) as e:
            call(Two(), args, kwargs)
        assert isinstance(e.value, TypeError)
        assert "Two.forward(x, y, *, z=None)" in e.value.hint
    assert moec.compile(Two(), X * 2)(*X * 2).shape == (2, 4)


def test_a_type_error_inside_forward_is_none_of_the_arguments():
    class Wrong(nn.Module):
        def forward(self, x):
            return torch.add()

    with pytest.raises(CompileError) as e:
        moec.compile(Wrong(), X)
    assert not isinstance(e.value, ArgumentTypeError)


def test_passes_that_are_none():
    for passes, hint in (
        ("fuse_swiglu", "moec.passes.parse_passes('fuse_swiglu')"),
        (["fuse_swiglu"], "moec.passes.parse_passes('fuse_swiglu')"),
        (FuseSwiGLU, "write FuseSwiGLU()"),
        ([FuseSwiGLU], "write FuseSwiGLU()"),
        (lambda graph: graph, "class Mine(Pass)"),
    ):
        with pytest.raises(ArgumentValueError, match="is not a Pass") as e:
            moec.compile(nn.Linear(4, 3), X, passes=passes)
        assert hint in e.value.hint
    with pytest.raises(ArgumentValueError, match="'tidy' is not a Pass"):
        Pipeline("tidy")


def test_a_saved_model_keeps_its_backend(tmp_path):
    compiled = moec.compile(nn.Linear(4, 3), X, backend="reference")
    compiled.save(tmp_path / "saved")
    with pytest.raises(TypeError, match=r"load\(\) takes no 'backend': a saved model keeps") as e:
        moec.load(tmp_path / "saved", backend="onnxruntime")
    assert "moec.compile(moec.load(folder).graph, backend=…)" in e.value.hint
    other = moec.compile(moec.load(tmp_path / "saved").graph, backend="onnxruntime")
    torch.testing.assert_close(other(*X)[0], compiled(*X))


# -- training -----------------------------------------------------------------------------------------


class DropsByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_dropout = 0.1

    def forward(self, x):
        return nn.functional.dropout(x, self.attention_dropout, self.training)


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (nn.Dropout(0.2), r"1 \(Dropout with p=0.2\)"),
        (nn.BatchNorm1d(4), r"1 \(BatchNorm1d\)"),
        (DropsByHand(), r"1 \(DropsByHand with p=0.1\)"),
    ],
)
def test_training_mode_is_told_where_it_matters(layer, what):
    model = nn.Sequential(nn.Linear(4, 4), layer)
    with pytest.warns(UserWarning, match=f"Sequential is in training mode, and compiled as in evaluation: {what}"):
        compiled = moec.compile(model, X, backend="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moec.compile(model.eval(), X, backend="reference")
        moec.compile(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0)), X, backend="reference")
    torch.testing.assert_close(compiled(*X), model(*X))


# -- generation ---------------------------------------------------------------------------------------


def test_a_model_whose_own_cache_fails():
    class Fails(nn.Module):
        def empty_cache(self, batch):
            return [torch.zeros(batch, 1, 0, 2)]

        def forward(self, input_ids, attention_mask=None, caches=None):
            raise ValueError("`get_seq_length` can only be called on attention layers")

    with pytest.raises(CompileError, match="running the model with its cache failed: ValueError: `get_seq") as e:
        moec.compile(Fails(), backend="reference").generate(torch.zeros(1, 2, dtype=torch.int64))
    assert "test_first_mistakes.py" in str(e.value)


# -- messages -----------------------------------------------------------------------------------------


def test_a_location_is_said_once():
    frames = Frame("attn.o", "m.py", 48), Frame("attn.o", "m.py", 49)
    assert Location(frames).describe() == "attn.o m.py:48 and 1 more"
    assert Location((Frame("attn.q", "m.py", 3), *frames)).describe() == "attn, attn.q m.py:3 and 2 more"
    assert Location((Frame("", "m.py", 3), Frame("", "m.py", 4))).describe() == "(model), m.py:3 and 1 more"


def test_constants_are_shortened_in_messages():
    assert shorten(f"value=[{', '.join(['-inf'] * 64)}], type=f32[64]") == (
        "value=[-inf, -inf, -inf, -inf, … 59 more, -inf], type=f32[64]"
    )
    short = "%0: f32[2] = tensor.constant() {value=[1.0, 2.0], type=f32[2]}"
    assert shorten(short) == short
    graph = parse(
        f"graph() -> (%y: f32[64]) {{\n  %0: f32[64] = tensor.constant() {{value=[{', '.join(['1.0'] * 64)}], "
        "type=f32[64]}\n  return %0\n}"
    )
    assert "… 59 more" in excerpt(next(graph.nodes))
    assert "more" not in str(graph)


FAILING = """
import torch
import moec
from moec.passes import Rewrite
from moec.testing import assert_backends_agree, check_pass
from safetensors.torch import save_file

class Wrong(Rewrite):
    def pattern(self, p, x):
        return p.silu(x)

    def replace(self, b, m):
        return b.relu(m.x)

def test_backends():
    model, args = torch.nn.Linear(4, 3), (torch.ones(2, 4),)
    save_file({"linear": torch.ones(2, 3)}, "outputs.safetensors")
    assert_backends_agree(model, args, backends=("reference", "outputs.safetensors"))

def test_pass():
    check_pass(Wrong(), moec.trace(torch.nn.SiLU(), (torch.randn(4),)))
"""


def test_a_failing_test_shows_its_own_line(tmp_path):
    (tmp_path / "test_it.py").write_text(FAILING)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert "2 failed" in done.stdout
    for line in (">       assert_backends_agree(model, args", ">       check_pass(Wrong(),", "outputs.safetensors"):
        assert line in done.stdout
    for ours in ("def assert_backends_agree", "def check_pass", "raise AssertionError", "raise BackendsDisagree"):
        assert ours not in done.stdout, done.stdout


def test_constants_lower_without_a_warning():
    """torch's `__array__` takes no `copy`, which NumPy 2 asks for."""
    graph = parse(
        "graph(%x: f32[2]) -> (%y: f32[2]) {\n  %0: f32[2] = tensor.constant() {value=[1.0, 2.5], type=f32[2]}\n"
        "  %1: f32[2] = math.add(%x, %0)\n  return %1\n}"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        (y,) = moec.compile(graph, backend="onnxruntime", passes=Pipeline(()))(torch.zeros(2))
    np.testing.assert_array_equal(y.numpy(), [1.0, 2.5])
