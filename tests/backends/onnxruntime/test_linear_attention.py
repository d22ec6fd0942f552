"""Linear attention: ONNX Runtime's operator and the portable Loop, at every length."""

import itertools

import onnx
import pytest
import torch

from moec.frontend.onnx import import_onnx
from moec.ir import Graph, run

from .conftest import agrees, compiled, typed

H, SHARED, K, V = 4, 2, 3, 5


def graph(dtype, decay, beta, state, shared=SHARED, scale=0.4):
    g = Graph("test")
    q, k = (g.add_input(n, typed(dtype, "B", "T", shared, K)) for n in "qk")
    v = g.add_input("v", typed(dtype, "B", "T", H, V))
    kinds = {"head": ("B", "T", H), "row": ("B", "T", H, K)}
    d = g.add_input("decay", typed(dtype, *kinds[decay])) if decay else None
    b = g.add_input("beta", typed(dtype, "B", "T", H)) if beta else None
    s = g.add_input("state", typed(dtype, "B", H, K, V)) if state else None
    for r in g.create("attention.linear_attention", [q, k, v, d, b, s], {"scale": scale}).results:
        g.add_output(r)
    g.verify()
    return g


def inputs(g, batch, length):
    sizes = {"B": batch, "T": length}
    made = []
    for v in g.inputs:
        x = torch.randn([n if isinstance(n, int) else n.evaluate(sizes) for n in v.shape], dtype=torch.float64)
        x = {"decay": -x.abs(), "beta": x.sigmoid(), "k": x / K**0.5}.get(v.name, x)
        made.append(x.to(v.dtype.torch))
    return made


FORMS = list(itertools.product((None, "head", "row"), (False, True), (False, True)))


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(("decay", "beta", "state"), FORMS)
def test_every_form_at_every_length(decay, beta, state, portable):
    for shared in (1, SHARED, H):
        g = graph("f32", decay, beta, state, shared)
        executable = compiled(g, portable=portable)
        for batch, length in ((2, 0), (0, 3), (0, 0), (1, 1), (2, 2), (3, 7), (1, 65)):
            agrees(executable, inputs(g, batch, length), 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 2e-2), ("f16", 2e-3), ("f64", 1e-12)])
def test_other_floats(dtype, tolerance):
    for decay in ("head", "row"):
        g = graph(dtype, decay, True, True)
        executable = compiled(g)
        for length in (0, 1, 13):
            agrees(executable, inputs(g, 2, length), tolerance)


def test_a_scale_of_zero_is_zero():
    """ONNX Runtime's operator takes it for 1 / √K."""
    g = graph("f32", "head", False, False, scale=0.0)
    out, _ = agrees(compiled(g), inputs(g, 2, 5))
    assert not out.any()


def test_which_operators_are_written(tmp_path):
    for portable, expected in ((False, "LinearAttention"), (True, "Loop")):
        compiled(graph("f32", "head", True, True), portable=portable).save(tmp_path / str(portable))
        (path,) = (tmp_path / str(portable)).glob("*.onnx")
        nodes = onnx.load(path, load_external_data=False).graph.node
        assert expected in {n.op_type for n in nodes}
        assert not portable or {n.domain for n in nodes} == {""}


@pytest.mark.parametrize(("decay", "beta", "state"), FORMS)
def test_what_is_written_can_be_read(decay, beta, state, tmp_path):
    """The operator comes back as the op; without a state it starts from zeros."""
    g = graph("f32", decay, beta, state)
    compiled(g).save(tmp_path)
    (path,) = tmp_path.glob("*.onnx")
    again = import_onnx(path).graph
    assert again.count_ops()["attention.linear_attention"] == 1
    given = inputs(g, 2, 7)
    for got, want in zip(run(again, given), run(g, given), strict=True):
        torch.testing.assert_close(got, want)
