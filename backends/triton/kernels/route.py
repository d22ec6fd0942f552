"""Routing: which experts a token goes to, and with what weights."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl

from moec.backends.triton.kernels.checks import require, require_float, require_same_device, require_shape, rows
from moec.backends.triton.kernels.tiles import interpreter_tiles
from moec.backends.triton.launch import cdiv, launch, next_pow2

MAX_EXPERTS = 4096
LEAST = tl.constexpr(-(2**31))


@triton.jit
def descending_key(x):
    """int32 that orders float32 as a descending sort does: NaN above +inf, −0 equal to 0, every key above LEAST."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def route_kernel(
    logits_ptr, bias_ptr, weights_ptr, experts_ptr, T, E, normalize_eps, scale, masked_score,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, KEEP: tl.constexpr, GROUP_TOP: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
    SCORING: tl.constexpr, HAS_BIAS: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    # Column c of a tile is expert (c % BLOCK_S) of group (c // BLOCK_S): increasing in the expert's number.
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_G * BLOCK_S)
    expert = c // BLOCK_S * GROUP_SIZE + c % BLOCK_S
    exists = (c // BLOCK_S < GROUPS) & (c % BLOCK_S < GROUP_SIZE)
    mask = (t[:, None] < T) & exists[None, :]
    narrow = logits_ptr.dtype.element_ty
    scores = tl.load(logits_ptr + t[:, None] * E + expert[None, :], mask=mask, other=0.0).to(tl.float32)
    if SCORING == "sigmoid":
        scores = (1.0 / (1.0 + tl.exp(-scores))).to(narrow).to(tl.float32)
    if SCORING == "softmax":
        # tl.max skips NaN; the sum then carries it to every score of the row
        peak = tl.max(tl.where(exists[None, :], scores, float("-inf")), axis=1)
        shifted = tl.where(exists[None, :], tl.exp(scores - peak[:, None]), 0.0)
        scores = (shifted / tl.sum(shifted, axis=1)[:, None]).to(narrow).to(tl.float32)
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias_ptr + expert, mask=exists, other=0.0).to(tl.float32)[None, :]
        choice = choice.to(narrow).to(tl.float32)
    exists = tl.broadcast_to(exists[None, :], (BLOCK_T, BLOCK_G * BLOCK_S))

    if KEEP < GROUPS:
        values = tl.reshape(choice, (BLOCK_T, BLOCK_G, BLOCK_S))
        keys = tl.reshape(tl.where(exists, descending_key(choice), LEAST), (BLOCK_T, BLOCK_G, BLOCK_S))
        s = tl.arange(0, BLOCK_S)[None, None, :]
        group_score = tl.zeros((BLOCK_T, BLOCK_G), dtype=tl.float32)
        for _ in tl.static_range(GROUP_TOP):
            best = tl.max(keys, axis=2)
            at = tl.min(tl.where(keys == best[:, :, None], s, BLOCK_S), axis=2)
            group_score += tl.sum(tl.where(s == at[:, :, None], values, 0.0), axis=2)
            keys = tl.where(s == at[:, :, None], LEAST, keys)
        g = tl.arange(0, BLOCK_G)[None, :]
        group_keys = tl.where(g < GROUPS, descending_key(group_score.to(narrow).to(tl.float32)), LEAST)
        kept = tl.zeros((BLOCK_T, BLOCK_G), dtype=tl.int32)
        for _ in tl.static_range(KEEP):
            best = tl.max(group_keys, axis=1)
            at = tl.min(tl.where(group_keys == best[:, None], g, BLOCK_G), axis=1)
            kept = tl.where(g == at[:, None], 1, kept)
            group_keys = tl.where(g == at[:, None], LEAST, group_keys)
        kept = tl.reshape(tl.broadcast_to(kept[:, :, None], (BLOCK_T, BLOCK_G, BLOCK_S)), (BLOCK_T, BLOCK_G * BLOCK_S))
        choice = tl.where(kept > 0, choice, masked_score)

    keys = tl.where(exists, descending_key(choice), LEAST)
    slot = tl.arange(0, BLOCK_K)[None, :]
    chosen = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.int32)
    weights = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
    for i in tl.static_range(K):
        best = tl.max(keys, axis=1)
        at = tl.min(tl.where(keys == best[:, None], c[None, :], BLOCK_G * BLOCK_S), axis=1)
        picked = c[None, :] == at[:, None]
        chosen = tl.where(slot == i, (at // BLOCK_S * GROUP_SIZE + at % BLOCK_S)[:, None], chosen)
        weights = tl.where(slot == i, tl.sum(tl.where(picked, scores, 0.0), axis=1)[:, None], weights)
        keys = tl.where(picked, LEAST, keys)
    if SCORING == "topk_softmax":
        weights = tl.where(slot < K, weights, float("-inf"))
        weights = tl.exp(weights - tl.max(weights, axis=1)[:, None])
        weights = weights / tl.sum(weights, axis=1)[:, None]
    elif NORMALIZE:
        weights = weights / (tl.sum(weights, axis=1) + normalize_eps)[:, None]
    weights *= scale
    out = t[:, None] * K + slot
    out_mask = (t[:, None] < T) & (slot < K)
    tl.store(weights_ptr + out, weights.to(weights_ptr.dtype.element_ty), mask=out_mask)
    tl.store(experts_ptr + out, chosen.to(experts_ptr.dtype.element_ty), mask=out_mask)


def route(
    logits: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    k: int,
    scoring: Literal["softmax", "sigmoid", "topk_softmax"] = "softmax",
    normalize: bool = True,
    normalize_eps: float = 0.0,
    scale: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: Literal["max", "top2_sum"] = "top2_sum",
    masked_score: float = float("-inf"),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose k of E experts for each token: logits [..., E] → weights [..., k] (dtype of logits), experts i64[..., k].

    logits: float32, bfloat16 or float16, E ≤ 4096. Scores are the softmax over all experts or the sigmoid; with
    "topk_softmax" experts are chosen by logit and the softmax runs over the chosen. `bias` [E] is added for the
    choice only. With `n_group` > 1 only the `topk_group` best of these groups of consecutive experts stay open (a
    group scores its best expert, or the sum of its two best); experts of the others score `masked_score`.
    `normalize` divides the weights by (their sum + `normalize_eps`); `scale` multiplies them.

    Experts come best first; among equals the lower number comes first. NaN ranks above everything: a NaN logit makes
    all softmax weights of its token NaN, and under a sigmoid its expert is chosen with a NaN weight.
    Raises ValueError for wrong shapes or dtypes, or when fewer than k experts would stay open.
    """
    require_float("logits", logits)
    require(logits.ndim >= 1, "logits must have at least one dimension")
    known = ("softmax", "sigmoid", "topk_softmax")
    require(scoring in known, f"scoring must be one of {known}, got {scoring!r}")
    require(group_score in ("max", "top2_sum"), f"group_score must be 'max' or 'top2_sum', got {group_score!r}")
    experts = logits.shape[-1]
    require(0 < experts <= MAX_EXPERTS, f"1 to {MAX_EXPERTS} experts, got {experts}")
    require(n_group >= 1 and experts % n_group == 0, f"{experts} experts do not form {n_group} equal groups")
    require(1 <= topk_group <= n_group, f"topk_group must be in 1..{n_group}, got {topk_group}")
    size = experts // n_group
    require(1 <= k <= topk_group * size, f"k must be in 1..{topk_group * size} (experts left open), got {k}")
    group_top = 1 if group_score == "max" else 2
    require(topk_group == n_group or group_top <= size, f"top2_sum needs two experts per group, there is {size}")
    if bias is not None:
        require_float("bias", bias)
        require_shape("bias", bias, (experts,))
        bias = bias.contiguous()
    require_same_device(logits=logits, bias=bias)
    shape = (*logits.shape[:-1], k)
    weights = torch.empty(shape, dtype=logits.dtype, device=logits.device)
    chosen = torch.empty(shape, dtype=torch.int64, device=logits.device)
    if weights.numel():
        tokens = weights.numel() // k
        block_g, block_s = next_pow2(n_group), next_pow2(size)
        block_t = 128 if interpreter_tiles() else max(1, min(16, 2048 // (block_g * block_s)))
        launch(
            route_kernel, (cdiv(tokens, block_t),),
            rows(logits), bias, weights, chosen, tokens, experts,
            float(normalize_eps), float(scale), float(masked_score),
            K=k, BLOCK_T=block_t, BLOCK_K=next_pow2(k),
            GROUPS=n_group, GROUP_SIZE=size, KEEP=topk_group, GROUP_TOP=group_top, BLOCK_G=block_g, BLOCK_S=block_s,
            SCORING=scoring, HAS_BIAS=bias is not None, NORMALIZE=normalize, num_warps=4, num_stages=1,
        )  # fmt: skip
    return weights, chosen
