"""The pytest plugin, in pytest runs of its own."""

import json

import pytest

PROGRAM = '''
import dataclasses
import pytest
import torch
import moec
from moec.backends.reference.backend import ReferenceBackend, ReferenceExecutable
from moec.ir import DType
from moec.testing import assert_backends_agree

GRAPH = moec.parse("""graph(%x: f32[T, 4]) -> (%y: f32[T, 4]) {
  %0: f32[T, 4] = math.tanh(%x) loc("layers.1.act" "model.py":7)
  %1: f32[T, 4] = math.neg(%0) loc("layers.1.neg" "model.py":8)
  return %1
}""")


class Wrong(ReferenceExecutable):
    def run(self, inputs):
        return [t * 1.01 for t in super().run(inputs)]

    def tap(self, inputs, values):
        return {v: t * 1.01 for v, t in super().tap(inputs, values).items()}


class WrongBackend(ReferenceBackend):
    def compile(self, graph, *, threads=None, options=None):
        return Wrong(graph)


wrong = WrongBackend("wrong", dtypes=frozenset(DType))
'''

TEST = """
from program import *

def test_graph(backend):
    assert_backends_agree(GRAPH, (torch.ones(3, 4),), backends=("reference", backend))
"""


@pytest.fixture
def project(pytester):
    pytester.makepyfile(program=PROGRAM, test_backends=TEST)
    pytester.syspathinsert()
    return pytester


def run(project, *args):
    return project.runpytest("-p", "moec.pytest_plugin", "-p", "no:xdist", *args)


def test_one_test_for_each_backend(project):
    result = run(project, "-v", "--moec-backends", "onnxruntime,reference")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*test_graph?onnxruntime?*", "*test_graph?reference?*"])


def test_by_default_and_by_configuration(project):
    run(project).assert_outcomes(passed=1)
    project.makeini("[pytest]\nmoec_backends = reference, onnxruntime\n")
    run(project).assert_outcomes(passed=2)


def test_a_failure_names_the_node_and_is_saved(project):
    kept = project.path / "kept"
    result = run(project, "--moec-backends", "onnxruntime,program:wrong", "--moec-repro", str(kept))
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["*wrong first diverges at math.tanh (layer 1, layers.1.act model.py:7)*", "*saved in*"]
    )
    (folder,) = kept.iterdir()
    assert "wrong" in folder.name
    assert (folder / "node.ir").exists()
    assert (folder / "node.safetensors").exists()
    assert json.loads((folder / "comparison.json").read_text())["first_divergence"]["op"] == "math.tanh"


def test_the_cache_folder_is_the_default(project):
    run(project, "--moec-backends", "program:wrong").assert_outcomes(failed=1)
    assert list((project.path / ".pytest_cache").rglob("node.ir"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense", "*unknown backend 'nonsense'*"),
        ("program:GRAPH", "*is a Graph, not a Backend*"),
        ("program:missing", "*cannot import backend*"),
        (" , ", "*names no backend*"),
    ],
)
def test_bad_names(project, text, said):
    result = run(project, "--moec-backends", text)
    assert result.ret != 0
    (result.stdout if "names no" not in said else result.stderr).fnmatch_lines([said])


def test_a_projects_own_fixture_is_left_alone(project):
    project.makeconftest("import pytest\n\n@pytest.fixture\ndef backend():\n    return 'reference'\n")
    run(project, "--moec-backends", "program:wrong").assert_outcomes(passed=1)


def test_the_plugin_is_light(pytester):
    pytester.makepyfile("import sys\n\ndef test():\n    assert 'torch' not in sys.modules\n")
    result = pytester.runpytest_subprocess("-p", "moec.pytest_plugin", "-p", "no:xdist")
    result.assert_outcomes(passed=1)
