"""Matrix products: full precision, FP8 codes with block scales, and the quantisation of activations."""

import pytest
import torch

from moec.backends.triton import run
from moec.backends.triton.kernels.tiles import Tile

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (5, 33, 200), (40, 300, 130), (17, 64, 0), (0, 5, 7), (3, 0, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(close, m, n, k, dtype):
    x, w, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    y = run("linear", x, w, b)
    assert y.dtype == dtype
    close(y, x.double() @ w.double().T + b.double())
    close(run("linear", x[None, :, None], w, out_dtype=torch.float32), (x.double() @ w.double().T)[None, :, None])


TILES = [Tile(16, 64, 128, swap=True), Tile(32, 64, 32), Tile(64, 64, 64)]


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_production_tiles(close, tile):
    """Several tiles in every direction, ragged in all three, more than a group of row tiles."""
    m, n, k = 8 * tile.m + 5, tile.n + 7, tile.k + 9
    x, w, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16(), torch.randn(n).bfloat16()
    close(run("linear", x, w, b, tile=tile), x.double() @ w.double().T + b.double())


def test_float32_is_not_rounded_to_tf32(close):
    x, w = torch.randn(20, 256) + 5, torch.randn(30, 256)
    close(run("linear", x, w), x.double() @ w.double().T)


def test_refusals():
    with pytest.raises(ValueError, match=r"weight must be torch\.float32 as x is, got torch\.bfloat16"):
        run("linear", torch.randn(2, 3), torch.randn(4, 3).bfloat16())
    with pytest.raises(ValueError, match=r"bias must have shape \[4\], got float32\[3\]"):
        run("linear", torch.randn(2, 3), torch.randn(4, 3), torch.randn(3))


def spread(scale, shape, block):
    return scale.double().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[..., : shape[-2], : shape[-1]]


def dequantize(codes, scale, block):
    return codes.double() * spread(scale, codes.shape, block)


@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (130, 128), (3, 2, 257), (0, 16), (3, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize(shape, dtype):
    x = (torch.randn(shape) * 10.0 ** torch.randint(-3, 4, (*shape[:-1], 1))).to(dtype)
    codes, scale = run("quantize", x)
    groups = -(-shape[-1] // 128)
    assert codes.dtype == E4M3
    assert codes.shape == x.shape
    assert scale.shape == (*shape[:-1], groups)
    for g in range(groups):
        part = x.float()[..., g * 128 : (g + 1) * 128]
        want = part.abs().amax(-1) / 448
        want = torch.where(want == 0, 1.0, want)
        assert torch.equal(scale[..., g], want)
        assert torch.equal(codes[..., g * 128 : (g + 1) * 128].float(), (part / want[..., None]).to(E4M3).float())


def test_quantize_edges():
    x = torch.randn(6, 300)
    x[0, :128] = 0
    x[1, 5] = float("nan")
    x[2, 130] = float("inf")
    x[3, :128] = 1e-45  # the scale underflows
    x[4] = 448 * torch.linspace(-1, 1, 300)
    codes, scale = run("quantize", x)
    assert scale[0, 0] == 1
    assert codes[0, :128].float().eq(0).all()
    assert scale[1, 0].isnan()
    assert codes[1, :128].float().isnan().all()
    assert not codes[1, 128:].float().isnan().any()
    assert scale[2, 1].isinf()
    assert codes[2, 130].float().isnan()
    assert codes[2, 131:256].float().eq(0).all()
    assert scale[3, 0] == 1
    assert codes[3, :128].float().eq(0).all()
    assert codes[4, 0].float() == -448
    assert codes[4, -1].float() == 448
    alone, _ = run("quantize", x[4])
    assert torch.equal(alone.view(torch.uint8), codes[4].view(torch.uint8))  # whatever the batch


def test_quantize_small_groups():
    x = torch.randn(9, 21)
    codes, scale = run("quantize", x, 4)
    assert scale.shape == (9, 6)
    assert (dequantize(codes, scale, (1, 4)) - x).abs().max() < x.abs().max() / 16
    with pytest.raises(ValueError, match="group must be a power of two up to 128, got 48"):
        run("quantize", x, 48)


def fp8_operands(m, n, k, block):
    x, xs = run("quantize", torch.randn(m, k), block[1])
    w = (torch.randn(n, k) * 100).to(E4M3)
    return x, xs, w, torch.rand(-(-n // block[0]), -(-k // block[1])) + 0.5


@pytest.mark.parametrize(
    ("m", "n", "k", "block"),
    [
        (1, 1, 1, (128, 128)),
        (5, 200, 300, (128, 128)),
        (40, 129, 128, (128, 128)),
        (0, 5, 7, (128, 128)),
        (17, 64, 0, (128, 128)),
        (9, 20, 21, (2, 4)),
        (9, 70, 50, (48, 32)),
    ],
)
def test_fp8_linear(close, m, n, k, block):
    x, xs, w, ws = fp8_operands(m, n, k, block)
    bias = torch.randn(n)
    want = dequantize(x, xs, (1, block[1])) @ dequantize(w, ws, block).T
    close(run("fp8_linear", x, xs, w, ws, block=block), want)
    close(run("fp8_linear", x, xs, w, ws, bias, block=block, out_dtype=torch.bfloat16), want + bias.double())


@pytest.mark.parametrize("tile", [Tile(16, 64, 128, swap=True), Tile(64, 64, 128), Tile(128, 128, 128)], ids=str)
def test_fp8_production_tiles(close, tile):
    m, n, k = tile.m + 3, 200, 300
    x, xs, w, ws = fp8_operands(m, n, k, (128, 128))
    want = dequantize(x, xs, (1, 128)) @ dequantize(w, ws, (128, 128)).T
    close(run("fp8_linear", x, xs, w, ws, tile=tile), want)


def test_fp8_refusals():
    x, xs, w, ws = fp8_operands(3, 200, 300, (128, 128))
    with pytest.raises(ValueError, match=r"the scales of weight must have shape \[2, 3\], got float32\[2, 2\]"):
        run("fp8_linear", x, xs, w, ws[:, :2].contiguous())
    with pytest.raises(ValueError, match="x must be float8_e4m3fn"):
        run("fp8_linear", x.float(), xs, w, ws)
