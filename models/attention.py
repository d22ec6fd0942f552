"""Self-attention: multi-head / grouped-query, and DeepSeek's multi-head latent attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.models.model_config import ModelConfig
from moec.models.norm import RMSNorm
from moec.models.rope import rotate, softmax_scale

Cache = tuple[Tensor, Tensor]
"""One layer's past: (k, v). MHA/GQA [B, num_kv_heads, P, head_dim] twice;
MLA (normalised latent [B, 1, P, kv_lora_rank], rotated shared key [B, 1, P, qk_rope_head_dim])."""

LATENT_EPS = 1e-6  # DeepSeek's released code normalises latents with its default, whatever rms_norm_eps says


def extend(past: Cache | None, first: Tensor, second: Tensor) -> Cache:
    """Appends this step's keys and values (axis 2 is time)."""
    if past is None:
        return first, second
    return torch.cat((past[0], first), dim=2), torch.cat((past[1], second), dim=2)


class GroupedQueryAttention(nn.Module):
    """MHA, GQA and MQA with RoPE, optional biases and optional RMSNorm on the heads of q and k.

    hidden [B, S, d], tables cos/sin [B, 1, S, head_dim], mask bool broadcastable to [B, H, S, P+S] (True: may
    attend) or None for a causal square; returns ([B, S, d], the extended cache).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, dim = config.hidden_size, config.head_dim
        self.head_dim = dim
        self.grouped = config.num_heads != config.num_kv_heads
        self.scale = softmax_scale(config)
        self.interleaved = config.rope_interleaved
        self.q_proj = nn.Linear(d, config.num_heads * dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(d, config.num_kv_heads * dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(d, config.num_kv_heads * dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_heads * dim, d, bias=config.o_bias)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self, hidden: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | None, past: Cache | None
    ) -> tuple[Tensor, Cache]:
        heads = (-1, self.head_dim)
        q, k, v = (project(hidden).unflatten(-1, heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q.transpose(1, 2), *tables, self.interleaved)
        k = rotate(k.transpose(1, 2), *tables, self.interleaved)
        cache = extend(past, k, v.transpose(1, 2))
        y = F.scaled_dot_product_attention(
            q, *cache, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=self.grouped
        )
        return self.o_proj(y.transpose(1, 2).flatten(2)), cache


class LatentAttention(nn.Module):
    """MLA (DeepSeek-V2, arXiv:2405.04434 §2.1): keys and values are expanded from a small cached latent.

    Arguments and results as GroupedQueryAttention's; the cache holds the normalised latent and the one rotated key
    that all heads share. State names follow DeepSeek's checkpoints.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.kv_lora_rank is not None
        d, heads = config.hidden_size, config.num_heads
        self.num_heads = heads
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.latent = config.kv_lora_rank
        self.scale = softmax_scale(config)
        self.interleaved = config.rope_interleaved
        query = heads * config.qk_head_dim
        self.low_rank_query = config.q_lora_rank is not None
        if config.q_lora_rank is not None:
            self.q_a_proj = nn.Linear(d, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query, bias=False)
        else:
            self.q_proj = nn.Linear(d, query, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(d, self.latent + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_EPS)
        self.kv_b_proj = nn.Linear(self.latent, heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(heads * self.value, d, bias=False)

    def forward(
        self, hidden: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | None, past: Cache | None
    ) -> tuple[Tensor, Cache]:
        if self.low_rank_query:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden)))
        else:
            q = self.q_proj(hidden)
        q = q.unflatten(-1, (self.num_heads, self.nope + self.rope)).transpose(1, 2)
        q_nope, q_rope = q.split((self.nope, self.rope), dim=-1)
        q = torch.cat((q_nope, rotate(q_rope, *tables, self.interleaved)), dim=-1)

        latent, k_rope = self.kv_a_proj_with_mqa(hidden).split((self.latent, self.rope), dim=-1)
        latent = self.kv_a_layernorm(latent).unsqueeze(1)
        cache = extend(past, latent, rotate(k_rope.unsqueeze(1), *tables, self.interleaved))

        latent, k_rope = cache
        keys_values = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (self.num_heads, self.nope + self.value))
        k_nope, v = keys_values.transpose(1, 2).split((self.nope, self.value), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, self.num_heads, -1, -1)), dim=-1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale)
        return self.o_proj(y.transpose(1, 2).flatten(2)), cache
