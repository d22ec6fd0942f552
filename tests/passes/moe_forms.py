"""Small MoE layers as people write them: routers, expert MLPs, and ways of putting both together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

D, H, E, K = 8, 6, 5, 2

# -- routers: (logits [..., E], k) → weights, experts [..., k] -------------------------------------


def normalised(w):
    return w / w.sum(-1, keepdim=True)


def softmax_topk(logits, k):
    return logits.softmax(-1).topk(k, -1)


def softmax_topk_normalised(logits, k):
    w, i = logits.softmax(-1).topk(k, -1)
    return normalised(w), i


def topk_softmax(logits, k):
    v, i = logits.topk(k, -1)
    return v.softmax(-1), i


def sigmoid_topk(logits, k):
    w, i = logits.sigmoid().topk(k, -1)
    return w / (w.sum(-1, keepdim=True) + 1e-9) * 2.5, i


def scattered_softmax(logits, k):
    v, i = logits.topk(k, -1)
    return torch.full_like(logits, -torch.inf).scatter(-1, i, v).softmax(-1).gather(-1, i), i


def masked_softmax(logits, k):
    i = logits.topk(k, -1).indices
    mask = torch.zeros_like(logits).scatter(-1, i, 1.0).bool()
    return logits.masked_fill(~mask, -torch.inf).softmax(-1).gather(-1, i), i


def masked_scores(logits, k):
    p = logits.softmax(-1)
    i = p.topk(k, -1).indices
    p = normalised(p * torch.zeros_like(p).scatter(-1, i, 1.0))
    return p.gather(-1, i), i


def sorted_scores(logits, k):
    w, i = logits.softmax(-1).sort(-1, descending=True)
    return w[..., :k], i[..., :k]


def gathered_scores(logits, k):
    i = logits.topk(k, -1).indices
    return normalised(logits.softmax(-1).gather(-1, i)), i


def argmax_gather(logits, k):
    p = logits.softmax(-1)
    i = p.argmax(-1)
    return p.gather(-1, i.unsqueeze(-1)), i.unsqueeze(-1)


def argmax_of_logits(logits, k):
    i = logits.argmax(-1, keepdim=True)
    return logits.softmax(-1).gather(-1, i), i


def max_of_scores(logits, k):
    return logits.softmax(-1).max(-1, keepdim=True)


ROUTERS = {
    f.__name__: f
    for f in (
        softmax_topk, softmax_topk_normalised, topk_softmax, sigmoid_topk, scattered_softmax, masked_softmax,
        masked_scores, sorted_scores, gathered_scores, argmax_gather, argmax_of_logits, max_of_scores,
    )
}  # fmt: skip
TOP1 = ("argmax_gather", "argmax_of_logits", "max_of_scores")

# -- experts ---------------------------------------------------------------------------------------

UNITS = {
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate) * up,
    "geglu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "reglu": lambda gate, up: F.relu(gate) * up,
}


class Separate(nn.Module):
    """gate and up are layers of their own"""

    def __init__(self, unit, bias):
        super().__init__()
        self.unit = UNITS[unit]
        self.gate, self.up, self.down = (nn.Linear(*s, bias=bias) for s in ((D, H), (D, H), (H, D)))

    def forward(self, x):
        return self.down(self.unit(self.gate(x), self.up(x)))


class Merged(nn.Module):
    """gate and up are one layer"""

    def __init__(self, unit, bias):
        super().__init__()
        self.unit = UNITS[unit]
        self.first, self.second = nn.Linear(D, 2 * H, bias=bias), nn.Linear(H, D, bias=bias)

    def forward(self, x):
        return self.second(self.unit(*self.first(x).chunk(2, -1)))


# -- layers ----------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A router and `combine(layer, x, weights, experts)`, on tokens as they are or flattened."""

    def __init__(self, combine, router="softmax_topk_normalised", unit="swiglu", bias=False, k=K, flat=True,
                 module=Separate, shared=False, extra=False):  # fmt: skip
        super().__init__()
        torch.manual_seed(0)
        self.combine, self.router, self.k, self.flat, self.extra = combine, ROUTERS[router], k, flat, extra
        self.unit = UNITS[unit]
        self.router_logits = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(module(unit, bias) for _ in range(E))
        self.shared = Separate("swiglu", False) if shared else None
        shapes = {"w1": (E, D, H), "w3": (E, D, H), "w2": (E, H, D), "w13": (E, D, 2 * H), "t1": (E, H, D),
                  "t3": (E, H, D), "t2": (E, D, H), "b1": (E, H), "b3": (E, H), "b2": (E, D)}  # fmt: skip
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) * 0.4))

    def forward(self, x):
        tokens = x.reshape(-1, D) if self.flat else x
        weights, experts = self.router(self.router_logits(tokens), self.k)
        y = self.combine(self, tokens, weights, experts)
        if self.shared is not None:
            y = y + torch.sigmoid(tokens[..., :1]) * self.shared(tokens)
        return (y.view(x.shape), weights, experts) if self.extra else y.view(x.shape)


