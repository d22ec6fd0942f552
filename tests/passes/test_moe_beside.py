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


def test_a_bias_of_the_gate_alone():
    for combine in (dense, loop):
        graph, reasons = raised(Routed(combine, lambda: MLP(biases=(True, False))), torch.randn(T, D))
        assert not graph.find("moe.experts")
        assert "of gate and up one has a bias" in reasons


# -- expert ids of other kinds ---------------------------------------------------------------------


@pytest.mark.parametrize("combine", [dense, loop, gathered], ids=lambda f: f.__name__)
def test_ids_of_32_bits(combine):
    graph, _ = raised(Routed(lambda m, x, w, i: combine(m, x, w, i.int())), torch.randn(T, D))
    (experts,) = graph.find("moe.experts")
    assert experts.operands[2].dtype == "i64"


@pytest.mark.parametrize("logits", [E, 2 * E])
@pytest.mark.parametrize("stacked", [False, True], ids=["modules", "stacked"])
def test_ids_modulo_the_number_of_experts(stacked, logits):
    """The remainder is no other id only where the router chooses among as many experts."""

    def combine(m, x, w, i):
        y = m.all_experts(x) if stacked else torch.stack([e(x) for e in m.experts], 1)
        return (y.gather(1, (i % E)[..., None].expand(-1, -1, D)) * w[..., None]).sum(1)

    graph, _ = raised(Routed(combine, logits=logits), torch.randn(T, D))
    if logits == E or stacked:
        assert len(graph.find("moe.experts")) == 1
    assert bool(graph.find("math.mod")) == (logits != E)


# -- weights that are not a routing's alone --------------------------------------------------------


class Given(Routed):
    """Expert ids, which may be the same twice for a token, and scores come from outside."""

    def forward(self, x, ids, scores):
        return self.combine(self, x, ids, scores)


def spread(x, ids, scores):
    return torch.zeros(len(x), E).scatter(1, ids, scores.gather(1, ids))


def einsum_spread(m, x, ids, scores):
    return torch.einsum("ted,te->td", m.all_experts(x), spread(x, ids, scores))


def stack_spread(m, x, ids, scores):
    return (torch.stack([e(x) for e in m.experts], 1) * spread(x, ids, scores)[..., None]).sum(1)


def columns_spread(m, x, ids, scores):
    return sum(e(x) * spread(x, ids, scores)[:, n : n + 1] for n, e in enumerate(m.experts))


def batched_spread(m, x, ids, scores):
    gate, up = (x[None] @ m.gate_up).chunk(2, -1)
    return ((F.silu(gate) * up) @ m.w2 * spread(x, ids, scores).T[..., None]).sum(0)


def scaled_input(m, x, ids, scores):
    factors = torch.zeros(len(x), E).scatter_add(1, ids, scores.gather(1, ids)).T[..., None]
    gate, up = (x.repeat(E, 1).view(E, len(x), D) * factors @ m.gate_up).chunk(2, -1)
    return (F.silu(gate) * up @ m.w2).sum(0)


GIVEN = (einsum_spread, stack_spread, columns_spread, batched_spread, scaled_input)


@pytest.mark.parametrize("combine", GIVEN, ids=lambda f: f.__name__)
def test_ids_that_may_repeat(combine):
    ids = torch.randint(0, E, (T, K))
    ids[0] = 1
    graph, _ = raised(Given(combine), torch.randn(T, D), ids, torch.rand(T, E))
    assert not graph.find("moe.experts")


class Spread(nn.Module):
    """Something of scores spread over zeros"""

    def __init__(self, what):
        super().__init__()
        torch.manual_seed(0)
        self.what, self.router = what, nn.Linear(D, 6)

    def forward(self, x):
        return self.what(self.router(x))


def chosen_by_anyone(logits):
    return torch.zeros(6).scatter(0, logits.topk(2, -1).indices.flatten(), 1.0)


def quotient(spread_of):
    def what(logits):
        d = spread_of(logits)
        return d / d.sum(-1, keepdim=True)

    return what


@pytest.mark.parametrize("what", [lambda x: chosen_by_anyone(x).sum(), quotient(chosen_by_anyone)])
def test_experts_that_any_token_chose(what):
    raised(Spread(what), torch.randn(T, D))


def scattered(x):
    w, i = x.topk(2, -1)
    return torch.zeros_like(x).scatter(-1, i, w)


@pytest.mark.parametrize("what", [quotient(scattered), lambda x: scattered(x) * x.amax(-1, keepdim=True)])
def test_a_total_that_may_be_0_or_infinite(what):
    class OfInput(nn.Module):
        def forward(self, x):
            return what(x)

    x = torch.zeros(2, 6)
    x[1, 0] = torch.inf
    raised(OfInput(), x)


def test_the_total_of_the_best_of_a_softmax():
    graph, _ = raised(Spread(quotient(lambda x: scattered(x.softmax(-1)))), torch.randn(T, D))
    assert all(n.results[0].shape[-1] == 2 for n in graph.find("math.div"))
