"""Routers and experts in the forms that people write become one `moe.route` and one `moe.experts` that mean the same;
what only looks like them does not, and the report says why."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import moec
from moec.ir import Graph, run
from moec.passes import Pass, RaiseMoE, RaiseUnrolledExperts, default_pipeline
from moec.testing import check_pass

from . import moe_forms as forms
from .moe_forms import D, E, K, Layer

DYNAMIC = ({0: "B", 1: "T"},)


@dataclass(frozen=True)
class Raise(Pass):
    """What leads to `moe.experts` in the default pipeline."""

    def run(self, graph: Graph) -> Graph:
        clean = default_pipeline().steps[0].passes
        for p in (*clean, RaiseMoE(), RaiseUnrolledExperts(), *clean):
            graph = p.run(graph)
        return graph


def raised(model, law=False):
    """The graph after the default pipeline, compared with eager at other sizes; with `law` also before and after in
    float64, with ties and with all tokens at one expert, as `check_pass` does. And what the rules refused."""
    traced = moec.trace(model.eval(), (torch.randn(2, 5, D),), dynamic_shapes=DYNAMIC)
    if law:
        check_pass(Raise(), traced)
    graph, records = default_pipeline().run(traced)
    for shape in ((1, 1, D), (3, 7, D), (0, 3, D), (1, 13, D)):
        x = torch.randn(shape)
        got, want = run(graph, [x]), model(x)
        torch.testing.assert_close(got[0], want[0] if isinstance(want, tuple) else want, rtol=1e-4, atol=1e-5)
    return graph, " | ".join(r.reason for record in records for r in record.refused)


def assert_raised(graph):
    assert len(graph.find("moe.experts")) == 1
    assert len(graph.find("moe.route")) == 1
    assert not graph.find("tensor.nonzero")
    assert not graph.find("linear.matmul")


def named(functions):
    return pytest.mark.parametrize("form", functions, ids=lambda f: f.__name__)


@named((*forms.MODULES, *forms.STACKED))
def test_every_form(form):
    graph, _ = raised(Layer(form, flat=form not in forms.UNFLATTENED), law=True)
    assert_raised(graph)


@named(forms.EITHER)
def test_tokens_with_two_axes(form):
    graph, _ = raised(Layer(form, flat=False))
    assert_raised(graph)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("module", [forms.Separate, forms.Merged])
@pytest.mark.parametrize("unit", forms.UNITS)
@named((forms.loop_index_add, forms.dense_equal))
def test_every_expert_module(form, unit, module, bias):
    graph, _ = raised(Layer(form, unit=unit, module=module, bias=bias))
    assert_raised(graph)


@pytest.mark.parametrize("unit", forms.UNITS)
@named((forms.einsum_experts_first, forms.einsum_merged, forms.gather_merged))
def test_every_unit_of_stacked_experts(form, unit):
    graph, _ = raised(Layer(form, unit=unit))
    assert_raised(graph)
    (experts,) = graph.find("moe.experts")
    want = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}[unit]
    assert experts.attrs["activation"] == want


@pytest.mark.parametrize("router", forms.ROUTERS)
@named((forms.loop_index_add, forms.dense_scattered, forms.gather_merged, forms.einsum_merged))
def test_every_router(form, router):
    k = 1 if router in forms.TOP1 else K
    graph, _ = raised(Layer(form, router=router, k=k), law=form is forms.loop_index_add)
    assert_raised(graph)


@pytest.mark.parametrize("k", [1, E])
@named((*forms.LOOPS[:3], forms.dense_equal, forms.stack_gather, forms.einsum_merged, forms.einsum_take))
def test_one_expert_and_all(form, k):
    graph, _ = raised(Layer(form, k=k), law=True)
    assert_raised(graph)


def test_one_choice_without_an_axis():
    graph, _ = raised(Layer(forms.loop_top1, router="max_of_scores", k=1), law=True)
    assert_raised(graph)


@named((forms.loop_index_add, forms.dense_equal, forms.stack_einsum, forms.einsum_merged, forms.gather_separate))
def test_a_shared_expert_stays_beside_them(form):
    graph, _ = raised(Layer(form, shared=True))
    assert_raised(graph)
    assert len(graph.find("math.swiglu")) == 1


@named((forms.loop_index_add, forms.dense_scattered, forms.einsum_merged))
def test_what_others_use_is_kept(form):
    """The routing is returned too."""
    model = Layer(form, extra=True)
    graph, _ = raised(model)
    assert_raised(graph)
    x = torch.randn(2, 3, D)
    for got, want in zip(run(graph, [x]), model(x), strict=True):
        torch.testing.assert_close(got, want)


@named((forms.loop_index_add, forms.einsum_merged))
def test_an_expert_that_nobody_chooses(form):
    model = Layer(form)
    with torch.no_grad():
        model.router_logits.weight[3] = 0
        model.router_logits.weight[:3] = model.router_logits.weight[:3].abs() + 1
        model.router_logits.weight[4] = 1
    graph, _ = raised(model)
    assert_raised(graph)
    x = torch.rand(2, 3, D)
    torch.testing.assert_close(run(graph, [x])[0], model(x))


@named((forms.loop_index_add, forms.stack_gather, forms.einsum_merged))
def test_compiled(form):
    model = Layer(form).eval()
    compiled = moec.compile(model, (torch.randn(2, 5, D),), backend="onnxruntime", dynamic_shapes=DYNAMIC)
    x = torch.randn(3, 4, D)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


# -- look-alikes -----------------------------------------------------------------------------------


def loop_over(choices):
    """A loop that takes `choices(e, expert, m, x, w, idx)` → tokens, what is added to them."""

    def combine(m, x, w, idx):
        out = torch.zeros_like(x)
        for e, expert in enumerate(m.experts):
            tok, part = choices(e, expert, m, x, w, idx)
            out = out.index_add(0, tok, part)
        return out

    return combine


def hits(idx, e):
    return torch.where(idx == e)


def one_twice(e, expert, m, x, w, idx):
    tok, slot = hits(idx, min(e, E - 2))
    return tok, expert(x[tok]) * w[tok, slot, None]


def other_weights(e, expert, m, x, w, idx):
    tok, slot = hits(idx, e)
    return tok, expert(x[tok]) * (w if e else w * w)[tok, slot, None]


def other_choice(e, expert, m, x, w, idx):
    tok, slot = hits(idx, e)
    return tok, expert(x[tok]) * w[tok, 0 * slot, None]


def scaled(e, expert, m, x, w, idx):
    tok, slot = hits(idx, e)
    y = expert(x[tok])
    return tok, (y * 2 if e == 1 else y) * w[tok, slot, None]


def other_rows(e, expert, m, x, w, idx):
    tok, slot = hits(idx, e)
    return tok, expert(x[tok] + 1) * w[tok, slot, None]


def put_elsewhere(e, expert, m, x, w, idx):
    tok, slot = hits(idx, e)
    return tok.flip(0), expert(x[tok]) * w[tok, slot, None]


def dense_missing(m, x, w, idx):
    return sum(((idx == e) * w).sum(-1, keepdim=True) * m.experts[e](x) for e in range(1, E))


def dense_twice(m, x, w, idx):
    factors = [((idx == e) * w).sum(-1, keepdim=True) for e in (0, 1, 2, 3, 3)]
    return sum(f * expert(x) for f, expert in zip(factors, m.experts, strict=True))


def dense_two_routings(m, x, w, idx):
    other, chosen = m.router_logits(x * 2).sigmoid().topk(K, -1)
    columns = [((idx == e) * w).sum(-1, keepdim=True) for e in range(E - 1)]
    columns.append(((chosen == E - 1) * other).sum(-1, keepdim=True))
    return sum(c * expert(x) for c, expert in zip(columns, m.experts, strict=True))


def soft_mixture(m, x, w, idx):
    scores = m.router_logits(x).softmax(-1)
    return sum(scores[..., e : e + 1] * expert(x) for e, expert in enumerate(m.experts))


def einsum_soft(m, x, w, idx):
    gate, up = torch.einsum("td,edh->teh", x, m.w13).chunk(2, -1)
    return torch.einsum("teh,ehd,te->td", m.unit(gate, up), m.w2, m.router_logits(x).softmax(-1))


def einsum_other_rows(m, x, w, idx):
    h = m.unit(torch.einsum("td,edh->teh", x, m.w1), torch.einsum("td,edh->teh", x * 2, m.w3))
    return torch.einsum("teh,ehd,te->td", h, m.w2, forms.scattered(x, w, idx))


def einsum_up_first(m, x, w, idx):
    up, gate = torch.einsum("td,edh->teh", x, m.w13).chunk(2, -1)
    return torch.einsum("teh,ehd,te->td", m.unit(gate, up), m.w2, forms.scattered(x, w, idx))


def gather_other_ids(m, x, w, idx):
    gate, up = torch.einsum("td,tkdh->tkh", x, m.w13[idx]).chunk(2, -1)
    y = torch.einsum("tkh,tkhd->tkd", m.unit(gate, up), m.w2[E - 1 - idx])
    return (y * w[..., None]).sum(1)


def gather_other_order(m, x, w, idx):
    gate, up = torch.einsum("td,tkdh->tkh", x, m.w13[idx]).chunk(2, -1)
    y = torch.einsum("tkh,tkhd->tkd", m.unit(gate, up), m.w2[idx])
    return (y.flip(1) * w[..., None]).sum(1)


def stack_out_of_order(m, x, w, idx):
    y = torch.stack([expert(x) for expert in m.experts], 1).flip(1)
    return torch.einsum("te,ted->td", forms.scattered(x, w, idx), y)


LOOKALIKES = {
    "one id twice": (loop_over(one_twice), "experts [4] are missing and experts [3] are there twice"),
    "other weights for one": (loop_over(other_weights), "weighted by two routings"),
    "the first choice's weight": (loop_over(other_choice), "is multiplied by"),
    "one expert scaled": (loop_over(scaled), ""),
    "other rows": (loop_over(other_rows), ""),
    "put elsewhere": (loop_over(put_elsewhere), ""),
    "dense, one missing": (dense_missing, "the router chooses among 5 experts, experts [0] are missing"),
    "dense, one twice": (dense_twice, "experts [4] are missing and experts [3] are there twice"),
    "dense, two routings": (dense_two_routings, "weighted by two routings"),
    "no choice": (soft_mixture, "expected its column of a routing"),
    "einsum without a choice": (einsum_soft, "expected a routing's weights"),
    "einsum of two inputs": (einsum_other_rows, "different rows"),
    "einsum, up before gate": (einsum_up_first, "not the halves"),
    "two expert ids": (gather_other_ids, "taken by different ids"),
    "choices exchanged": (gather_other_order, ""),
    "stack out of order": (stack_out_of_order, ""),
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes_stay_and_say_why(name):
    combine, says = LOOKALIKES[name]
    graph, reasons = raised(Layer(combine))
    assert not graph.find("moe.experts")
    assert says in reasons


def test_independent_choices_may_repeat_and_are_not_read_and_put():
    """Two argmaxes of one token may be one expert: adding up is right then, reading and putting back is not."""

    class Heads(Layer):
        def forward(self, x):
            logits = self.router_logits(x.reshape(-1, D))
            both = torch.stack([logits, logits * torch.arange(E)], 1).softmax(-1)
            return self.combine(self, x.reshape(-1, D), both.amax(-1), both.argmax(-1)).view(x.shape)

    graph, _ = raised(Heads(forms.dense_equal), law=True)
    assert len(graph.find("moe.experts")) == 1
    graph, reasons = raised(Heads(forms.loop_read_and_put))
    assert not graph.find("moe.experts")
    assert "one expert twice" in reasons


def test_factors_with_the_axes_exchanged():
    """As many tokens as experts, and the combine matrix the wrong way round."""

    def combine(m, x, w, idx):
        gate, up = torch.einsum("td,edh->teh", x, m.w13).chunk(2, -1)
        y = torch.einsum("teh,ehd->ted", m.unit(gate, up), m.w2)
        return (y * (F.one_hot(idx, E) * w[..., None]).sum(1).T[..., None]).sum(1)

    model = Layer(combine).eval()
    x = torch.randn(1, E, D)
    graph, _ = default_pipeline().run(moec.trace(model, (x,)))
    assert not graph.find("moe.experts")
    torch.testing.assert_close(run(graph, [x])[0], model(x))
