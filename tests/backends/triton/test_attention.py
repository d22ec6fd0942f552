"""Attention against softmax in float64."""

import pytest
import torch

from moec.backends.triton import run
from moec.backends.triton.kernels.attention import AttentionTile

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def expected(q, k, v, mask, scale, causal, sinks=None, softcap=None):
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    s, t = scores.shape[-2:]
    visible = torch.ones(s, t, dtype=torch.bool)
    if causal:
        visible = torch.arange(t) <= torch.arange(s)[:, None] + t - s
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        scores = scores + mask.double()
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.double().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat((scores, column), -1).softmax(-1)[..., :-1] @ v
    dead = (scores == float("-inf")).all(-1, keepdim=True)
    return scores.masked_fill(dead, 0).softmax(-1).masked_fill(dead, 0) @ v


def operands(shape, dtype=torch.float32):
    b, h, hkv, s, t, d, dv = shape
    q, k, v = torch.randn(b, h, s, d), torch.randn(b, hkv, t, d), torch.randn(b, hkv, t, dv)
    return q.to(dtype), k.to(dtype), v.to(dtype)


SHAPES = {
    "one": (1, 1, 1, 1, 1, 1, 1),
    "grouped": (2, 4, 2, 5, 8, 8, 5),
    "several tiles": (1, 2, 2, 70, 70, 24, 16),
    "mla decode": (1, 3, 1, 1, 300, 192, 128),
    "latent": (1, 4, 1, 2, 9, 80, 72),
    "more queries than keys": (1, 2, 2, 6, 3, 16, 16),
    "no queries": (2, 2, 1, 0, 3, 8, 8),
    "no keys": (2, 2, 1, 3, 0, 8, 8),
    "no batch": (0, 2, 1, 3, 3, 8, 8),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_attention(close, name, causal):
    q, k, v = operands(SHAPES[name])
    close(run("attention", q, k, v, scale=0.3, causal=causal), expected(q, k, v, None, 0.3, causal))


@pytest.mark.parametrize("name", ["grouped", "several tiles", "more queries than keys", "no queries", "no keys"])
@pytest.mark.parametrize(("sunk", "softcap"), [(True, None), (False, 0.7), (True, 5.0)])
def test_sinks_and_softcap(close, name, sunk, softcap):
    q, k, v = operands(SHAPES[name])
    sinks = torch.randn(q.shape[1]) if sunk else None
    mask = torch.rand(q.shape[2], k.shape[2]) < 0.5  # rows that see nothing too
    got = run("attention", q, k, v, mask, sinks, scale=0.6, causal=True, softcap=softcap)
    close(got, expected(q, k, v, mask, 0.6, True, sinks, softcap))


def test_a_large_softcap_leaves_small_scores_exact():
    """A tanh that cancels near 0 is off by an absolute 1e-7, which the cap makes 1e-5 of a score."""
    q, k, _ = operands((1, 2, 2, 4, 24, 16, 16))
    q, v = q * 0.01, torch.eye(24).expand(1, 2, 24, 24).contiguous()  # the result is the weights
    got = run("attention", q, k, v, scale=0.25, softcap=200.0)
    want = expected(q, k, v, None, 0.25, False, None, 200.0)
    assert float(((got - want) / want).abs().max()) < 8e-7


def test_wrong_sinks_are_refused():
    q, k, v = operands(SHAPES["grouped"])
    with pytest.raises(ValueError, match="one number per head"):
        run("attention", q, k, v, None, torch.ones(3), scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(close, dtype):
    q, k, v = operands((2, 4, 2, 9, 20, 32, 32), dtype)
    y = run("attention", q, k, v, scale=0.2, causal=True)
    assert y.dtype == dtype
    close(y, expected(q, k, v, None, 0.2, True), roundings=2)


@pytest.mark.parametrize("mask_shape", [(1, 1, 7, 12), (2, 1, 1, 12), (2, 4, 7, 12), (7, 1), (12,)])
@pytest.mark.parametrize("causal", [False, True])
def test_masks(close, mask_shape, causal):
    q, k, v = operands((2, 4, 2, 7, 12, 16, 16))
    for mask in (torch.rand(mask_shape) > 0.4, torch.randn(mask_shape)):
        got = run("attention", q, k, v, mask, scale=0.3, causal=causal)
        close(got, expected(q, k, v, mask, 0.3, causal))


@pytest.mark.parametrize("tile", [AttentionTile(16, 16), AttentionTile(32, 64), AttentionTile(16, 32, 16)], ids=str)
def test_tiles(close, tile):
    """Tiles that span heads, end within one, and cut the values' columns."""
    q, k, v = operands((1, 6, 2, 21, 50, 24, 40))
    mask = torch.rand(1, 6, 21, 50) > 0.3
    for given in (None, mask):
        got = run("attention", q, k, v, given, scale=0.3, causal=True, tile=tile)
        close(got, expected(q, k, v, given, 0.3, True))


def test_a_query_that_sees_nothing_gives_zeros():
    q, k, v = operands((1, 2, 1, 4, 6, 16, 16))
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[2] = False
    got = run("attention", q, k, v, mask, scale=1.0)
    assert got[:, :, 2].eq(0).all()
    assert not got.isnan().any()
    assert got[:, :, 1].abs().sum() > 0
    added = torch.zeros(4, 6).masked_fill(~mask, float("-inf"))
    assert torch.equal(run("attention", q, k, v, added, scale=1.0), got)
    lowest = torch.zeros(4, 6).masked_fill(~mask, torch.finfo(torch.float32).min)
    uniform = run("attention", q, k, v, lowest, scale=1.0)[:, :, 2]
    assert torch.allclose(uniform, v.mean(2).expand_as(uniform), atol=1e-6)  # finite, so it counts, as in torch


def test_large_scores_do_not_overflow(close):
    q, k, v = operands((1, 1, 1, 5, 300, 16, 16))
    close(run("attention", 50 * q, k, v, scale=1.0), expected(50 * q, k, v, None, 1.0, False), roundings=5)


def test_nan_stays_in_its_row():
    q, k, v = operands((1, 1, 1, 4, 6, 16, 16))
    q[0, 0, 1, 3] = float("nan")
    got = run("attention", q, k, v, scale=1.0)
    assert got[0, 0, 1].isnan().all()
    assert not got[0, 0, [0, 2, 3]].isnan().any()


def test_transposed_operands(close):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands((2, 4, 2, 5, 8, 16, 8)))
    close(run("attention", q, k, v, scale=0.3), expected(q, k, v, None, 0.3, False))


def test_refusals():
    q, k, v = operands((1, 3, 2, 4, 6, 16, 16))
    with pytest.raises(ValueError, match="3 query heads are no multiple of 2 key heads"):
        run("attention", q, k, v, scale=1.0)
    with pytest.raises(ValueError, match=r"mask bool\[5, 6\] does not broadcast to \[1, 2, 4, 6\]"):
        run("attention", q[:, :2], k, v, torch.ones(5, 6, dtype=torch.bool), scale=1.0)
    with pytest.raises(ValueError, match="must have one dtype"):
        run("attention", q[:, :2], k, v.bfloat16(), scale=1.0)