def scattered(x, weights, experts):
    return torch.zeros(*x.shape[:-1], E, dtype=x.dtype).scatter(-1, experts, weights)


def loop_index_add(m, x, w, idx):
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        tok, slot = torch.where(idx == e)
        out.index_add_(0, tok, expert(x[tok]) * w[tok, slot, None])
    return out


def loop_read_and_put(m, x, w, idx):
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        tok, slot = torch.where(idx == e)
        out[tok] += w[tok, slot].unsqueeze(-1) * expert(x[tok])
    return out


def loop_nonzero(m, x, w, idx):
    out = torch.zeros_like(x)
    for e in reversed(range(E)):
        hit = (idx == e).nonzero()
        tok, slot = hit[:, 0], hit[:, 1]
        out = out.index_put((tok,), w[tok, slot][:, None] * m.experts[e](x[tok]), accumulate=True)
    return out


def loop_one_hot(m, x, w, idx):
    out = torch.zeros_like(x)
    mask = F.one_hot(idx, E).permute(2, 1, 0)
    for e, expert in enumerate(m.experts):
        slot, tok = torch.where(mask[e])
        out.index_add_(0, tok, expert(x[None, tok].reshape(-1, D)) * w[tok, slot, None])
    return out


def loop_any(m, x, w, idx):
    out = x
    for e, expert in enumerate(m.experts):
        hit = idx == e
        tok = torch.where(hit.any(-1))[0]
        out = out.index_add(0, tok, expert(x[tok]) * (w * hit).sum(-1)[tok].unsqueeze(-1))
    return out


def loop_column(m, x, w, idx):
    out, combine = torch.zeros_like(x), scattered(x, w, idx)
    for e, expert in enumerate(m.experts):
        tok = (idx == e).any(-1).nonzero().squeeze(-1)
        out.index_add_(0, tok, expert(x[tok]) * combine[tok, e, None])
    return out


def loop_top1(m, x, w, idx):
    w, idx = w[..., 0], idx[..., 0]
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        tok = torch.where(idx == e)[0]
        out.index_add_(0, tok, expert(x[tok]) * w[tok, None])
    return out


def dense_equal(m, x, w, idx):
    return sum(((idx == e) * w).sum(-1, keepdim=True) * expert(x) for e, expert in enumerate(m.experts))


def dense_where(m, x, w, idx):
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        out += expert(x) * torch.where(idx == e, w, 0.0).sum(-1).unsqueeze(-1)
    return out


def dense_scattered(m, x, w, idx):
    combine = scattered(x, w, idx)
    return sum(combine[..., e, None] * expert(x) for e, expert in enumerate(m.experts))


def dense_one_hot(m, x, w, idx):
    combine = (F.one_hot(idx, E) * w.unsqueeze(-1)).sum(-2)
    return sum(combine[..., e : e + 1] * expert(x) for e, expert in enumerate(m.experts))


def stack_gather(m, x, w, idx):
    y = torch.stack([expert(x) for expert in m.experts], -2)
    chosen = y.gather(-2, idx.unsqueeze(-1).expand(*idx.shape, D))
    return (chosen * w.unsqueeze(-1)).sum(-2)


def stack_index(m, x, w, idx):
    y = torch.stack([expert(x) for expert in m.experts], 1)
    return (y[torch.arange(x.shape[0])[:, None], idx] * w[..., None]).sum(1)


def stack_einsum(m, x, w, idx):
    y = torch.stack([expert(x) for expert in m.experts], -2)
    return torch.einsum("...e,...ed->...d", scattered(x, w, idx), y)


