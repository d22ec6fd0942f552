"""`attention.linear_attention`: against closed forms, and what it refuses."""

import pytest
import torch

from moec.ir import CompileError, Dim, Graph, TensorType, run


def graph(*types, **attrs):
    g = Graph()
    operands = [None if t is None else g.add_input(f"x{i}", t) for i, t in enumerate(types)]
    for r in g.create("attention.linear_attention", operands, attrs).results:
        g.add_output(r)
    return g


def evaluated(*tensors, **attrs):
    g = graph(*(None if t is None else TensorType.of(t) for t in tensors), **attrs)
    return run(g, [t for t in tensors if t is not None])


def operands(length, batch=2, shared=2, heads=4, rows=3, columns=5, dtype=torch.float64):
    q, k = (torch.randn(batch, length, shared, rows, dtype=dtype) for _ in range(2))
    v, decay = torch.randn(batch, length, heads, columns, dtype=dtype), -torch.rand(batch, length, heads, dtype=dtype)
    return q, k / rows**0.5, v, decay, torch.rand(batch, length, heads, dtype=dtype)


@pytest.mark.parametrize("length", [0, 1, 7])
def test_without_delta_rule_it_is_a_masked_product(length):
    """o_t = Σ_{s ≤ t} exp(Σ_{s < r ≤ t} decay_r) (q_t · k_s) v_s."""
    q, k, v, decay, _ = operands(length)
    out, last = evaluated(q, k, v, decay, scale=0.3)
    q, k = (x.repeat_interleave(2, 2) for x in (q, k))
    total = decay.cumsum(1).transpose(1, 2)
    kept = torch.exp(total[..., :, None] - total[..., None, :]).tril()
    scores = torch.einsum("bthk,bshk->bhts", q, k) * kept
    torch.testing.assert_close(out, 0.3 * torch.einsum("bhts,bshv->bthv", scores, v))
    if length:
        torch.testing.assert_close(last, torch.einsum("bhs,bshk,bshv->bhkv", kept[:, :, -1], k, v))
    else:
        assert not last.any()


def test_with_delta_rule_a_key_reads_what_it_wrote():
    """β = 1 and keys of length 1: Sᵀk_t = v_t, whatever was there."""
    _, k, v, decay, _ = operands(9, shared=4)
    k = torch.nn.functional.normalize(k, dim=-1)
    out, _ = evaluated(k, k, v, decay, torch.ones_like(decay), torch.randn(2, 4, 3, 5).double())
    torch.testing.assert_close(out, v)


def test_a_sequence_may_be_cut_anywhere():
    q, k, v, decay, beta = operands(8)
    whole, end = evaluated(q, k, v, decay, beta)
    for cut in (0, 1, 3, 8):
        first = [x[:, :cut] for x in (q, k, v, decay, beta)]
        then = [x[:, cut:] for x in (q, k, v, decay, beta)]
        left, state = evaluated(*first)
        right, last = evaluated(*then, state)
        torch.testing.assert_close(torch.cat((left, right), 1), whole)
        torch.testing.assert_close(last, end)


def test_a_decay_for_every_row_may_be_the_same_for_all():
    q, k, v, decay, beta = operands(6)
    rows = decay[..., None].expand(*decay.shape, 3)
    for a, b in zip(evaluated(q, k, v, rows, beta), evaluated(q, k, v, decay, beta), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_floats_are_computed_in_f32(dtype):
    narrow = [x.to(dtype) for x in operands(50)]
    for got, want in zip(evaluated(*narrow), evaluated(*(x.float() for x in narrow)), strict=True):
        assert torch.equal(got, want.to(dtype))


def test_sizes():
    b, t = Dim("B"), Dim("T")
    q, v = TensorType("f32", (b, t, 1, 16)), TensorType("f32", (b, t, 8, 1))
    g = graph(q, q, v, TensorType("f32", (b, t, 8, 16)))
    assert [str(o.type) for o in g.outputs] == ["f32[B, T, 8, 1]", "f32[B, 8, 16, 1]"]


Q, V = TensorType("f32", (2, 3, 2, 4)), TensorType("f32", (2, 3, 4, 5))


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ((Q, Q.with_shape((2, 3, 4, 4)), V), "must be equal and of rank 4"),
        ((Q, Q, V.with_dtype("bf16")), "equal float dtypes, got f32, f32, bf16"),
        ((Q, Q, V.with_shape((2, 3, 3, 5))), "3 heads of v share 2 of k"),
        ((Q, Q, V.with_shape((2, 4, 4, 5))), "differ in batch or length"),
        ((Q, Q, V.with_shape((2, 3, Dim("H"), 5))), "must be known and positive"),
        ((Q, Q, V, TensorType("f32", (2, 3, 2))), r"decay f32\[2, 3, 2\], expected the shape \[2, 3, 4\], or with 4"),
        ((Q, Q, V, None, TensorType("f32", (2, 3, 1))), r"beta f32\[2, 3, 1\], expected the shape \[2, 3, 4\]"),
        ((Q, Q, V, None, None, V), r"state f32\[2, 3, 4, 5\], expected f32\[2, 4, 4, 5\]"),
    ],
)
def test_refuses(types, message):
    with pytest.raises(CompileError, match=message):
        graph(*types)
