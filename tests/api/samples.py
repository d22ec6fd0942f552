"""Small graphs and models for the tests of the public interface."""

from __future__ import annotations

import torch
from torch import nn

import moec

MLP = """
graph(%x: f32[T, 16], %keep: i64[T]) -> (%y: f32[T, 8], %kept: i64[T]) {
  weight @norm: f32[16]
  weight @up: f32[32, 16]
  weight @down: f32[8, 32]
  %0: f32[T, 16] = norm.rms(%x, @norm) {eps=1e-06} loc("norm" "model.py":3) origin("a")
  %1: f32[T, 32] = linear.linear(%0, @up) loc("up" "model.py":4) origin("b")
  %2: f32[T, 32] = math.silu(%1) loc("act" "model.py":5) origin("c")
  %3: f32[T, 8] = linear.linear(%2, @down) loc("down" "model.py":6) origin("d")
  return %3, %keep
}
"""


def bind(graph: moec.Graph, seed: int = 0) -> moec.Graph:
    """Random weights of about unit gain."""
    generator = torch.Generator().manual_seed(seed)
    for name, v in graph.weights.items():
        graph.bind_weights({name: torch.randn(v.shape, generator=generator) / v.shape[-1] ** 0.5})
    return graph


class TinyLM(nn.Module):
    """A one-layer causal language model with a KV cache and `empty_cache`, of no known family."""

    def __init__(self, vocab: int = 32, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.head = nn.Linear(width, vocab)

    def empty_cache(self, batch: int):
        return {
            "k": torch.zeros(batch, 0, self.embed.embedding_dim),
            "v": torch.zeros(batch, 0, self.embed.embedding_dim),
        }

    def forward(self, input_ids, attention_mask=None, past=None):
        cached = past is not None
        x = self.embed(input_ids)
        k, v = self.k(x), self.v(x)
        if cached:
            k, v = torch.cat((past["k"], k), 1), torch.cat((past["v"], v), 1)
        start = k.shape[1] - x.shape[1]
        keys = torch.arange(k.shape[1])
        new = torch.arange(x.shape[1]) + start
        allowed = (keys <= new[:, None])[None]
        if attention_mask is not None:
            allowed = allowed & attention_mask[:, None].bool() | (keys == new[:, None])[None]
        scores = (self.q(x) @ k.transpose(1, 2)).masked_fill(~allowed, float("-inf"))
        logits = self.head(x + torch.softmax(scores, -1) @ v)
        return (logits, {"k": k, "v": v}) if cached else logits


def greedy(model, prompt: torch.Tensor, count: int) -> list[int]:
    """New ids of one unpadded row, without a cache."""
    ids = prompt[None]
    with torch.no_grad():
        for _ in range(count):
            logits = model(ids)
            logits = getattr(logits, "logits", logits)
            ids = torch.cat((ids, logits[:, -1].argmax(-1, keepdim=True)), 1)
    return ids[0, len(prompt) :].tolist()
