"""ONNX's LSTM, GRU and RNN for `recurrent.*`: both directions, with and without biases, nothing in a sequence."""

import itertools

import pytest
import torch

from moec.ir import Graph

from .conftest import agrees, compiled, typed

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
D, H = 5, 3


def graph(kind, biases, attrs, dtype="f32"):
    g, rows = Graph("test"), GATES[kind] * H
    x = g.add_input("x", typed(dtype, "T", "B", D))
    w, r = g.add_input("w", typed(dtype, rows, D)), g.add_input("r", typed(dtype, rows, H))
    given = [g.add_input(f"b{i}", typed(dtype, rows)) if has else None for i, has in enumerate(biases)]
    states = [g.add_input(n, typed(dtype, "B", H)) for n in (("h", "c") if kind == "lstm" else ("h",))]
    for result in g.create(f"recurrent.{kind}", [x, w, r, *given, *states], attrs).results:
        g.add_output(result)
    g.verify()
    return g


def inputs(g, length, batch):
    sizes = {"T": length, "B": batch}
    shapes = [[n if isinstance(n, int) else n.evaluate(sizes) for n in v.shape] for v in g.inputs]
    return [torch.randn(s).to(v.dtype.torch) for s, v in zip(shapes, g.inputs, strict=True)]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", list(GATES))
def test_at_every_length(kind, reverse):
    for biases in itertools.product((False, True), repeat=2 if kind == "gru" else 1):
        for extra in ({}, {"activation": "relu"}) if kind == "rnn" else ({},):
            g = graph(kind, biases, {"reverse": reverse} | extra)
            executable = compiled(g)
            for length, batch in ((1, 1), (2, 3), (17, 2), (0, 2), (3, 0), (0, 0)):
                agrees(executable, inputs(g, length, batch), 1e-5)


@pytest.mark.parametrize("kind", list(GATES))
def test_nan_and_infinity_go_on(kind):
    """ONNX Runtime's own operators make numbers of them."""
    g = graph(kind, (True,) * (1 + (kind == "gru")), {})
    given = inputs(g, 4, 3)
    given[0][1, 0, 2], given[0][2, 1, 0] = float("nan"), float("inf")
    y, *_ = agrees(compiled(g), given, 1e-5)
    assert y[1:, 0].isnan().all()
    assert not y[:, 2].isnan().any()


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 2e-2), ("f16", 2e-3), ("f64", 1e-12)])
def test_other_floats(dtype, tolerance):
    g = graph("lstm", (True,), {}, dtype)
    agrees(compiled(g), inputs(g, 4, 2), tolerance)
