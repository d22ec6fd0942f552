"""`nn.LSTM`, `nn.GRU`, `nn.RNN`: every option, at lengths and batches that were not traced, on both CPU backends."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import moec
from moec.frontend import trace

OPTIONS = [
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True},
    {"bias": False, "bidirectional": True, "batch_first": True},
    {"num_layers": 3, "dropout": 0.5},
]


def build(kind, **options):
    torch.manual_seed(0)
    return {"relu": lambda: nn.RNN(5, 4, nonlinearity="relu", **options)}.get(
        kind, lambda: getattr(nn, kind)(5, 4, **options)
    )().eval()  # fmt: skip


def same(got, want, tolerance=1e-5):
    for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_nothing_is_said_of_torchs_own_list_of_weights(kind, recwarn):
    trace(build(kind), (torch.randn(4, 3, 5),))
    assert not [str(w.message) for w in recwarn]


@pytest.mark.parametrize("backend", ["reference", "onnxruntime"])
@pytest.mark.parametrize(("kind", "options"), itertools.product(["LSTM", "GRU", "RNN", "relu"], OPTIONS))
def test_every_length(kind, options, backend):
    model = build(kind, **options)
    compiled = moec.compile(model, (torch.randn(4, 3, 5),), backend=backend, dynamic_shapes=({0: "A", 1: "B"},))
    ops = compiled.graph.count_ops()
    assert sum(n for op, n in ops.items() if op.startswith("recurrent.")) == (
        options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    )
    for shape in ((1, 1, 5), (4, 3, 5), (7, 2, 5), (2, 33, 5)):
        x = torch.randn(shape)
        with torch.no_grad():
            same(compiled(x), model(x))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_states_go_in(kind):
    model = build(kind)
    h = torch.randn(1, 3, 4)
    state = (h, torch.randn(1, 3, 4)) if kind == "LSTM" else h
    compiled = moec.compile(model, (torch.randn(4, 3, 5), state), backend="onnxruntime")
    x = torch.randn(4, 3, 5)
    with torch.no_grad():
        same(compiled(x, state), model(x, state))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 3e-2)])
def test_other_floats(dtype, tolerance):
    model = build("LSTM").to(dtype)
    x = torch.randn(6, 2, 5, dtype=dtype)
    for backend in ("reference", "onnxruntime"):
        with torch.no_grad():
            same(moec.compile(model, (x,), backend=backend)(x), model(x), tolerance)


def test_what_stays_torchs():
    """A projection of the hidden state, one sequence without a batch: written out step by step, or batched by torch."""
    x = torch.randn(3, 2, 5)
    projected = nn.LSTM(5, 4, proj_size=2).eval()
    traced = trace(projected, (x,))
    assert not traced.graph.find("recurrent.lstm")
    same(moec.ir.run(traced.graph, [x]), projected(x))
    plain = build("GRU")
    same(moec.ir.run(trace(plain, (x[:, 0],)).graph, [x[:, 0]]), plain(x[:, 0]))


def test_the_last_row_of_a_dynamic_sequence():
    """As classifiers use it."""

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = build("LSTM", batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    model = Last().eval()
    compiled = moec.compile(model, (torch.randn(2, 9, 5),), backend="onnxruntime", dynamic_shapes=({0: "B", 1: "T"},))
    for length in (1, 2, 40):
        x = torch.randn(3, length, 5)
        with torch.no_grad():
            same(compiled(x), model(x))
