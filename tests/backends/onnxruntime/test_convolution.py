"""Convolutions whose sizes are known at run time only."""

import pytest
import torch

import moec
from moec.backends import get_backend
from moec.ir import Graph, Weight

from .conftest import agrees, compiled, typed


def graph(x, weight, bias=None, **attrs):
    g = Graph("test")
    operands = [g.add_input("x", x), g.add_weight(Weight.of("w", weight))]
    operands.append(None if bias is None else g.add_weight(Weight.of("b", bias)))
    g.add_output(g.create("linear.conv", operands, attrs).result)
    g.verify()
    return g


PLAIN = {"stride": (1,), "before": (0,), "after": (0,), "dilation": (1,)}


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("portable", [False, True])
def test_causal_at_every_length(dtype, portable):
    """Depthwise, with zeros before the first element only, and with zeros at both ends as in nn.Conv1d."""
    x = typed(dtype, "B", 6, "T")
    weight, bias = torch.randn(6, 1, 4).to(x.dtype.torch), torch.randn(6).to(x.dtype.torch)
    for after in (0, 3):
        executable = compiled(graph(x, weight, bias, **PLAIN | {"before": (3,), "after": (after,), "groups": 6}),
                              portable=portable)  # fmt: skip
        for batch in (0, 1, 2):
            for length in (0, 1, 2, 3, 4, 5, 31):
                agrees(executable, [torch.randn(batch, 6, length).to(x.dtype.torch)], 1e-5 if dtype == "f32" else 1e-2)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_steps_between_results(stride, dilation):
    """Sizes are floors; a kernel that does not fit gives nothing where the formula gives 0."""
    attrs = PLAIN | {"stride": (stride,), "dilation": (dilation,), "before": (1,), "groups": 2}
    executable = compiled(graph(typed("f32", "B", 4, "T"), torch.randn(6, 2, 3), **attrs))
    for length in range(2 * dilation - 1, 14):
        agrees(executable, [torch.randn(2, 4, length)])


def test_two_dynamic_axes():
    attrs = {"stride": (2, 1), "before": (1, 0), "after": (0, 2), "dilation": (1, 2)}
    executable = compiled(graph(typed("f32", "B", 3, "H", "W"), torch.randn(5, 3, 3, 2), torch.randn(5), **attrs))
    for h, w in ((2, 0), (2, 1), (7, 5), (8, 8), (3, 17)):
        agrees(executable, [torch.randn(2, 3, h, w)])


def test_doubles_are_summed_place_by_place():
    """Conv has no kernel for them."""
    g = graph(typed("f64", 2, 4, 9), torch.randn(6, 2, 3).double(), **PLAIN | {"groups": 2, "stride": (2,)})
    assert get_backend("onnxruntime").missing(next(iter(g.nodes))) == "ONNX Runtime has no f64 kernel for Conv"
    x = torch.randn(2, 4, 9).double()
    (got,) = moec.compile(g, backend="onnxruntime")(x)
    (want,) = moec.compile(g, backend="reference")(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
