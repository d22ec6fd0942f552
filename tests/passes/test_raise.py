"""Experts and routers, however they are written, become one `moe.route` and one `moe.experts`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moec.frontend import trace
from moec.ir import run
from moec.passes import FuseMLP, default_pipeline, explain
from moec.passes.moe.raise_grouped import GroupedExperts

E, K, D, H = 6, 2, 8, 16
DYNAMIC = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)


def raised(model, dtype=torch.float32, tolerance=1e-5):
    """Trace, run the default pipeline, compare with eager at other sizes; the graph."""
    model = model.eval().to(dtype)
    traced = trace(model, (torch.randn(2, 5, D).to(dtype),), dynamic_shapes=DYNAMIC).graph
    graph, _ = default_pipeline().run(traced)
    for shape in ((1, 1, D), (3, 7, D)):
        x = torch.randn(shape).to(dtype)
        torch.testing.assert_close(run(graph, [x])[0], model(x).detach(), rtol=tolerance, atol=tolerance)
    return graph


class Routed(nn.Module):
    """Softmax top-k over a bias-free gate."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(D, E, bias=False)

    def route(self, flat):
        weights, experts = torch.topk(F.softmax(self.gate(flat), -1), K)
        return weights / weights.sum(-1, keepdim=True), experts


class Stacked(Routed):
    """Every expert on every token in one batched product."""

    def __init__(self, combine):
        super().__init__()
        self.combine = combine
        self.gate_up = nn.Parameter(torch.randn(E, 2 * H, D) * 0.3)
        self.down = nn.Parameter(torch.randn(E, D, H) * 0.3)

    def forward(self, x):
        flat = x.reshape(-1, D)
        weights, experts = self.route(flat)
        if self.combine == "scatter":
            combine = torch.zeros(flat.shape[0], E).scatter(1, experts, weights)
        else:
            combine = (F.one_hot(experts, E) * weights.unsqueeze(-1)).sum(1)
        gate, up = torch.matmul(flat, self.gate_up.transpose(1, 2)).chunk(2, -1)
        y = torch.matmul(F.silu(gate) * up, self.down.transpose(1, 2))
        return (y * combine.t().unsqueeze(-1)).sum(0).view_as(x)


