"""Grouped experts, full precision and FP8, against a loop over the experts in float64."""

import pytest
import torch
import torch.nn.functional as F

import moec
from moec.backends.triton import run
from moec.backends.triton.kernels.dispatch import sort_by_expert
from moec.backends.triton.kernels.tiles import Tile
from moec.fuzzing import check_backend

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
E4M3 = torch.float8_e4m3fn

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def expected(x, weights, experts, mlp, num_experts):
    out = torch.zeros(x.shape, dtype=torch.float64)
    for e in range(num_experts):
        token, slot = (experts == e).nonzero(as_tuple=True)
        out.index_add_(0, token, weights[token, slot, None].double() * mlp(e, x[token].double()))
    return out


def plain(gate_up, down, gate_up_bias=None, down_bias=None, activation="silu", interleaved=False, limit=None):
    def mlp(e, rows):
        h = rows @ gate_up[e].double().T + (0 if gate_up_bias is None else gate_up_bias[e].double())
        gate, up = (h[:, 0::2], h[:, 1::2]) if interleaved else h.chunk(2, -1)
        if limit is None:
            h = ACTIVATIONS[activation](gate) * up
        else:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            h = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        return h @ down[e].double().T + (0 if down_bias is None else down_bias[e].double())

    return mlp


def routing(kind, tokens, num_experts, k):
    if kind == "one expert":
        experts = torch.full((tokens, k), num_experts - 1)
    elif kind == "unused experts":
        experts = torch.randint(0, 2, (tokens, k)) * (num_experts - 1)
    else:
        experts = torch.randint(0, num_experts, (tokens, k))
    return torch.rand(tokens, k), experts