def einsum_all(m, x, w, idx):
    h = m.unit(torch.einsum("btd,edh->bteh", x, m.w1), torch.einsum("btd,edh->bteh", x, m.w3))
    return torch.einsum("bteh,ehd,bte->btd", h, m.w2, scattered(x, w, idx))


def einsum_experts_first(m, x, w, idx):
    h = m.unit(torch.einsum("td,ehd->eth", x, m.t1), torch.einsum("td,ehd->eth", x, m.t3))
    return torch.einsum("etd,te->td", torch.einsum("eth,edh->etd", h, m.t2), scattered(x, w, idx))


def einsum_merged(m, x, w, idx):
    gate, up = torch.einsum("td,edh->teh", x, m.w13).chunk(2, -1)
    y = torch.einsum("teh,ehd->ted", m.unit(gate, up), m.w2)
    return (y * (F.one_hot(idx, E) * w[..., None]).sum(1)[..., None]).sum(1)


def einsum_biased(m, x, w, idx):
    gate, up = torch.einsum("td,edh->teh", x, m.w1) + m.b1, torch.einsum("td,edh->teh", x, m.w3) + m.b3
    y = torch.einsum("teh,ehd->ted", m.unit(gate, up), m.w2) + m.b2
    return (y * scattered(x, w, idx)[..., None]).sum(1)


def bmm_all(m, x, w, idx):
    rows = x.reshape(1, -1, D).expand(E, -1, -1)
    y = torch.bmm(m.unit(torch.bmm(rows, m.t1.mT), torch.bmm(rows, m.t3.mT)), m.w2)
    return (y * scattered(x, w, idx).reshape(-1, E).T.unsqueeze(-1)).sum(0).view_as(x)


def bmm_gather(m, x, w, idx):
    rows = x.expand(E, -1, -1)
    y = torch.bmm(m.unit(torch.bmm(rows, m.w1), torch.bmm(rows, m.w3)), m.w2).transpose(0, 1)
    return (y.gather(1, idx[..., None].expand(-1, -1, D)) * w[..., None]).sum(1)


def einsum_take(m, x, w, idx):
    h = m.unit(torch.einsum("td,edh->teh", x, m.w1), torch.einsum("td,edh->teh", x, m.w3))
    y = torch.take_along_dim(torch.einsum("teh,ehd->ted", h, m.w2), idx[..., None], 1)
    return torch.einsum("tkd,tk->td", y, w)


def gather_merged(m, x, w, idx):
    gate, up = torch.einsum("...d,...kdh->...kh", x, m.w13[idx]).chunk(2, -1)
    y = torch.einsum("...kh,...khd->...kd", m.unit(gate, up), m.w2[idx])
    return (y * w.unsqueeze(-1)).sum(-2)


def gather_separate(m, x, w, idx):
    h = m.unit(torch.einsum("td,tkdh->tkh", x, m.w1[idx]), torch.einsum("td,tkdh->tkh", x, m.w3[idx]))
    return torch.einsum("tkh,tkhd,tk->td", h, m.w2[idx], w)


def gather_matmul(m, x, w, idx):
    row = x[:, None, None, :]
    y = (m.unit(row @ m.t1[idx].mT, row @ m.t3[idx].mT) @ m.w2[idx]).squeeze(2)
    return (y * w[..., None]).sum(1)


def gather_biased(m, x, w, idx):
    gate = torch.einsum("td,tkdh->tkh", x, m.w1[idx]) + m.b1[idx]
    up = torch.einsum("td,tkdh->tkh", x, m.w3[idx]) + m.b3[idx]
    y = torch.einsum("tkh,tkhd->tkd", m.unit(gate, up), m.w2[idx]) + m.b2[idx]
    return (y * w[..., None]).sum(1)


LOOPS = (loop_index_add, loop_read_and_put, loop_nonzero, loop_one_hot, loop_any, loop_column)
MODULES = (*LOOPS, dense_equal, dense_where, dense_scattered, dense_one_hot, stack_gather, stack_index, stack_einsum)
STACKED = (
    einsum_all, einsum_experts_first, einsum_merged, einsum_biased, bmm_all, bmm_gather, einsum_take, gather_merged,
    gather_separate, gather_matmul, gather_biased,
)  # fmt: skip
# these take [B, T, …]; others that can take both are tried both ways
UNFLATTENED = (einsum_all,)
EITHER = (dense_equal, dense_where, dense_scattered, dense_one_hot, stack_gather, stack_einsum, bmm_all, gather_merged)