class MLP(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.activation = activation
        self.g, self.u, self.d = nn.Linear(D, H, bias=False), nn.Linear(D, H, bias=False), nn.Linear(H, D, bias=False)

    def forward(self, x):
        return self.d(self.activation(self.g(x)) * self.u(x))


class Loop(Routed):
    """One module per expert, masked by its column of the routing."""

    def __init__(self, column, activation=F.silu, skip=None):
        super().__init__()
        self.column, self.skip = column, skip
        self.experts = nn.ModuleList(MLP(activation) for _ in range(E))

    def forward(self, x):
        flat = x.reshape(-1, D)
        weights, experts = self.route(flat)
        combine = (F.one_hot(experts, E) * weights.unsqueeze(-1)).sum(1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            if e == self.skip:
                continue
            if self.column == "equal":
                factor = ((experts == e) * weights).sum(-1, keepdim=True)
            else:
                factor = combine[:, e : e + 1]
            out = out + factor * expert(flat)
        return out.view_as(x)


class Grouped(Stacked):
    """Sorted tokens and grouped products, as transformers' grouped_mm and our own module."""

    def __init__(self, inverse="argsort"):
        super().__init__("scatter")
        self.inverse = inverse

    def forward(self, x):
        flat = x.reshape(-1, D)
        weights, experts = self.route(flat)
        ids = experts.reshape(-1)
        order = torch.argsort(ids, stable=True)
        counts = torch.histc(ids.float(), bins=E, min=0, max=E - 1)
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        from moec.models.grouped import grouped_mm

        gate, up = grouped_mm(flat[order // K], self.gate_up.transpose(1, 2), ends).chunk(2, -1)
        y = grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), ends)
        y = y * weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.argsort(order) if self.inverse == "argsort" else order
        return y[back].view(-1, K, D).sum(1).view_as(x)


@pytest.mark.parametrize(
    "model",
    [
        Stacked("scatter"),
        Stacked("one_hot"),
        Loop("equal"),
        Loop("slice", F.gelu),
        Grouped(),
    ],
    ids=["stacked-scatter", "stacked-one-hot", "loop-equal", "loop-slice-gelu", "grouped"],
)
def test_every_form_becomes_one_experts_node(model):
    graph = raised(model)
    (experts,) = graph.find("moe.experts")
    (route,) = graph.find("moe.route")
    assert route.attrs["k"] == K
    assert route.attrs["normalize"]
    assert graph.count_ops().keys() == {"tensor.reshape", "linear.linear", "moe.route", "moe.experts"}
    assert experts.operand("gate_up").shape == (E, 2 * H, D)
    assert len(graph.weights) == 3


def test_a_missing_expert_is_not_raised():
    graph = raised(Loop("slice", skip=3))
    assert graph.find("moe.experts") == []


def test_rows_that_are_not_put_back_are_not_raised():
    model = Grouped(inverse="wrong")
    graph = raised(model)
    assert graph.find("moe.experts") == []
    assert "the rows are not put back in their order" in explain(GroupedExperts(), FuseMLP().run(trace_only(model)))


def trace_only(model):
    """The graph just before experts are raised."""
    traced = trace(model, (torch.randn(2, 5, D),), dynamic_shapes=DYNAMIC).graph
    pipeline = default_pipeline()
    return type(pipeline)(pipeline.passes[: pipeline.names.index("raise_moe")]).run(traced)[0]


class Router(nn.Module):
    """Each routing variant written out; returns weights and experts scattered, so that order is no matter."""

    def __init__(self, variant):
        super().__init__()
        torch.manual_seed(0)
        self.variant = variant
        self.gate = nn.Linear(D, 8, bias=False)
        self.register_buffer("bias", torch.randn(8))

    def forward(self, x):
        logits = self.gate(x.reshape(-1, D))
        match self.variant:
            case "softmax":
                weights, experts = torch.topk(logits.softmax(-1), 3)
            case "softmax-scaled":
                weights, experts = torch.topk(logits.softmax(-1), 3)
                weights = weights * 16.0
            case "over-top-k":
                values, experts = torch.topk(logits, 3)
                weights = values.softmax(-1)
            case "sigmoid-bias":
                scores = logits.sigmoid()
                experts = torch.topk(scores + self.bias, 3).indices
                weights = scores.gather(1, experts)
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5
            case "groups-max":
                scores = logits.softmax(-1)
                best = scores.view(-1, 4, 2).amax(-1).topk(2).indices
                keep = torch.zeros(scores.shape[0], 4).scatter(1, best, 1.0)
                keep = keep.unsqueeze(-1).expand(-1, 4, 2).reshape(-1, 8)
                experts = scores.masked_fill(~keep.bool(), 0.0).topk(3).indices
                weights = scores.gather(1, experts)
        return torch.zeros(logits.shape).scatter(1, experts, weights).view(*x.shape[:2], 8)


@pytest.mark.parametrize(
    ("variant", "attrs"),
    [
        ("softmax", {"scoring": "softmax", "normalize": False}),
        ("softmax-scaled", {"scoring": "softmax", "normalize": False, "scale": 16.0}),
        ("over-top-k", {"scoring": "topk_softmax"}),
        ("sigmoid-bias", {"scoring": "sigmoid", "normalize": True, "scale": 2.5, "normalize_eps": 1e-20}),
        ("groups-max", {"n_group": 4, "topk_group": 2, "group_score": "max", "masked_score": 0.0}),
    ],
)
def test_router_variants(variant, attrs):
    graph = raised(Router(variant))
    (route,) = graph.find("moe.route")
    assert {k: route.attrs[k] for k in attrs} == attrs
    assert (route.operand("bias") is not None) == (variant == "sigmoid-bias")
    assert not graph.find("topk")


def test_bf16_experts_with_a_wide_sum():
    class Wide(Grouped):
        def forward(self, x):
            return super().forward(x).to(x.dtype)

        def route(self, flat):
            weights, experts = torch.topk(F.softmax(self.gate(flat).float(), -1), K)
            return weights / weights.sum(-1, keepdim=True), experts

    graph = raised(Wide(), torch.bfloat16, tolerance=3e-2)
    assert len(graph.find("moe.experts")) == 1
