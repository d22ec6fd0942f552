"""Measures on byte-level text: bits per byte, expert load, and how often the MTP head agrees with the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from moec.models.moe import MoE
from moec.models.transformer import MoETransformer


def byte_windows(text: bytes, window: int, batch: int) -> Iterator[Tensor]:
    """i64[b, window] batches of consecutive non-overlapping windows (b ≤ batch), then the shorter rest, if it has
    at least two bytes, as [1, rest]."""
    if window < 2:
        raise ValueError(f"window is {window}, must be at least 2")
    if batch < 1:
        raise ValueError(f"batch is {batch}, must be at least 1")
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int64) if text else torch.empty(0).long()
    full = len(text) // window
    yield from ids[: full * window].view(full, window).split(batch) if full else ()
    if len(text) - full * window >= 2:
        yield ids[full * window :].unsqueeze(0)


@torch.no_grad()
def bits_per_byte(fn: Callable[[Tensor], Tensor], text: bytes, window: int = 512, batch: int = 8) -> float:
    """Mean -log2 p(byte | the bytes before it in its window) of `fn`, which maps i64[B, S] to logits [B, S, V].

    The text is cut into windows that share no context; every byte but the first of each window is predicted once.
    Logits are read in float32, sums are taken in float64. Raises ValueError if the text has fewer than 2 bytes or
    fn's result has the wrong shape.
    """
    total, count = 0.0, 0
    for ids in byte_windows(text, window, batch):
        logits = fn(ids)
        if logits.ndim != 3 or logits.shape[:2] != ids.shape or logits.shape[2] < 256:
            raise ValueError(f"fn gave logits {list(logits.shape)} for ids {list(ids.shape)}")
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        total += float(loss.double().sum())
        count += loss.numel()
    if count == 0:
        raise ValueError(f"text has {len(text)} bytes, need at least 2")
    return total / count / math.log(2)


@torch.no_grad()
def expert_load(model: MoETransformer, text: bytes, window: int = 512, batch: int = 8) -> dict[int, Tensor]:
    """Share of the routed (token, expert) pairs that each expert gets: layer index → f64[num_experts], sum 1.

    Only layers that the plain forward runs. Raises ValueError if the text has fewer than 2 bytes.
    """
    counts: dict[int, Tensor] = {}
    hooks = []
    for index in range(model.config.num_layers):
        block = model.model.layers[index].mlp
        if isinstance(block, MoE):
            counts[index] = torch.zeros(model.config.num_experts, dtype=torch.float64)

            def count(_module, _args, result, total=counts[index]) -> None:
                total += torch.bincount(result[1].flatten().cpu(), minlength=total.numel())

            hooks.append(block.gate.register_forward_hook(count))
    try:
        seen = [model(ids).shape for ids in byte_windows(text, window, batch)]
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError(f"text has {len(text)} bytes, need at least 2")
    return {index: total / total.sum() for index, total in counts.items()}


@torch.no_grad()
def mtp_accept_rate(model: MoETransformer, text: bytes, window: int = 512, batch: int = 8) -> float:
    """Share of positions where the MTP head's argmax for byte i+2, given the true byte i+1, equals the main model's
    argmax for the same byte: greedy speculative decoding would accept that draft."""
    agree, count = 0, 0
    for ids in byte_windows(text, window, batch):
        if ids.shape[1] < 3:
            continue
        hidden = model.hidden_states(ids)
        main = model.logits(hidden)[:, 1:].argmax(-1)
        draft = model.mtp_logits(hidden[:, :-1], ids[:, 1:]).argmax(-1)
        agree += int((main == draft).sum())
        count += main.numel()
    if count == 0:
        raise ValueError(f"text has {len(text)} bytes, need at least 3")
    return agree / count
