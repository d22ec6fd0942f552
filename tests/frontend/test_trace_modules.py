"""Plain torch modules and experts as users write them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moec.frontend import trace


class Mlp(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Dropout(0.3), nn.Linear(16, 4))


class Tied(nn.Module):
    """One tensor as embedding and head, and a view of it besides."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.rand(100, 8)[:7].sum(0), persistent=False)

    def forward(self, ids):
        return self.head(self.embed(ids) * self.scale)


class DenseMoE(nn.Module):
    """Every expert on every token, weighted by a one-hot sum."""

    def __init__(self, experts: int = 4):
        super().__init__()
        self.gate = nn.Linear(8, experts)
        self.up = nn.Parameter(torch.randn(experts, 8, 16))
        self.down = nn.Parameter(torch.randn(experts, 16, 8))

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        mix = (F.one_hot(chosen, self.gate.out_features) * weights[..., None]).sum(-2)
        hidden = F.silu(torch.einsum("bsd,edf->bsef", x, self.up))
        return torch.einsum("bsef,efd,bse->bsd", hidden, self.down, mix)


class LoopMoE(nn.Module):
    """A Python loop over modules, each masked to its tokens."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList([Mlp() for _ in range(3)])

    def forward(self, x):
        scores = self.gate(x).softmax(-1)
        best = scores.argmax(-1, keepdim=True)
        out = x.new_zeros(*x.shape[:-1], 4)
        for e, expert in enumerate(self.experts):
            out += expert(x) * (best == e) * scores[..., e : e + 1]
        return out


class Tables(nn.Module):
    """Constants of every kind: a list, a scalar, a large table, a mask."""

    def __init__(self):
        super().__init__()
        self.big = torch.arange(200.0).reshape(100, 2)
        self.register_buffer("mask", torch.ones(5, 5, dtype=torch.bool).tril())

    def forward(self, x):
        small = torch.tensor([1.5, -2.5])
        y = x @ self.big[:2] * small + torch.tensor(3)
        return torch.where(self.mask[: y.shape[-1], : y.shape[-1]], y, float("-inf"))


@pytest.mark.parametrize(
    ("model", "shape", "other"),
    [
        (Mlp, (2, 3, 8), (5, 1, 8)),
        (DenseMoE, (2, 3, 8), (1, 7, 8)),
        (LoopMoE, (2, 3, 8), (1, 4, 8)),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8), (3, 9, 8)),
        (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (2, 5, 8), (1, 3, 8)),
    ],
)
def test_module(model, shape, other, same, well_formed):
    torch.manual_seed(1)
    net = model().eval()
    count = 3 if isinstance(net, nn.MultiheadAttention) else 1
    spec = {0: "B", 1: "S"}
    traced = trace(net, (torch.randn(shape),) * count, dynamic_shapes=(spec,) * count)
    well_formed(traced)
    x = torch.randn(shape)
    same(traced, net, (x,) * count)
    same(traced, net, (torch.randn(other),) * count)
    strided = torch.randn(*other[:-1], 2 * other[-1])[..., ::2]
    same(traced, net, (strided,) * count)


def test_tied_weights_stay_one(same):
    net = Tied()
    traced = trace(net, (torch.tensor([[1, 2]]),), dynamic_shapes="auto")
    assert sorted(traced.graph.weights) == ["embed.weight", "scale"]
    same(traced, net, (torch.tensor([[3, 4, 10]]),))


def test_constants(same):
    net = Tables()
    traced = trace(net, (torch.randn(2, 2),))
    same(traced, net, (torch.randn(2, 2),))
    assert "mask" in traced.graph.weights
    assert any(v.shape == (100, 2) for v in traced.graph.weights.values())
    assert not any(v.type.numel <= 2 for v in traced.graph.weights.values())


def test_every_expert_of_a_loop_keeps_its_module_path():
    graph = trace(LoopMoE(), (torch.randn(2, 8),)).graph
    assert {n.location.module for n in graph.find("math.gelu")} == {f"experts.{i}.1" for i in range(3)}


def test_values_know_their_traced_origin():
    graph = trace(Mlp(), (torch.randn(2, 8),)).graph
    assert [sorted(v.origins) for v in graph.outputs] == [["linear_1"]]
    assert graph.inputs[0].origins == frozenset(["input"])


def test_unused_weights_and_arguments():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x, extra):
            return self.used(x)

    graph = trace(Half(), (torch.ones(1, 2), torch.ones(3))).graph
    assert sorted(graph.weights) == ["used.bias", "used.weight"]
    assert [v.name for v in graph.inputs] == ["x", "extra"]


def test_outputs_that_are_inputs_weights_or_the_same_value():
    class Echo(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x):
            y = x + 1
            return x, self.w, y, y

    traced = trace(Echo(), (torch.ones(2),))
    from moec.ir import run

    got = traced.unflatten(run(traced.graph, traced.flatten((torch.zeros(2),))))
    assert [g.tolist() for g in got] == [[0, 0], [1, 1], [1, 1], [1, 1]]


def test_comparison_helper_sees_one_percent(same):
    net = Mlp().eval()
    traced = trace(net, (torch.randn(2, 8),))
    x = torch.randn(2, 8)
    same(traced, net, (x,))
    other = Mlp().eval()
    other.load_state_dict({k: v * 1.01 for k, v in net.state_dict().items()})
    with pytest.raises(AssertionError):
        same(traced, other, (x,))
