"""Loops over experts that test for whether a token came: traced past the test, and compared both ways."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moec.frontend import trace
from moec.ir import CompileError, run


class Loop(nn.Module):
    """top-k routing over a list of experts; subclasses say how an expert gets its tokens."""

    def __init__(self, experts: int = 4, k: int = 1):
        super().__init__()
        torch.manual_seed(0)
        self.k, self.gate = k, nn.Linear(8, experts, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.SiLU(), nn.Linear(6, 8)) for _ in range(experts))

    def forward(self, x):
        rows = x.reshape(-1, 8)
        w, idx = self.gate(rows).softmax(-1).topk(self.k, -1)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            out = self.add(out, rows, w, idx, e, expert)
        return out.view(x.shape)


class Counted(Loop):
    def add(self, out, rows, w, idx, e, expert):
        token, slot = torch.where(idx == e)
        if token.numel() == 0:
            return out
        return out.index_add(0, token, expert(rows[token]) * w[token, slot, None])


class Positive(Loop):
    def add(self, out, rows, w, idx, e, expert):
        token, slot = torch.where(idx == e)
        if token.shape[0] > 0:
            out = out.index_add(0, token, expert(rows[token]) * w[token, slot, None])
        return out


class AnyOf(Loop):
    """A mask, whether it holds anywhere, and a write to where it holds."""

    def add(self, out, rows, w, idx, e, expert):
        mask = (idx == e).any(-1)
        if mask.any():
            out[mask] += (w * (idx == e)).sum(-1)[mask].unsqueeze(-1) * expert(rows[mask])
        return out


class Nothing(Loop):
    """What happens without a token is not nothing."""

    def add(self, out, rows, w, idx, e, expert):
        token, slot = torch.where(idx == e)
        if token.numel() == 0:
            return out + 1
        return out.index_add(0, token, expert(rows[token]) * w[token, slot, None])


class Several(Loop):
    """A test for more than whether there is one."""

    def add(self, out, rows, w, idx, e, expert):
        token, slot = torch.where(idx == e)
        if token.numel() < 2:
            return out
        return out.index_add(0, token, expert(rows[token]) * w[token, slot, None])


class OrLast(Loop):
    """Another reason for the same way, on the same line."""

    def add(self, out, rows, w, idx, e, expert):
        token, slot = torch.where(idx == e)
        if e == 3 or token.numel() == 0:
            return out + (e != 3) * 100.0
        return out.index_add(0, token, expert(rows[token]) * w[token, slot, None])


class Folded(Loop):
    """Both ways on one line."""

    def add(self, out, rows, w, idx, e, expert):
        token, slot = torch.where(idx == e)
        return out if token.numel() == 0 else out.index_add(0, token, expert(rows[token]) * w[token, slot, None])


def agree(model, traced, *shapes):
    for shape in shapes:
        x = torch.randn(*shape, 8)
        torch.testing.assert_close(run(traced.graph, [x])[0], model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("form", [Counted, Positive, AnyOf, Folded])
def test_the_test_is_passed_by(form, k):
    model = form(k=k)
    traced = trace(model, (torch.randn(2, 5, 8),), dynamic_shapes={"x": {0: "B", 1: "T"}})
    assert not any("n" in b for b in traced.signature.bounds)
    with torch.no_grad():
        agree(model, traced, (1, 1), (2, 5), (3, 17), (1, 40))


@pytest.mark.parametrize("form", [Counted, AnyOf])
def test_static_shapes(form):
    """There the example alone does not show both ways; rows that are all alike do."""
    model = form()
    x = torch.randn(1, 64, 8)
    assert len(model.gate(x).argmax(-1).unique()) == 4
    with torch.no_grad():
        agree(model, trace(model, (x,)), (1, 64))


def test_what_happens_without_is_compared():
    with pytest.raises(
        CompileError, match=r"differs.*at .*branches.py:\d+ the model branches on values, and what they find was taken"
    ):
        trace(Nothing(), (torch.randn(2, 5, 8),), dynamic_shapes={"x": {0: "B", 1: "T"}})
    with pytest.raises(CompileError, match="does not hold for other values"):
        trace(Nothing(), (torch.randn(1, 64, 8),))


def test_another_reason_on_the_line_is_no_evidence():
    """With 200 tokens no expert is empty, and `e == 3` goes both ways anyway."""
    x = torch.randn(1, 200, 8)
    assert len(OrLast().gate(x).argmax(-1).unique()) == 4
    with pytest.raises(CompileError, match=r"does not hold for other values: output.*by up to [12]00") as caught:
        trace(OrLast(), (x,))
    assert "nothing is found" in caught.value.hint


def test_the_message_of_a_static_trace_says_what_to_do():
    class Found(nn.Module):
        def forward(self, x):
            return x + 1 if (x > 9).any() else x

    with pytest.raises(CompileError, match=r"does not hold for its example: output 'output' differs") as caught:
        trace(Found(), (torch.randn(3, 4),))
    assert "static shapes" not in caught.value.hint
    assert "nothing is found" in caught.value.hint


def test_a_jump_behind_an_extended_argument(tmp_path):
    """A far target, which one byte does not hold."""
    body = "\n".join(f"            out = out + {i}.0 * 0" for i in range(300))
    source = f"""class Far(Loop):
    def add(self, out, rows, w, idx, e, expert):
        token, slot = torch.where(idx == e)
        if token.numel() > 0:
{body}
            out = out.index_add(0, token, expert(rows[token]) * w[token, slot, None])
        return out
"""
    file = tmp_path / "far.py"
    file.write_text(source)
    names = dict(globals())
    exec(compile(source, str(file), "exec"), names)
    with torch.no_grad():
        agree(names["Far"](), trace(names["Far"](), (torch.randn(1, 64, 8),)), (1, 64))


def test_a_way_that_was_never_seen_is_refused():
    """Every expert gets every token, so nobody knows what would happen without."""
    with pytest.raises(CompileError, match=r"always went the same way at .*branches.py:\d+") as caught:
        trace(Counted(k=4), (torch.randn(2, 5, 8),), dynamic_shapes={"x": {0: "B", 1: "T"}})
    assert caught.value.code == "data-dependent"


def test_other_tests_of_values_are_refused(capfd):
    with pytest.raises(CompileError, match=r"control flow depends on the values.*u0 < 2"):
        trace(Several(), (torch.randn(2, 5, 8),))
    assert capfd.readouterr().err == ""  # torch prints the whole graph


def test_a_debugger_stays():
    seen = []

    def tracer(frame, event, argument):
        seen.append(event)

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        trace(Counted(), (torch.randn(1, 6, 8),))
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_writes_where_a_mask_holds(rank):
    """Rows, single elements, and leading axes; values as many as there are, one row for all, added or put."""

    class Write(nn.Module):
        def forward(self, x, mask):
            a, b, c = x.clone(), x.clone(), x.clone()
            a[mask] = F.relu(x[mask]) - 1
            b[mask] += 2 * x[mask]
            if rank < 3:
                c[mask] = x.new_ones(x.shape[rank:])
            return a, b, c

    model, x = Write(), torch.randn(3, 4, 5)
    traced = trace(model, (x, torch.rand(x.shape[:rank]) < 0.5))
    for mask in (torch.rand(x.shape[:rank]) < 0.5, torch.ones(x.shape[:rank]) == 0, torch.ones(x.shape[:rank]) == 1):
        for got, want in zip(run(traced.graph, [x, mask]), model(x, mask), strict=True):
            assert torch.equal(got, want)
