"""Sizes known only when an op has run: text, verifier, interpreter, passes and every backend."""

from __future__ import annotations

import pytest
import torch

import moec
from moec.backends import get_backend
from moec.backends.partition import PartitionedExecutable
from moec.ir import CompileError, parse, run
from moec.ir.interpreter import sizes_of
from moec.passes.clean.cleanup import DeadCode

# the rows of x at which the mask holds, and how many columns of ones as there are such rows
PICK = """
graph(%x: f32[T, 4], %mask: bool[T]) -> (%rows: f32[n, 4], %ones: f32[n], %cut: f32[n, 2]) {
  %0: i64[n, 1] = tensor.nonzero(%mask) {count=n}
  %1: i64[n] = tensor.reshape(%0) {shape=[n]}
  %2: f32[n, 4] = tensor.gather(%x, %1)
  %3: f32[n] = tensor.full() {shape=[n], value=1.0, dtype=f32}
  %4: f32[n, 2] = tensor.slice(%2) {axis=1, start=1, end=3}
  return %2, %3, %4
}
"""
# nothing reads the result of nonzero: only its size is used
COUNT = """
graph(%mask: bool[T]) -> (%ones: f32[n]) {
  %0: i64[n, 1] = tensor.nonzero(%mask) {count=n}
  %1: f32[n] = tensor.full() {shape=[n], value=1.0, dtype=f32}
  %2: f32[n] = math.neg(%1)
  return %2
}
"""


def masks():
    yield torch.tensor([True, False, True, True, False])
    yield torch.zeros(3, dtype=torch.bool)
    yield torch.ones(1, dtype=torch.bool)
    yield torch.zeros(0, dtype=torch.bool)


def test_text_round_trip_and_clone():
    graph = parse(PICK)
    assert parse(str(graph)) == graph
    assert graph.clone() == graph


@pytest.mark.parametrize("backend", ["reference", "onnxruntime", "triton"])
@pytest.mark.parametrize("passes", [None, moec.passes.Pipeline(())], ids=["default passes", "no passes"])
def test_rows_at_a_mask(backend, passes):
    compiled = moec.compile(parse(PICK), backend=backend, passes=passes)
    for mask in masks():
        x = torch.randn(len(mask), 4)
        rows, ones, cut = compiled(x, mask)
        torch.testing.assert_close(rows, x[mask])
        torch.testing.assert_close(ones, torch.ones(int(mask.sum())))
        torch.testing.assert_close(cut, x[mask][:, 1:3])


@pytest.mark.parametrize("backend", ["reference", "onnxruntime", "triton"])
def test_a_size_is_kept_alive_by_its_use(backend):
    graph = parse(COUNT)
    assert [n.op for n in DeadCode().run(graph).nodes] == [n.op for n in graph.nodes]
    compiled = moec.compile(graph, backend=backend)
    for mask in masks():
        torch.testing.assert_close(compiled(mask)[0], -torch.ones(int(mask.sum())))


def test_dead_code_takes_what_brings_in_an_unused_size():
    graph = parse(COUNT.replace("shape=[n]", "shape=[T]").replace("f32[n]", "f32[T]"))
    assert "tensor.nonzero" not in {n.op for n in DeadCode().run(graph).nodes}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("shape=[n], value", "shape=[m], value", "uses dimensions ['m'] that no input"),
        ("count=n", "count=2*n", "count must be a name"),
        ("%1: f32[n] = tensor.full() {shape=[n], value=1.0, dtype=f32}\n", "", "is used before"),
    ],
)
def test_undefined_names_are_refused(old, new, message):
    text = COUNT.replace(old, new)
    if "[m]" in new:
        text = text.replace("f32[n]", "f32[m]")
    with pytest.raises(CompileError) as caught:
        parse(text)
    assert message in str(caught.value)


def test_a_size_is_not_known_before_its_op():
    lines = COUNT.strip().split("\n")
    lines[1], lines[2] = lines[2].replace("%1", "%9"), lines[1]
    with pytest.raises(CompileError, match="uses dimensions"):
        parse("\n".join(lines).replace("math.neg(%1)", "math.neg(%9)"))


def test_a_size_that_an_input_has_is_checked():
    text = """
graph(%mask: bool[T], %y: f32[N]) -> (%at: i64[N, 1]) {
  %0: i64[N, 1] = tensor.nonzero(%mask) {count=N}
  return %0
}
"""
    graph = parse(text)
    mask = torch.tensor([True, False, True])
    assert run(graph, [mask, torch.zeros(2)])[0].tolist() == [[0], [2]]
    with pytest.raises(CompileError, match=r"its type says i64\[3, 1\]"):
        run(graph, [mask, torch.zeros(3)])


def test_sizes_of_a_run():
    assert sizes_of(parse(PICK), [torch.zeros(3, 4), torch.tensor([True, False, True])]) == {"T": 3, "n": 2}


@pytest.mark.parametrize("refused", ["tensor.nonzero", "tensor.full", "tensor.gather"])
def test_parts_on_two_sides(refused):
    """Whichever side counts, the other gets the size."""
    base = get_backend("onnxruntime")
    backend = type(base)(base.name, base.dtypes, lowerings=base.lowerings, unsupported={refused: "for this test"})
    graph = parse(PICK)
    executable = PartitionedExecutable(graph, backend, None)
    assert executable.stats["reference segments"] >= 1
    for mask in masks():
        x = torch.randn(len(mask), 4)
        for got, want in zip(executable.run([x, mask]), run(graph, [x, mask]), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("isolated", [False, True])
def test_backends_are_compared(isolated):
    comparison = moec.compare(parse(PICK), (torch.randn(5, 4), next(masks())), isolated=isolated)
    assert comparison.ok, str(comparison)


def test_a_saved_program_comes_back(tmp_path):
    compiled = moec.compile(parse(PICK), backend="onnxruntime")
    compiled.save(tmp_path / "saved")
    mask = next(masks())
    x = torch.randn(5, 4)
    torch.testing.assert_close(moec.load(tmp_path / "saved")(x, mask), compiled(x, mask))
