"""Models named by a file, and what is taken for something else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import moec
from moec.comparing.saved import compare_files
from moec.ir import ArgumentTypeError, ArgumentValueError
from moec.passes import FuseSwiGLU
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


def test_files_of_nothing(tmp_path):
    np.savez(tmp_path / "a.npz")
    with pytest.raises(ArgumentValueError, match="nothing to compare"):
        compare_files(tmp_path / "a.npz", tmp_path / "a.npz")
