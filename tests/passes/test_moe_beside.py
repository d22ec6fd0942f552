"""Experts beside what only resembles them, expert ids of other kinds, and weights that are not a routing's alone: what
is raised means the same, whatever stands beside it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moec
from moec.ir import run
from moec.passes import default_pipeline

D, H, E, K, T = 8, 6, 4, 2, 10
UNITS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def raised(model, *args, **options):
    """(graph after the default pipeline, why rules refused), where it computes what the model does."""
    model = model.eval()
    graph, records = default_pipeline().run(moec.trace(model, args, **options))
    with torch.no_grad():
        want = model(*args)
    torch.testing.assert_close(run(graph, list(args))[0], want, rtol=1e-4, atol=1e-5, equal_nan=True)
    return graph, " | ".join(r.reason for record in records for r in record.refused)


class MLP(nn.Module):
    """gate and up in layers of their own, or in one (`merged`), half by half or in turns"""

    def __init__(self, unit="silu", merged=False, in_turns=False, biases=(False, False)):
        super().__init__()
        self.unit, self.in_turns = UNITS[unit], in_turns
        self.both = nn.Linear(D, 2 * H, bias=False) if merged else None
        self.gate, self.up = (nn.Linear(D, H, bias=bias) for bias in biases)
        self.down = nn.Linear(H, D, bias=False)

    def forward(self, x):
        if self.both is None:
            return self.down(self.unit(self.gate(x)) * self.up(x))
        h = self.both(x)
        gate, up = (h[..., 0::2], h[..., 1::2]) if self.in_turns else h.chunk(2, -1)
        return self.down(self.unit(gate) * up)


class Routed(nn.Module):
    """Σ over experts that are modules; `combine(layer, x, weights, ids)` of those of a softmax router"""

    def __init__(self, combine, expert=MLP, experts=E, logits=E, **more):
        super().__init__()
        torch.manual_seed(0)
        self.combine, self.router = combine, nn.Linear(D, logits, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(experts))
        self.more = nn.ModuleDict(more)
        self.gate_up = nn.Parameter(torch.randn(E, D, 2 * H) * 0.3)
        self.w2 = nn.Parameter(torch.randn(E, H, D) * 0.3)

    def forward(self, x):
        return self.combine(self, x, *self.router(x).softmax(-1).topk(K, -1))

    def all_experts(self, x):
        """Every stacked expert on every token, [T, E, D]."""
        gate, up = torch.einsum("td,edf->tef", x, self.gate_up).chunk(2, -1)
        return torch.einsum("tef,efd->ted", F.silu(gate) * up, self.w2)


def dense(m, x, w, i):
    return sum(e(x) * ((i == n) * w).sum(-1, keepdim=True) for n, e in enumerate(m.experts))


def loop(m, x, w, i):
    y = torch.zeros_like(x)
    for n, e in enumerate(m.experts):
        tok, slot = torch.where(i == n)
        y = y.index_add(0, tok, e(x[tok]) * w[tok, slot, None])
    return y


def gathered(m, x, w, i):
    gate, up = torch.einsum("td,tkdf->tkf", x, m.gate_up[i]).chunk(2, -1)
    return (torch.einsum("tkf,tkfd->tkd", F.silu(gate) * up, m.w2[i]) * w[..., None]).sum(1)


# -- what stands beside them -----------------------------------------------------------------------


@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("merged", [False, True], ids=["separate", "merged"])
@pytest.mark.parametrize(("routed", "shared"), [("silu", "gelu"), ("silu", "relu"), ("relu", "silu"), ("gelu", "relu")])
def test_a_shared_expert_of_another_activation(routed, shared, merged, first):
    def combine(m, x, w, i):
        terms = [m.more["shared"](x) * torch.sigmoid(m.more["gate"](x)), dense(m, x, w, i)]
        return terms[0] + terms[1] if first else terms[1] + terms[0]

    model = Routed(combine, lambda: MLP(routed, merged), shared=MLP(shared, merged), gate=nn.Linear(D, 1))
    graph, _ = raised(model, torch.randn(T, D))
    (experts,) = graph.find("moe.experts")
    assert experts.attrs["activation"] == routed


@pytest.mark.parametrize("routed", [False, True], ids=["halves", "in turns"])
def test_a_shared_expert_of_another_layout(routed):
    def combine(m, x, w, i):
        return dense(m, x, w, i) + m.more["shared"](x) * torch.sigmoid(m.more["gate"](x))

    shared = MLP(merged=True, in_turns=not routed)
    model = Routed(combine, lambda: MLP(merged=True, in_turns=routed), shared=shared, gate=nn.Linear(D, 1))
    graph, _ = raised(model, torch.randn(T, D))
    (experts,) = graph.find("moe.experts")
    assert experts.attrs["interleaved"] is routed
