"""Causal masks, however they are written, become `causal`; what else a mask says stays, and look-alikes do too."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moec
from moec.ir import run
from moec.passes import default_pipeline
from moec.passes.clean.choices import Choice, choice_form, truth
from moec.passes.clean.index_forms import Affine, Holds
from moec.passes.fuse.fuse_attention import FuseAttention
from moec.testing import check_pass

INF = float("inf")


def upper(t, k=1):
    return torch.ones(t, t, dtype=torch.bool).triu(k)


def lower(t):
    return torch.ones(t, t).tril()


class Masked(nn.Module):
    """Attention of x to itself with the scores changed by `mask(scores, T, keep)`."""

    def __init__(self, mask, stored=None):
        super().__init__()
        self.mask = mask
        if stored is not None:
            self.register_buffer("stored", stored)

    def forward(self, x, keep):
        scores = x @ x.mT / math.sqrt(x.shape[-1])
        return F.softmax(self.mask(self, scores, x.shape[-2], keep[:, None, None, :]), -1) @ x


CAUSAL = {
    "triu of ones, filled": lambda m, s, t, keep: s.masked_fill(upper(t), -INF),
    "... with the lowest number": lambda m, s, t, keep: s.masked_fill(upper(t), torch.finfo(s.dtype).min),
    "where": lambda m, s, t, keep: torch.where(upper(t), -INF, s),
    "where not": lambda m, s, t, keep: torch.where(~upper(t), s, -INF),
    "tril of ones is 0": lambda m, s, t, keep: s.masked_fill(lower(t) == 0, -INF),
    "tril of ones is less than 1": lambda m, s, t, keep: s.masked_fill(lower(t) < 1, -INF),
    "tril of ones as bool": lambda m, s, t, keep: s.masked_fill(~lower(t).bool(), -INF),
    "1 - tril": lambda m, s, t, keep: s.masked_fill((1 - lower(t)).bool(), -INF),
    "full triu, added": lambda m, s, t, keep: s + torch.full((t, t), -INF).triu(1),
    "ones times -inf, added": lambda m, s, t, keep: s + torch.triu(torch.ones(t, t) * -INF, diagonal=1),
    "zeros filled, added": lambda m, s, t, keep: s + torch.zeros(t, t).masked_fill(upper(t), -INF),
    "the module's own": lambda m, s, t, keep: s + nn.Transformer.generate_square_subsequent_mask(t),
    "ranges": lambda m, s, t, keep: s.masked_fill(torch.arange(t)[None] > torch.arange(t)[:, None], -INF),
    "twice": lambda m, s, t, keep: s.masked_fill(upper(t), -INF).masked_fill(lower(t) == 0, -INF),
}
STORED = {
    "tril as bool": (lambda m, s, t, keep: s.masked_fill(~m.stored[:t, :t], -INF), lower(16).bool()),
    "tril in four axes": (
        lambda m, s, t, keep: s.masked_fill(m.stored[:, :, :t, :t] == 0, -INF),
        lower(16).view(1, 1, 16, 16),
    ),
    "-inf, added": (lambda m, s, t, keep: s + m.stored[:t, :t], torch.full((16, 16), -INF).triu(1)),
    "triu as bytes": (lambda m, s, t, keep: s.masked_fill(m.stored[:t, :t].bool(), -INF), upper(16).byte()),
}
PADDED = {
    "or": lambda m, s, t, keep: s.masked_fill(upper(t) | ~keep, -INF),
    "one after the other": lambda m, s, t, keep: s.masked_fill(upper(t), -INF).masked_fill(~keep, -INF),
    "the other first": lambda m, s, t, keep: s.masked_fill(~keep, -INF).masked_fill(upper(t), -INF),
    "and": lambda m, s, t, keep: torch.where(lower(t).bool() & keep, s, -INF),
    "added": lambda m, s, t, keep: s + torch.full((t, t), -INF).triu(1) + (1.0 - keep.float()) * -1e9,
    "added up": lambda m, s, t, keep: s + (torch.full((t, t), -INF).triu(1) + (1.0 - keep.float()) * -1e9),
    "filled and added": lambda m, s, t, keep: s.masked_fill(upper(t), -INF) + (1.0 - keep.float()) * -1e9,
}
NOT_CAUSAL = {
    "the diagonal too": (lambda m, s, t, keep: s.masked_fill(upper(t, 0), -INF), "j where i - j - 1 ≥ 0"),
    "one key further": (lambda m, s, t, keep: s.masked_fill(upper(t, 2), -INF), "j where i - j + 1 ≥ 0"),
    "earlier keys": (lambda m, s, t, keep: s.masked_fill(torch.ones(t, t).tril(-1) == 1, -INF), "j where -i + j ≥ 0"),
    "not that low": (lambda m, s, t, keep: s + (1 - lower(t)) * -10.0, "adds"),
    "padding": (lambda m, s, t, keep: s.masked_fill(~keep, -INF), "depends on input %keep"),
    # a padded query would see later keys with the one and none with the other
    "padding by the lowest number": (
        lambda m, s, t, keep: s.masked_fill(upper(t) | ~keep, torch.finfo(s.dtype).min),
        "depends on input %keep",
    ),
}


def raised(model, dynamic):
    """The graph after the default pipeline, compared with eager at the sizes that it takes."""
    x, keep = torch.randn(2, 3, 7, 4), torch.rand(2, 7) > 0.3
    keep[:, 0] = True
    shapes = {"x": {2: "T"}, "keep": {1: "T"}} if dynamic else None
    traced = moec.trace(model, (x, keep), dynamic_shapes=shapes)
    check_pass(FuseAttention(), traced)
    graph, records = default_pipeline().run(traced)
    for t in (1, 2, 5, 7, 16) if dynamic else (7,):
        x, keep = torch.randn(2, 3, t, 4), torch.rand(2, t) > 0.3
        keep[:, 0] = True
        torch.testing.assert_close(run(graph, [x, keep])[0], model(x, keep))
    (sdpa,) = graph.find("attention.sdpa")
    reasons = [r.reason for record in records for r in record.refused if r.rule == "causal_mask"]
    return sdpa, " | ".join(reasons).replace("−", "-")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_alone(name, dynamic):
    sdpa, _ = raised(Masked(CAUSAL[name]), dynamic)
    assert sdpa.attrs["causal"]
    assert sdpa.operand("mask") is None


@pytest.mark.parametrize("name", STORED)
def test_stored_masks(name):
    sdpa, _ = raised(Masked(*STORED[name]), dynamic=False)
    assert sdpa.attrs["causal"]
    assert sdpa.operand("mask") is None


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", PADDED)
def test_causal_beside_padding(name, dynamic):
    sdpa, _ = raised(Masked(PADDED[name]), dynamic)
    assert sdpa.attrs["causal"]
    assert sdpa.operand("mask").shape[-2] == 1


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_others_stay_and_say_why(name):
    mask, says = NOT_CAUSAL[name]
    traced = moec.trace(Masked(mask), (torch.randn(2, 3, 7, 4), torch.ones(2, 7, dtype=torch.bool)))
    graph, records = default_pipeline().run(traced)
    (sdpa,) = graph.find("attention.sdpa")
    assert not sdpa.attrs["causal"]
    assert sdpa.operand("mask") is not None
    reasons = " ".join(r.reason for record in records for r in record.refused if r.rule == "causal_mask")
    assert says in reasons.replace("−", "-")


@pytest.mark.parametrize("again", [False, True], ids=["two masks", "one mask twice"])
def test_finite_numbers_add_up_beside_causality(again):
    """A key that two masks forbid weighs less than one that a single mask does, where a row has no other keys."""

    class Attention(nn.Module):
        def forward(self, x, a, b):
            masks = [torch.zeros(2, 1, 6, 6).masked_fill(~keep, -3.0) for keep in (a, b)]
            mask = masks[0] + masks[0 if again else 1] + torch.full((6, 6), -INF).triu(1)
            return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    x, a, b = torch.randn(2, 2, 6, 4), torch.zeros(2, 1, 1, 6, dtype=torch.bool), torch.rand(2, 1, 1, 6) > 0.5
    a[0, ..., 2:4] = True
    graph, _ = default_pipeline().run(moec.trace(Attention(), (x, a, b)))
    assert graph.find("attention.sdpa")[0].attrs["causal"]
    torch.testing.assert_close(run(graph, [x, a, b])[0], Attention()(x, a, b))


@pytest.mark.parametrize("change", [(3, 2), (0, 5), (6, 0)], ids=str)
def test_a_stored_mask_with_one_other_element_is_not_causal(change):
    stored = lower(8)
    stored[change] = 1 - stored[change]
    model = Masked(lambda m, s, t, keep: s.masked_fill(m.stored[:t, :t] == 0, -INF), stored)
    sdpa, reasons = raised(model, dynamic=False)
    assert not sdpa.attrs["causal"]
    assert "depends on weight @stored" in reasons


@pytest.mark.parametrize("diagonal", [-9, -3, -1, 0, 1, 2, 9])
@pytest.mark.parametrize("shape", [(5, 5), (3, 6), (6, 3), (1, 1, 4, 4)], ids=str)
def test_stored_diagonals(diagonal, shape):
    """What `choice_form` reads is what is stored."""
    table = torch.where(torch.ones(shape).tril(diagonal).bool(), 2.0, -7.0)
    b = moec.ir.Builder(graph := moec.ir.Graph())
    form = choice_form(b.weight("table", table))
    assert isinstance(form, Choice)
    i, j = torch.arange(shape[-2])[:, None], torch.arange(shape[-1])[None]
    want = torch.ones(shape[-2:], dtype=torch.bool)
    for c in form.holds.conditions:
        want = want & (c.const + c.factors.get(-2, 0) * i + c.factors.get(-1, 0) * j >= 0)
    assert torch.equal(torch.where(want, form.yes, form.no).expand(shape), table)
    assert graph.weights


def test_choices_of_one_condition_are_evaluated_on_both_sides():
    graph = moec.parse("""
    graph(%x: f32[T]) -> (%y: bool[T]) {
      %0: i64[T] = tensor.arange() {end=T}
      %1: i64[] = tensor.constant() {value=[2], type=i64[]}
      %2: bool[T] = math.lt(%0, %1)
      %3: f32[T] = math.cast(%2) {dtype=f32}
      %4: f32[] = tensor.constant() {value=[1.0], type=f32[]}
      %5: f32[T] = math.sub(%4, %3)
      %6: bool[T] = math.eq(%5, %4)
      return %6
    }
    """)
    (y,) = graph.outputs
    # 0, 1 are less than 2; where that does not hold it is 1
    assert truth(y) == Holds(frozenset({Affine.of(-2, {-1: 1})}))
    (got,) = run(graph, [torch.zeros(4)])
    assert got.tolist() == [False, False, True, True]
