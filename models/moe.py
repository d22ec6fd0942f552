"""The Mixture-of-Experts block: router, stacked experts, shared experts, and the dense SwiGLU they are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.models.grouped import grouped_mm
from moec.models.model_config import ModelConfig
from moec.models.norm import at_least_float32


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv:2002.05202). x [..., d] → [..., d]."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Top-k routing. x [T, d] → (weights [T, k] float32 or float64, experts i64[T, k]).

    softmax: the k greatest probabilities (Mixtral, Qwen3, DeepSeek-V2); sigmoid: the k greatest of score + bias, the
    weights being scores without the bias (DeepSeek-V3, arXiv:2412.19437 §2.1.2). With groups, only experts of the
    best groups can be chosen; a group's score is its greatest probability (V2) or the sum of its two greatest biased
    scores (V3). `norm_topk_prob` divides the weights by their sum; then they are scaled.
    Of experts with equal scores any may be chosen, but each at most once.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.n_group, self.topk_group = config.top_k, config.n_group, config.topk_group
        self.scoring = config.scoring
        self.normalise = config.norm_topk_prob
        self.scaling = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        if self.scoring == "sigmoid":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(at_least_float32(x), at_least_float32(self.weight))
        if self.scoring == "sigmoid":
            scores = logits.sigmoid()
            choice = scores + self.e_score_correction_bias
        else:
            scores = choice = logits.softmax(dim=-1)
        if self.n_group > 1:
            choice = self._limit_groups(choice)
        experts = choice.topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, experts)
        if self.normalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        if self.scaling != 1.0:
            weights = weights * self.scaling
        return weights, experts

    def _limit_groups(self, choice: Tensor) -> Tensor:
        """choice [T, E] with -inf in every group but the best `topk_group`."""
        grouped = choice.unflatten(-1, (self.n_group, -1))
        if self.scoring == "sigmoid":
            group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
        else:
            group_scores = grouped.amax(dim=-1)
        chosen = group_scores.topk(self.topk_group, dim=-1).indices
        keep = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, chosen, True)
        return grouped.masked_fill(~keep.unsqueeze(-1), float("-inf")).flatten(1)


class Experts(nn.Module):
    """E SwiGLU experts in stacked weights gate_up_proj [E, 2f, d] (gate rows, then up rows) and down_proj [E, d, f].

    x [T, d], weights [T, k], experts i64[T, k] → [T, d]: every token's k expert outputs, weighted and summed.
    Tokens are sorted by expert, so that each expert is one matrix product over its own rows (`grouped_mm`).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        d, f = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * f, d))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, d, f))

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        top_k = experts.shape[1]
        flat = experts.reshape(-1)
        order = torch.argsort(flat, stable=True)
        rows = x[order // top_k]
        # histc takes no integers on the CPU; expert ids are exact in float32.
        counts = torch.histc(flat.to(torch.float32), bins=self.num_experts, min=0, max=self.num_experts - 1)
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
        gate, up = grouped_mm(rows, self.gate_up_proj.transpose(1, 2), ends).chunk(2, dim=-1)
        y = grouped_mm(F.silu(gate) * up, self.down_proj.transpose(1, 2), ends)
        y = y * weights.reshape(-1)[order].unsqueeze(-1).to(y.dtype)
        inverse = torch.argsort(order)
        return y[inverse].view(-1, top_k, x.shape[1]).sum(dim=1)


class MoE(nn.Module):
    """Routed experts plus an optional shared SwiGLU that sees every token. x [B, S, d] → [B, S, d]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        shared = config.num_shared_experts * config.moe_intermediate_size
        self.shared_experts = SwiGLU(config.hidden_size, shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, experts = self.gate(flat)
        y = self.experts(flat, weights, experts).view_as(x)
        return y if self.shared_experts is None else y + self.shared_experts(x)