@pytest.mark.parametrize(
    ("tokens", "d", "f", "num_experts", "k", "kind"),
    [
        (1, 1, 1, 1, 1, "random"),
        (0, 8, 4, 3, 2, "random"),
        (9, 40, 24, 5, 2, "random"),
        (33, 70, 33, 4, 3, "one expert"),
        (21, 16, 130, 6, 2, "unused experts"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(close, tokens, d, f, num_experts, k, kind, dtype):
    x = torch.randn(tokens, d).to(dtype)
    gate_up = (torch.randn(num_experts, 2 * f, d) / d**0.5).to(dtype)
    down = (torch.randn(num_experts, d, f) / f**0.5).to(dtype)
    weights, chosen = routing(kind, tokens, num_experts, k)
    y = run("experts", x, weights, chosen, gate_up, down)
    assert y.dtype == dtype
    close(y, expected(x, weights, chosen, plain(gate_up, down), num_experts), roundings=2)


def small(dtype=torch.float32, tokens=20, d=24, f=20, num_experts=4, k=2):
    x = torch.randn(tokens, d).to(dtype)
    gate_up = (torch.randn(num_experts, 2 * f, d) / 4).to(dtype)
    down = (torch.randn(num_experts, d, f) / 4).to(dtype)
    return x, *routing("random", tokens, num_experts, k), gate_up, down


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(close, activation):
    x, weights, chosen, gate_up, down = small()
    y = run("experts", x, weights, chosen, gate_up, down, activation=activation)
    close(y, expected(x, weights, chosen, plain(gate_up, down, activation=activation), 4))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("limit", [None, 0.7])
def test_biases_interleaved_clamped(close, interleaved, limit):
    x, weights, chosen, gate_up, down = small()
    biases = torch.randn(4, 40), torch.randn(4, 24)
    y = run("experts", x, weights, chosen, gate_up, down, *biases, interleaved=interleaved, limit=limit)
    mlp = plain(gate_up, down, *biases, interleaved=interleaved, limit=limit)
    close(y, expected(x, weights, chosen, mlp, 4))


@pytest.mark.parametrize("swap", [False, True])
def test_several_tiles_of_an_expert(close, swap):
    x, weights, chosen, gate_up, down = small(torch.bfloat16, tokens=50)
    chosen[:40] = 2
    tiles = (Tile(16, 16, 16, swap=swap), Tile(16, 16, 16, swap=swap))
    y = run("experts", x, weights, chosen, gate_up, down, tiles=tiles)
    close(y, expected(x, weights, chosen, plain(gate_up, down), 4), roundings=2)


def test_numbers_without_an_expert_contribute_nothing(close):
    x, weights, chosen, gate_up, down = small()
    chosen[3] = -1
    chosen[4, 0] = 4
    y = run("experts", x, weights, chosen, gate_up, down)
    assert y[3].eq(0).all()
    close(y, expected(x, weights, chosen, plain(gate_up, down), 4))


def test_tile_map_covers_every_row_once():
    for tokens, k, num_experts, rows in ((1, 1, 1, 16), (50, 3, 7, 4), (40, 2, 64, 16), (33, 1, 2, 32)):
        chosen = torch.randint(0, num_experts, (tokens, k))
        plan = sort_by_expert(chosen, num_experts, rows)
        seen = []
        for expert, start in zip(plan.tile_expert.tolist(), plan.tile_start.tolist(), strict=True):
            if expert < num_experts:
                positions = range(start, min(start + rows, int(plan.bounds[expert + 1])))
                assert len(positions) > 0
                assert all(chosen.view(-1)[plan.order[p]] == expert for p in positions)
                seen += positions
        assert sorted(seen) == list(range(tokens * k))


def blocks(codes, scale, block):
    shape = codes.shape
    wide = scale.double().repeat_interleave(block[0], 1).repeat_interleave(block[1], 2)
    return codes.double() * wide[:, : shape[1], : shape[2]]


def fp8_weights(num_experts, rows, columns, block):
    codes = (torch.randn(num_experts, rows, columns) * 100).to(E4M3)
    scale = (torch.rand(num_experts, -(-rows // block[0]), -(-columns // block[1])) + 0.5) / 100 / columns**0.5
    return codes, scale


def rounded(rows, group):
    """Rows after quantisation in groups, in float32 steps as the kernel does them."""
    out = rows.float().clone()
    for start in range(0, out.shape[1], group):
        part = out[:, start : start + group]
        scale = part.abs().amax(1, keepdim=True) / 448
        scale = torch.where(scale == 0, 1.0, scale)
        out[:, start : start + group] = (part / scale).to(E4M3).float() * scale
    return out.double()


CASES = [
    (9, 300, 200, 3, 2, (128, 128), "random"),  # 2f = 400: the up rows straddle scale blocks
    (5, 128, 256, 3, 1, (128, 128), "unused experts"),
    (0, 128, 128, 2, 2, (128, 128), "random"),
    (1, 1, 1, 1, 1, (128, 128), "random"),
    (18, 22, 18, 4, 2, (2, 4), "one expert"),
]


@pytest.mark.parametrize(("tokens", "d", "f", "num_experts", "k", "block", "kind"), CASES)
def test_fp8_experts(close, tokens, d, f, num_experts, k, block, kind):
    x = torch.randn(tokens, d)
    gate_up, gate_up_scale = fp8_weights(num_experts, 2 * f, d, block)
    down, down_scale = fp8_weights(num_experts, d, f, block)
    weights, chosen = routing(kind, tokens, num_experts, k)
    wide = blocks(gate_up, gate_up_scale, block), blocks(down, down_scale, block)

    def mlp(e, rows):
        gate, up = (rounded(rows, block[1]) @ wide[0][e].T).chunk(2, -1)
        return rounded(F.silu(gate) * up, block[1]) @ wide[1][e].T

    arguments = (x, weights, chosen, gate_up, gate_up_scale, down, down_scale)
    got = run("fp8_experts", *arguments, block=block, group=block[1])
    want = expected(x, weights, chosen, mlp, num_experts)
    if tokens:  # a hidden value at a rounding midpoint may fall to the other code: one step, 1/16, of one product
        assert (got.double() - want).square().mean().sqrt() < 2e-3 * want.square().mean().sqrt()
    got = run("fp8_experts", *arguments, block=block, group=None)
    close(got, expected(x, weights, chosen, plain(*wide), num_experts))


@pytest.mark.parametrize(("limit", "first"), [(None, True), (0.8, True), (0.8, False)])
@pytest.mark.parametrize("tiles", [None, (Tile(16, 4, 4, swap=True), Tile(16, 4, 4, swap=True))])
def test_fp8_experts_with_biases_and_a_limit(close, limit, first, tiles):
    tokens, d, f, num_experts, block = 11, 22, 18, 4, (2, 4)
    x, (weights, chosen) = torch.randn(tokens, d), routing("random", tokens, num_experts, 2)
    gate_up, down = fp8_weights(num_experts, 2 * f, d, block), fp8_weights(num_experts, d, f, block)
    biases = torch.randn(num_experts, 2 * f) if first else None, torch.randn(num_experts, d)
    mlp = plain(blocks(*gate_up, block), blocks(*down, block), *biases, limit=limit)
    got = run("fp8_experts", x, weights, chosen, *gate_up, *down, *biases, block=block, group=None, limit=limit,
              tiles=tiles)  # fmt: skip
    close(got, expected(x, weights, chosen, mlp, num_experts))
    rows = run("fp8_experts", x, weights, chosen, *gate_up, *down, *biases, block=block, group=4, limit=limit,
               tiles=tiles)  # fmt: skip
    assert (rows - got).norm() < 0.1 * got.norm()
    with pytest.raises(ValueError, match=r"down_bias must be torch\.float32 as x is, got torch\.float64"):
        run("fp8_experts", x, weights, chosen, *gate_up, *down, None, biases[1].double(), block=block, group=None)


@pytest.mark.parametrize(
    "tiles",
    [(Tile(16, 128, 128, swap=True), Tile(16, 64, 128, swap=True)), (Tile(64, 128, 128), Tile(64, 128, 128))],
    ids=["decode", "prefill"],
)
@pytest.mark.parametrize("group", [128, None])
def test_fp8_production_tiles(close, tiles, group):
    d, f, num_experts = 256, 256, 2
    x = torch.randn(70, d).bfloat16()
    gate_up, gate_up_scale = fp8_weights(num_experts, 2 * f, d, (128, 128))
    down, down_scale = fp8_weights(num_experts, d, f, (128, 128))
    weights, chosen = routing("random", 70, num_experts, 1)
    got = run("fp8_experts", x, weights, chosen, gate_up, gate_up_scale, down, down_scale, group=group, tiles=tiles)
    wide = blocks(gate_up, gate_up_scale, (128, 128)), blocks(down, down_scale, (128, 128))
    want = expected(x, weights, chosen, plain(*wide), num_experts)
    if group is None:
        close(got, want, roundings=2)
    else:
        assert (got.double() - want).square().mean().sqrt() < 0.05 * want.square().mean().sqrt()


def test_refusals():
    x, weights, chosen, gate_up, down = small()
    with pytest.raises(ValueError, match=r"down must have shape \[4, 24, 20\], got float32\[4, 20, 24\]"):
        run("experts", x, weights, chosen, gate_up, down.transpose(1, 2).contiguous())
    with pytest.raises(ValueError, match=r"experts must be integers \[T=20, k\], got float32"):
        run("experts", x, weights, chosen.float(), gate_up, down)
    with pytest.raises(ValueError, match=r"weights must be floats \[20, 2\]"):
        run("experts", x, weights[:, :1].contiguous(), chosen, gate_up, down)
    codes = gate_up.to(E4M3), torch.ones(4, 1, 1), down.to(E4M3), torch.ones(4, 1, 2)
    with pytest.raises(ValueError, match=r"the scales of down must have shape \[4, 1, 1\]"):
        run("fp8_experts", x, weights, chosen, *codes)


def test_chosen_experts_may_be_a_weight():
    graph = moec.parse(
        "graph(%x: f32[2, 4], %w: f32[2, 1]) -> (%y: f32[2, 4]) {\n  weight @e: i64[2, 1]\n"
        "  weight @gu: f32[3, 6, 4]\n  weight @dn: f32[3, 4, 3]\n"
        "  %0: f32[2, 4] = moe.experts(%x, %w, @e, @gu, @dn, _, _)\n  return %0\n}"
    )
    r = torch.Generator().manual_seed(0)
    data = {"gu": torch.randn(3, 6, 4, generator=r), "dn": torch.randn(3, 4, 3, generator=r)}
    graph.bind_weights({"e": torch.tensor([[2], [0]]), **data})
    inputs = torch.randn(2, 4, generator=r), torch.rand(2, 1, generator=r)
    outcome = check_backend(graph, inputs, "triton")
    assert outcome.broken is None, outcome.broken
    assert outcome.skipped is None
