"""Models named by a file, and what is taken for something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import moec
from moec.comparing.saved import compare_files
from moec.ir import ArgumentTypeError, ArgumentValueError, CompileError
from moec.passes import FuseSwiGLU, Rewrite, run_pass
from moec.specs import resolve

SOURCE = """
import torch

def build():
    return torch.nn.Linear(3, 2), (torch.ones(1, 3),)
"""


def test_a_callable_in_a_file(tmp_path):
    path = tmp_path / "my_nets.py"
    path.write_text(SOURCE)
    target = resolve(f"{path}:build")
    assert isinstance(target.model, torch.nn.Linear)
    assert target.args[0].shape == (1, 3)
    with pytest.raises(ArgumentValueError, match="there is no file"):
        resolve(f"{tmp_path / 'none.py'}:build")
    with pytest.raises(ArgumentValueError, match="cannot import"):
        resolve(f"{path}:other")


def test_a_module_is_no_graph():
    with pytest.raises(ArgumentTypeError, match="explain takes a Graph, got Linear"):
        moec.explain(FuseSwiGLU(), torch.nn.Linear(3, 2))


def test_a_rule_by_name_is_no_rule():
    graph = moec.trace(torch.nn.Linear(3, 2), (torch.ones(1, 3),))
    with pytest.raises(ArgumentTypeError, match="parse_pass") as e:
        moec.explain("fuse_swiglu", graph)
    assert "is not a Rewrite" in str(e.value)


def test_an_argument_that_the_model_changes():
    class InPlace(torch.nn.Module):
        def forward(self, kept, changed):
            return changed.add_(1) + kept

    with pytest.raises(CompileError, match="changes its argument 'changed'"):
        moec.compile(InPlace(), (torch.ones(2), torch.ones(2)))


def test_what_a_call_looks_like_is_short():
    class Many(torch.nn.Module):
        def forward(self, xs):
            return sum(xs)

    compiled = moec.compile(Many(), ([torch.ones(2)] * 60,), backend="reference")
    with pytest.raises(ArgumentTypeError, match=r"expected .*\[·, … ·\]") as e:
        compiled([torch.ones(2)] * 59 + [[torch.ones(2)]])
    assert len(str(e.value)) < 250


class Broken(Rewrite):
    """replace() fails some lines below its class."""

    def pattern(self, p, x):
        return p.relu(x)

    def replace(self, b, m):
        scale = 1 / 0
        return b.mul(m.x, scale)


class Torchs(Broken):
    """A tensor is no value of a graph."""

    def replace(self, b, m):
        return torch.ones(2)


def test_the_line_of_a_rule_that_fails():
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "scale = 1 / 0" in text)
    graph = moec.trace(torch.nn.ReLU(), (torch.ones(2),))
    with pytest.raises(CompileError, match=f"ZeroDivisionError in line {line}: division by zero"):
        run_pass(Broken(), graph)
    with pytest.raises(CompileError, match="return the values that b's ops give"):
        run_pass(Torchs(), graph)


def test_notes_on_saved_outputs(tmp_path):
    model, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
    np.savez(tmp_path / "wide.npz", other=model(x).detach().double().numpy())
    found = moec.compare(model, (x,), backends=("reference", tmp_path / "wide.npz"))
    assert found.ok
    assert any("'other' was taken for the only output" in n for n in found.notes)
    assert any("is f64, the reference's f32" in n for n in found.notes)


def test_files_of_nothing(tmp_path):
    np.savez(tmp_path / "a.npz")
    with pytest.raises(ArgumentValueError, match="nothing to compare"):
        compare_files(tmp_path / "a.npz", tmp_path / "a.npz")
