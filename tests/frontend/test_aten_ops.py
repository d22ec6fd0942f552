"""Single ops: the lowered op against torch, on awkward sizes, dtypes and special values."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from moec.frontend import trace
from moec.ir import Dim, run


class Fn(torch.nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *xs):
        return self.fn(*xs)


def check(fn, *xs, tol=1e-6):
    traced = trace(Fn(fn), xs)
    got = run(traced.graph, list(xs))
    want = [w for w in torch.utils._pytree.tree_leaves(fn(*xs)) if isinstance(w, torch.Tensor)]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=tol, atol=tol, equal_nan=True)
    return traced.graph


SPECIAL = torch.tensor([[-math.inf, -2.5, -0.0, 0.0], [0.5, 1.0, math.nan, math.inf]])
X = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
I = torch.tensor([[-7, -1, 0, 2], [3, 5, 8, -4]])
B = torch.tensor([[True, False, True, True], [False, False, True, False]])
EMPTY = torch.zeros(0, 4)
H = X.to(torch.bfloat16)

ELEMENTWISE = {
    "unary": (lambda x: [torch.neg(x), x.abs(), x.exp(), x.sin(), x.sigmoid(), F.silu(x), x.tanh(), x.sign()], SPECIAL),
    "integers become floats": (lambda i: [i.exp(), i.sigmoid(), i / 3, i.sqrt(), torch.mean(i.float())], I),
    "activations": (lambda x: [F.gelu(x), F.gelu(x, approximate="tanh"), F.elu(x), F.leaky_relu(x), F.relu(x),
                               F.softplus(x), F.softplus(x, 2.0, 3.0), F.hardtanh(x), F.relu6(x), F.mish(x)], X),
    "rounding": (lambda x: [x.floor(), x.ceil(), x.round(), x.trunc(), x.frac()], X * 3),
    "powers": (lambda x: [x**2, x**3, x**-1, x**0.5, x**-0.5, x**0, x**1.7, 2.0**x, x**x], X.abs() + 0.1),
    "integer powers": (lambda i: [i**2, i**3, i.pow(0)], I),
    "scalars promote": (lambda i: [i + 0.5, i * 2, 3 - i, i / 2, i // 2, i % 3, i.fmod(3), i.float() * 0.1], I),
    "division modes": (lambda i: [torch.div(i, 3, rounding_mode=m) for m in ("floor", "trunc")], I),
    "float division modes": (lambda x: [torch.div(x, 0.3, rounding_mode=m) for m in ("floor", "trunc")], X),
    "mixed dtypes": (lambda i, x: [i + x, x * i, torch.maximum(i.float(), x), i.int() + i, x.double() + x],
                     I, torch.randn(2, 4)),
    "half and number": (lambda h: [h * 0.1, h + 1e-3, h / 3, h * h, h - 0.5, 2 - h], H),
    "half and float scalar tensor": (lambda h, s: [h * s, h + s], H, torch.tensor(0.1)),
    "alpha": (lambda x: [torch.add(x, x, alpha=0.3), torch.sub(x, 1.0, alpha=2), torch.rsub(x, 2.0)], X),
    "booleans": (lambda b, c: [b & c, b | c, b ^ c, ~b, b + c, b * c, b.logical_xor(c), b == c, b < c], B, ~B.flip(0)),
    "compare": (lambda x: [x > 0, x == 0, x != x, x <= 0.5, x.isnan(), x.isinf(), x.isfinite()], SPECIAL),
    "where": (lambda x, b: [torch.where(b, x, 0.0), torch.where(b, 1, x), x.masked_fill(b, -1.0)], SPECIAL, B),
    "clamp": (lambda x: [x.clamp(-1, 1), x.clamp(min=0), x.clamp(max=0.5), x.clamp(x * 0, x * 0 + 1)], SPECIAL),
    "clamp integers": (lambda i: [i.clamp(-2, 3), i.clamp(min=0.5)], I),
    "casts": (lambda x: [x.to(torch.int64), x.half(), x.double(), x.bool(), x.to(torch.bfloat16)], X),
    "logs": (lambda x: [x.log(), x.log1p(), x.log2(), x.log10(), x.expm1(), x.exp2(), x.rsqrt()], X.abs() + 0.1),
    "empty": (lambda x: [x * 2 + 1, x.exp(), x > 0], EMPTY),
}  # fmt: skip

REDUCTIONS = {
    "sums": (lambda x: [x.sum(), x.sum(0), x.sum((0, 1), keepdim=True), x.mean(-1), x.mean(), x.sum([])], X),
    "integer sums": (lambda i: [i.sum(), i.int().sum(0), (i > 0).sum(1), i.float().mean(0)], I),
    "half": (lambda h: [h.sum(1), h.mean(1), h.sum(1, dtype=torch.float32), h.softmax(-1)], H),
    "extremes": (lambda x: [x.amax(1), x.amin(), x.max(), *x.max(1), *x.min(0, keepdim=True), x.argmax(), x.argmin(1),
                            x.argmax(0, keepdim=True)], X),
    "extremes of NaN": (lambda x: [x.amax(1), x.amin(1), x.argmin(1)], SPECIAL),
    "ties": (lambda i: [i.argmax(1), i.argmin(0), i.max(1)[1]], torch.tensor([[2, 5, 5, 1], [1, 1, 0, 1]])),
    "any all": (lambda b: [b.any(), b.all(1), b.any(0, keepdim=True), (b * 1).any(1)], B),
    "variance": (lambda x: [x.var(1), x.std(1, correction=0), x.var((0, 1)), *torch.var_mean(x, 0)], X),
    "norms": (lambda x: [x.norm(), torch.linalg.vector_norm(x, 1, 1), torch.linalg.vector_norm(x, math.inf)], X),
    "softmax": (lambda x: [x.softmax(-1), x.log_softmax(0), x.softmax(1, dtype=torch.float64), x.logsumexp(1)], X),
    "empty": (lambda x: [x.sum(0), x.sum(1), x.softmax(-1), x.cumsum(0), x.any()], EMPTY),
    "scans": (lambda x: [x.cumsum(1), x.cumsum(0), x.cumsum(1, dtype=torch.float64), x.diff(dim=1)], X),
    "sort": (lambda i: [*i.sort(1), torch.argsort(i, dim=0, stable=True),
                        *torch.sort(i, dim=1, descending=True, stable=True)], I),
    "topk": (lambda x: [*x.topk(2), *x.topk(1, dim=0, largest=False)], X),
}  # fmt: skip

T3 = torch.arange(24.0).reshape(2, 3, 4)
IDX = torch.tensor([2, 0, -1])
SHAPES = {
    "views": (lambda x: [x.view(6, 4), x.flatten(), x.unflatten(2, (2, 2)), x.transpose(0, 2), x.permute(1, 2, 0), x.mT,
                         x.unsqueeze(-1), x[:, None], x[0], x[..., -1], x.movedim(0, 1), x.reshape(-1)], T3),
    "squeeze": (lambda x: [x.squeeze(), x.squeeze(0), x.squeeze(1), x.squeeze((0, 2))], T3[:1, :, :1]),
    "expand": (lambda x: [x.expand(3, -1, -1), x.repeat(2, 1, 3), x.repeat(1, 2, 1, 1), x.repeat_interleave(2, 1),
                          torch.broadcast_to(x, (5, 1, 3, 4)), x.tile(2)], T3[:1]),
    "slices": (lambda x: [x[:, 1:], x[:, :-1], x[:, -2:], x[..., ::2], x[:, 5:], x[:, :99], x.narrow(1, 1, 2)], T3),
    "split": (lambda x: [*x.split(2, 1), *x.chunk(3, 2), *x.unbind(0), *x.split([1, 3], -1),
                         *x.tensor_split(2, 1)], T3),
    "join": (lambda x: [torch.cat([x, x[:, :1]], 1), torch.stack([x, x * 2], -1), torch.hstack([x, x]),
                        torch.cat([x.int(), x])], T3),
    "flip roll": (lambda x: [x.flip(1), x.flip((0, 2)), x.roll(1, 2), x.roll((1, -2), (0, 1)), x.roll(5)], T3),
    "pad": (lambda x: [F.pad(x, (1, 2)), F.pad(x, (0, 1, 2, 0), value=3.0), F.pad(x, (-1, 1))], T3),
    "triangles": (lambda x: [x.tril(), x.triu(1), x.tril(-1), x.diagonal(0, 1, 2), x.diagonal(-1, 0, 1)], T3),
    "create": (lambda x: [torch.arange(5), torch.arange(1, 2, 0.25), torch.arange(9, 2, -3), torch.eye(3), x * 0 + 1,
                          torch.ones(2), torch.zeros_like(x), torch.full((2,), 7), x.new_full((1,), 2.0),
                          torch.linspace(0, 1, 5), torch.tensor([1.5, 2.5]) + 1], T3),
    "write into slices": (lambda x: [_interleave(x), _overwrite(x)], T3),
}  # fmt: skip


def _interleave(x):
    y = torch.empty_like(x)
    y[..., ::2] = -x[..., :2]
    y[..., 1::2] = x[..., 2:]
    return y


def _overwrite(x):
    y = x.clone()
    y[:, 1] = 0
    y[0, :, 1:3] += 10
    y[:, -1, 0] = x[:, 0, 0]
    return y


INDEXING = {
    "one index": (lambda x, i: [x[:, i], x.index_select(1, i % 3), x[i % 2], x[:, :, i[:2]]], T3, IDX),
    "several": (lambda x, i: [x[:2, i, i], x[i % 2, i], x[i % 2, :, i], x[i[:, None] % 2, i], x[0, i]], T3, IDX),
    "gather": (lambda x, i: [x.gather(1, i[:, None].expand(3, 4)[None].expand(2, 3, 4) % 3),
                             x.gather(2, i[None, :2, None] % 3), torch.take_along_dim(x, i[None, :, None] % 3, 2),
                             torch.take_along_dim(x, i[None, :, None] % 3)],
               T3, IDX),
    "scatter": (lambda x: [x.scatter(1, x[:, :1].long() % 3, 9.0), x.scatter_add(2, x.long() % 4, x),
                           x.scatter(2, x[:, :2, :1].long() % 4, x)], T3),
    "put": (lambda x, i: [x.index_put((i % 2,), x[:1] * 3, accumulate=True), x.index_copy(1, i % 3, -x),
                          x.index_add(1, i, x, alpha=2), x.index_fill(1, i[:1], 5.0),
                          x.index_put((i % 2, i), x[0, 0])], T3, torch.tensor([2, 0, 1])),
    "masked put": (lambda x: [_masked(x)], T3),
    "embedding": (lambda w, i: [F.embedding(i % 3, w), F.one_hot(i % 3, 4)], torch.randn(3, 4), IDX[None]),
    "histogram": (lambda i: [torch.histc(i.float(), bins=6, min=0, max=5)], torch.tensor([[0, 5, 5], [7, -1, 2]])),
}  # fmt: skip


def _masked(x):
    y = x.clone()
    y[x > 5] = -1.0
    y[torch.tensor([True, False])] = 2.0
    return y


L = torch.nn.Linear(4, 5)
LINEAR = {
    "matmul": (lambda a, b: [a @ b, a[0] @ b[0], a[0, 0] @ b[0], a @ b[0, :, 0], a[0, 0] @ b[0, :, 0], a @ b[0]],
               T3, T3.mT.contiguous()),
    "linear": (lambda x: [F.linear(x, L.weight, L.bias), F.linear(x[0, 0], L.weight), F.linear(x, L.weight[0])], T3),
    "products": (lambda a, b: [torch.mm(a[0], b[0]), torch.bmm(a, b), torch.addmm(a[0] @ b[0], a[0], b[0], beta=0.5),
                               torch.baddbmm(a @ b, a, b, alpha=2), torch.einsum("bij,bjk->bik", a, b),
                               torch.outer(a[0, 0], b[0, :, 0]), a[0, 0].dot(b[0, :, 0])], T3, T3.mT.contiguous()),
    "norm layers": (lambda x: [F.layer_norm(x, (4,), L.weight[0], L.weight[1]), F.layer_norm(x, (3, 4)),
                               F.rms_norm(x, (4,), L.weight[0], 1e-5), F.rms_norm(x, (3, 4)),
                               F.group_norm(x, 3), F.batch_norm(x, x[0, :, 0], x[1, :, 1].abs())], T3 / 7),
    "half norms": (lambda h: [F.rms_norm(h, (5,), h[0]), F.layer_norm(h, (5,), h[0], h[1])], H),
}  # fmt: skip

Q, K, V = (torch.randn(2, h, s, 8, generator=torch.Generator().manual_seed(h)) for h, s in ((4, 5), (2, 7), (2, 7)))
ATTENTION = {
    "grouped": (lambda q, k, v: [F.scaled_dot_product_attention(q, k, v, enable_gqa=True)], Q, K, V),
    "causal, more keys than queries": (
        lambda q, k, v: [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)], Q, K, V),
    "causal square": (lambda q: [F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.2)], Q),
    "masks": (lambda q, k: [F.scaled_dot_product_attention(q, q, q, k[:1, :1, :5, :5] > 0),
                            F.scaled_dot_product_attention(q, q, q, k[0, 0, :5, :5])], Q, torch.randn(2, 2, 7, 7)),
    "fully masked row": (lambda q: [F.scaled_dot_product_attention(q, q, q, q[0, 0, :, :5] > 9)], Q),
    "rank 3 and 5": (lambda q: [F.scaled_dot_product_attention(q[0], q[0], q[0]),
                                F.scaled_dot_product_attention(q[None], q[None], q[None])], Q),
}  # fmt: skip
COMPLEX = {
    "rotary": (lambda x, a: torch.view_as_real(torch.view_as_complex(x) * torch.polar(torch.ones_like(a), a)),
               torch.randn(2, 3, 4, 2), torch.randn(3, 4)),
    "parts": (lambda x: [torch.view_as_complex(x).abs(), torch.view_as_complex(x).conj().imag,
                         torch.view_as_complex(x).transpose(0, 1).real], torch.randn(2, 3, 2)),
}  # fmt: skip

GROUPS = {
    "elementwise": ELEMENTWISE, "reduction": REDUCTIONS, "shape": SHAPES, "index": INDEXING, "linear": LINEAR,
    "attention": ATTENTION, "complex": COMPLEX,
}  # fmt: skip


@pytest.mark.parametrize(("group", "case"), [(g, c) for g, cases in GROUPS.items() for c in cases])
def test_op(group, case):
    fn, *xs = GROUPS[group][case]
    tolerance = {"linear": 3e-5, "attention": 1e-5}.get(group, 2e-6)
    half = any(x.dtype is torch.bfloat16 for x in xs)
    check(fn, *xs, tol=2e-2 if half and group == "linear" else tolerance)


def test_half_width_arithmetic_is_bit_exact():
    """A number that bfloat16 cannot hold is not rounded to it first."""
    x = torch.randn(4000).to(torch.bfloat16)
    graph = trace(Fn(lambda h: h * 0.1), (x,)).graph
    assert torch.equal(run(graph, [x])[0], x * 0.1)
    assert not torch.equal(x * 0.1, x * torch.tensor(0.1, dtype=torch.bfloat16)[None])
    exact = trace(Fn(lambda h: h * 2.0), (x,)).graph
    assert not exact.find("math.cast")


def test_grouped_mm_in_float32_and_bfloat16():
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.randn(6, 8).to(dtype), torch.randn(3, 8, 16).to(dtype)
        graph = check(lambda x, w: F.grouped_mm(x, w, offs=ends), x, w, tol=2e-2 if dtype is torch.bfloat16 else 1e-5)
        assert len(graph.find("linear.grouped_matmul")) == 1


OP_DB = ["nn.functional.glu", "nn.functional.cosine_similarity", "nn.functional.hardswish", "lerp", "addcmul",
         "logaddexp", "cross", "nan_to_num", "index_select", "sgn", "count_nonzero", "movedim"]  # fmt: skip


@pytest.mark.parametrize("name", OP_DB)
def test_sample_of_torch_op_database(name):
    from torch.testing._internal.common_methods_invocations import op_db

    op = next(o for o in op_db if o.name == name)
    done = 0
    for sample in op.sample_inputs("cpu", torch.float32):
        if not isinstance(sample.input, torch.Tensor) or sample.input.requires_grad:
            continue
        rest = [a for a in sample.args if isinstance(a, torch.Tensor)]

        def call(x, *tensors, sample=sample):
            given = iter(tensors)
            args = [next(given) if isinstance(a, torch.Tensor) else a for a in sample.args]
            return op.op(x, *args, **sample.kwargs)

        check(call, sample.input.detach(), *[r.detach() for r in rest], tol=1e-5)
        done += 1
        if done == 2:
            break
    assert done


def test_convolutions():
    x, w, b = torch.randn(2, 4, 9), torch.randn(6, 2, 3), torch.randn(6)
    graph = check(lambda x: F.conv1d(x, w, b, stride=2, padding=2, dilation=2, groups=2), x, tol=1e-5)
    assert graph.count_ops().keys() == {"tensor.constant", "linear.conv"}
    check(lambda x: F.conv1d(x, w, padding="same", groups=2), x, tol=1e-5)
    check(lambda x: F.conv1d(x, w, groups=2), x[0], tol=1e-5)  # without a batch
    check(lambda x: F.conv2d(x[..., None], w[..., None], b, padding=(1, 0), groups=2), x, tol=1e-5)
    graph = check(lambda x: F.conv_transpose1d(x, torch.ones(4, 2, 3), stride=2), x, tol=1e-5)
    assert graph.find("extern.aten_convolution")


def test_convolution_of_dynamic_length():
    conv = torch.nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2).eval()
    traced = trace(conv, (torch.randn(2, 4, 9),), dynamic_shapes={"input": {0: "B", 2: "S"}})
    assert traced.graph.outputs[0].shape == (Dim("B"), 6, (Dim("S") - 1) // 2 + 1)
    for batch, length in ((1, 1), (3, 2), (2, 30)):
        x = torch.randn(batch, 4, length)
        torch.testing.assert_close(run(traced.graph, [x])[0], conv(x))
