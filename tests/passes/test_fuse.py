"""Fusions: each fires on the forms that models write, keeps the meaning, and stays away from look-alikes."""

import pytest
import torch

from moec.ir import Builder, Dim, Graph, TensorType, Weight, run
from moec.passes import Canonicalise, DeadCode, FuseAttention, FuseMLP, FuseNorm, FuseRoPE

B, S, D = Dim("B"), Dim("S"), 8


def graph_of(body, **inputs):
    graph = Graph()
    values = {n: graph.add_input(n, TensorType(*t)) for n, t in inputs.items()}
    out = body(Builder(graph), **values)
    for v in out if isinstance(out, tuple) else (out,):
        graph.add_output(v)
    return graph


def fuse(p, graph, tolerance=1e-5):
    """Canonicalise, apply, clean up; equal meaning at three sizes; a second time changes nothing. The ops."""
    start = Canonicalise().run(graph)
    after = DeadCode().run(p.run(start))
    after.verify()
    for sizes in ({"B": 1, "S": 1}, {"B": 2, "S": 5}, {"B": 3, "S": 0}):
        generator = torch.Generator().manual_seed(0)
        args = []
        for v in graph.inputs:
            shape = [s.evaluate(sizes) if isinstance(s, Dim) else s for s in v.shape]
            args.append(torch.randn(shape, generator=generator).to(v.dtype.torch))
        for got, want in zip(run(after, args), run(graph, args), strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert DeadCode().run(p.run(after)) == after
    return [n.op for n in after.nodes if n.op not in ("tensor.constant",)]


def weight(b, name="w", *shape):
    shape = shape or (D,)
    data = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return b.graph.add_weight(Weight.of(name, data))


def rms(b, x, w=None, eps=1e-6, axis=-1, power="pow"):
    square = b.pow(x, 2.0) if power == "pow" else b.mul(x, x)
    mean = b.mean(square, axes=(axis,), keepdim=True)
    y = b.mul(x, b.rsqrt(b.add(mean, eps)))
    return y if w is None else b.mul(w, y)


X = ("f32", (B, S, D))


@pytest.mark.parametrize("power", ["pow", "mul"])
def test_rms_norm(power):
    assert fuse(FuseNorm(), graph_of(lambda b, x: rms(b, x, weight(b), power=power), x=X)) == ["norm.rms"]


def test_rms_norm_by_division():
    def body(b, x):
        return b.div(x, b.sqrt(b.add(b.mean(b.mul(x, x), axes=(2,), keepdim=True), 1e-5)))

    assert fuse(FuseNorm(), graph_of(body, x=X)) == ["norm.rms"]


def test_rms_norm_in_bf16_goes_through_f32():
    def body(b, x):
        w = b.graph.add_weight(Weight.of("w", torch.ones(D, dtype=torch.bfloat16)))
        return b.mul(w, b.cast(rms(b, b.cast(x, dtype="f32")), dtype="bf16"))

    assert fuse(FuseNorm(), graph_of(body, x=("bf16", (B, S, D))), 1e-2) == ["norm.rms"]


def test_norm_over_another_axis_stays():
    assert "norm.rms" not in fuse(FuseNorm(), graph_of(lambda b, x: rms(b, x, axis=0), x=("f32", (4, S))))


def test_norm_of_two_different_values_stays():
    def body(b, x, y):
        return b.mul(x, b.rsqrt(b.add(b.mean(b.mul(x, y), axes=(-1,), keepdim=True), 5.0)))

    graph = graph_of(body, x=X, y=X)
    assert not FuseNorm().run(Canonicalise().run(graph)).find("norm.rms")


def test_a_weight_per_token_is_no_norm_weight():
    assert fuse(FuseNorm(), graph_of(lambda b, x, w: b.mul(w, rms(b, x)), x=X, w=X)) == ["norm.rms", "math.mul"]


def test_residual_and_norm():
    def body(b, x, y):
        total = b.add(x, y)
        return rms(b, total, weight(b)), total

    assert fuse(FuseNorm(), graph_of(body, x=X, y=X)) == ["norm.add_rms"]


def test_a_broadcast_residual_is_not_fused():
    def body(b, x, y):
        return rms(b, b.add(x, y), weight(b))

    assert fuse(FuseNorm(), graph_of(body, x=X, y=("f32", (D,)))) == ["math.add", "norm.rms"]


def test_swiglu_and_its_look_alike():
    assert fuse(FuseMLP(), graph_of(lambda b, x, y: b.mul(b.silu(x), y), x=X, y=X)) == ["math.swiglu"]
    sigmoid = graph_of(lambda b, x, y: b.mul(b.mul(b.sigmoid(x), x), y), x=X, y=X)
    assert fuse(FuseMLP(), sigmoid) == ["math.swiglu"]
    plain = graph_of(lambda b, x, y: b.mul(b.sigmoid(x), y), x=X, y=X)
    assert fuse(FuseMLP(), plain) == ["math.sigmoid", "math.mul"]


HEADS = ("f32", (B, 2, S, D))
ANGLES = ("f32", (B, S, D // 2))


def tables(b, angle, doubled=True, scale=None):
    both = b.concat(angle, angle, axis=-1) if doubled else angle
    out = []
    for f in (b.cos, b.sin):
        t = f(both)
        t = t if scale is None else b.mul(t, scale)
        out.append(b.reshape(t, shape=(B, 1, S, both.shape[-1])))
    return out


def half_rotated(b, x, cos, sin):
    d = x.shape[-1]
    first, second = b.slice(x, axis=-1, start=0, end=d // 2), b.slice(x, axis=-1, start=d // 2, end=d)
    return b.add(b.mul(x, cos), b.mul(b.concat(b.neg(second), first, axis=-1), sin))


@pytest.mark.parametrize("scale", [None, 0.7])
def test_half_rotated_rope(scale):
    def body(b, x, angle):
        return half_rotated(b, x, *tables(b, angle, scale=scale))

    ops = fuse(FuseRoPE(), graph_of(body, x=HEADS, angle=ANGLES))
    assert ops.count("rope.apply") == 1
    assert not {"tensor.concat", "math.neg", "math.add"} & set(ops)


def test_rope_shared_by_queries_and_keys():
    def body(b, x, y, angle):
        cos, sin = tables(b, angle)
        return half_rotated(b, x, cos, sin), half_rotated(b, y, cos, sin)

    ops = fuse(FuseRoPE(), graph_of(body, x=HEADS, y=("f32", (B, 1, S, D)), angle=ANGLES))
    assert ops.count("rope.apply") == 2
    assert ops.count("math.cos") == 1


def deinterleave_by_transpose(b, x):
    pairs = b.reshape(x, shape=(*x.shape[:-1], D // 2, 2))
    return b.reshape(b.transpose(pairs, perm=(0, 1, 2, 4, 3)), shape=x.shape)


def deinterleave_by_slices(b, x):
    even = b.slice(x, axis=-1, start=0, end=D, step=2)
    return b.concat(even, b.slice(x, axis=-1, start=1, end=D, step=2), axis=-1)


@pytest.mark.parametrize("deinterleave", [deinterleave_by_transpose, deinterleave_by_slices])
def test_interleaved_rope(deinterleave):
    graph = graph_of(lambda b, x, angle: half_rotated(b, deinterleave(b, x), *tables(b, angle)), x=HEADS, angle=ANGLES)
    ops = fuse(FuseRoPE(), graph)
    assert ops.count("rope.apply") == 1
    assert not {"tensor.transpose", "tensor.slice", "tensor.concat"} & set(ops)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_on_pairs(interleaved):
    def body(b, x, angle):
        cos, sin = tables(b, angle, doubled=False)
        if interleaved:
            first, second = (b.slice(x, axis=-1, start=i, end=D, step=2) for i in (0, 1))
        else:
            first, second = b.slice(x, axis=-1, start=0, end=D // 2), b.slice(x, axis=-1, start=D // 2, end=D)
        one = b.sub(b.mul(first, cos), b.mul(second, sin))
        return b.concat(one, b.add(b.mul(second, cos), b.mul(first, sin)), axis=-1)

    assert fuse(FuseRoPE(), graph_of(body, x=HEADS, angle=ANGLES)).count("rope.apply") == 1


def test_unequal_halves_of_cos_are_no_rope():
    def body(b, x, angle, other):
        cos = b.reshape(b.cos(b.concat(angle, other, axis=-1)), shape=(B, 1, S, D))
        sin = b.reshape(b.sin(b.concat(angle, other, axis=-1)), shape=(B, 1, S, D))
        return half_rotated(b, x, cos, sin)

    assert "rope.apply" not in fuse(FuseRoPE(), graph_of(body, x=HEADS, angle=ANGLES, other=ANGLES))


def test_rotation_the_wrong_way_is_no_rope():
    def body(b, x, angle):
        cos, sin = tables(b, angle)
        first, second = b.slice(x, axis=-1, start=0, end=4), b.slice(x, axis=-1, start=4, end=8)
        return b.add(b.mul(x, cos), b.mul(b.concat(second, b.neg(first), axis=-1), sin))

    assert "rope.apply" not in fuse(FuseRoPE(), graph_of(body, x=HEADS, angle=ANGLES))


def test_repeated_heads_are_shared():
    def body(b, q, k, v):
        def repeat(x):
            five = b.reshape(x, shape=(B, 2, 1, S, D))
            return b.reshape(b.expand(five, shape=(B, 2, 3, S, D)), shape=(B, 6, S, D))

        return b.sdpa(q, repeat(k), repeat(v), scale=0.5, causal=True)

    assert fuse(FuseAttention(), graph_of(body, q=("f32", (B, 6, S, D)), k=HEADS, v=HEADS)) == ["attention.sdpa"]


def test_tiled_heads_are_not_repeated_ones():
    def body(b, q, k, v):
        def tile(x):
            five = b.reshape(x, shape=(B, 1, 2, S, D))
            return b.reshape(b.expand(five, shape=(B, 3, 2, S, D)), shape=(B, 6, S, D))

        return b.sdpa(q, tile(k), tile(v), scale=0.5)

    ops = fuse(FuseAttention(), graph_of(body, q=("f32", (B, 6, S, D)), k=HEADS, v=HEADS))
    assert ops.count("tensor.expand") == 2


@pytest.mark.parametrize("masked", [True, False])
def test_eager_attention(masked):
    def body(b, q, k, v, mask):
        scores = b.mul(b.matmul(q, b.transpose(k, perm=(0, 1, 3, 2))), 0.25)
        scores = b.add(scores, mask) if masked else scores
        return b.matmul(b.softmax(scores, axis=-1), v), b.neg(mask)

    ops = fuse(FuseAttention(), graph_of(body, q=HEADS, k=HEADS, v=HEADS, mask=("f32", (B, 1, S, S))))
    assert ops == ["attention.sdpa", "math.neg"]


def test_softmax_over_queries_is_no_attention():
    def body(b, q, k, v):
        scores = b.mul(b.matmul(q, b.transpose(k, perm=(0, 1, 3, 2))), 0.25)
        return b.matmul(b.softmax(scores, axis=2), v)

    assert "attention.sdpa" not in fuse(FuseAttention(), graph_of(body, q=HEADS, k=HEADS, v=HEADS))


@pytest.mark.parametrize("chosen", [False, True], ids=["added", "chosen"])
def test_a_mask_of_more_batches_than_the_queries(chosen):
    def body(b, q, k, v, mask):
        scores = b.matmul(q, b.transpose(k, perm=(0, 1, 3, 2)))
        scores = b.where(b.gt(mask, -9.0), scores, b.const(-float("inf"), "f32")) if chosen else b.add(scores, mask)
        return b.matmul(b.softmax(scores, axis=-1), v)

    q = ("f32", (1, 2, 6, 4))
    graph = graph_of(body, q=q, k=q, v=q, mask=("f32", (3, 1, 6, 6)))
    assert "attention.sdpa" not in fuse(FuseAttention(), graph)
