"""`linear.conv`: against torch, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from moec.ir import CompileError, Dim, Graph, TensorType, run

ONE = {"stride": (1,), "before": (0,), "after": (0,), "dilation": (1,)}


def graph(x, w, b=None, **attrs):
    g = Graph()
    operands = [None if t is None else g.add_input(f"x{i}", t) for i, t in enumerate((x, w, b))]
    g.add_output(g.create("linear.conv", operands, ONE | attrs).result)
    return g


def typed(*shape, dtype="f32"):
    return TensorType(dtype, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_agrees_with_torch(axes, groups, dtype):
    x = torch.randn(2, 4, *(7, 6, 5)[:axes]).to(dtype)
    w, b = torch.randn(8, 4 // groups, *(3, 2, 1)[:axes]).to(dtype), torch.randn(8).to(dtype)
    stride, pad, dilation = (2, 1, 3)[:axes], (1, 0, 2)[:axes], (2, 1, 1)[:axes]
    attrs = {"stride": stride, "before": pad, "after": pad, "dilation": dilation, "groups": groups}
    g = graph(*map(TensorType.of, (x, w, b)), **attrs)
    conv = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    want = conv(x.double(), w.double(), b.double(), stride, pad, dilation, groups)
    tol = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    (got,) = run(g, [x.transpose(0, -1).contiguous().transpose(0, -1), w, b])  # of other strides
    torch.testing.assert_close(got.double(), want, rtol=tol, atol=tol)
    assert got.dtype == dtype


def test_sizes_are_floors():
    s = Dim("S")
    g = graph(typed(Dim("B"), 3, s), typed(5, 3, 4), stride=(3,), before=(2,), after=(1,), dilation=(2,))
    assert g.outputs[0].shape == (Dim("B"), 5, (s - 4) // 3 + 1)
    assert graph(typed(2, 3, s), typed(5, 3, 4), before=(3,)).outputs[0].shape == (2, 5, s)


def test_nothing_to_see():
    """No batch, no place for the kernel (one element short of it), or an empty axis between zeros."""
    w = torch.randn(2, 3, 4)
    for shape, attrs in (((0, 3, 9), {}), ((2, 3, 3), {}), ((2, 3, 0), {"before": (2,), "after": (2,)})):
        x = torch.randn(shape)
        g = graph(TensorType.of(x), TensorType.of(w), **attrs)
        (got,) = run(g, [x, w])
        assert not got.any()
        assert TensorType.of(got) == g.outputs[0].type


@pytest.mark.parametrize(
    ("x", "w", "b", "attrs", "message"),
    [
        (typed(2, 3), typed(2, 3), None, {}, "must have one to three spatial axes"),
        (typed(2, 3, 5), typed(4, 3, 2, dtype="f64"), None, {}, "equal float dtypes, got f32 and f64"),
        (typed(2, 3, 5), typed(4, 2, 2), None, {}, r"x has 3 channels, weight takes 2 × 1"),
        (typed(2, 4, 5), typed(3, 2, 2), None, {"groups": 2}, "3 output channels in 2 groups"),
        (typed(2, 3, 5), typed(4, 3, Dim("K")), None, {}, "must have rank 3 and known sizes"),
        (typed(2, 3, 5), typed(4, 3, 2), typed(3), {}, r"bias f32\[3\] does not fit"),
        (typed(2, 3, 5), typed(4, 3, 2), None, {"stride": (0,)}, r"stride \(0,\), expected 1 integers of at least 1"),
        (typed(2, 3, 5), typed(4, 3, 2), None, {"after": (1, 1)}, r"after \(1, 1\), expected 1 integers"),
        (typed(2, 3, 2), typed(4, 3, 4), None, {}, "does not fit axis 2"),
    ],
)
def test_refuses(x, w, b, attrs, message):
    with pytest.raises(CompileError, match=message):
        graph(x, w, b, **attrs)
