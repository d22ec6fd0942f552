"""Rotary position embedding (Su et al., arXiv:2104.09864) with YaRN, Llama 3 or linear scaling of its frequencies."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moec.models.model_config import Llama3Rope, ModelConfig, Yarn


def yarn_mscale(factor: float, mscale: float) -> float:
    """Attention temperature 0.1 · mscale · ln(factor) + 1 of YaRN §3.4, 1 when the context is not extended."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """1/sqrt(width of a query head), for MLA with YaRN times m(mscale_all_dim)² as in DeepSeek-V2/V3."""
    scale = config.qk_head_dim**-0.5
    if config.yarn is not None and config.is_mla and config.yarn.mscale_all_dim:
        scale *= yarn_mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2
    return scale


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """f32[rope_dim/2]: theta^(-2i/rope_dim), scaled as the config says."""
    dim, theta = config.rope_dim, config.rope_theta
    inv_freq = theta ** -(torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    if config.yarn is not None:
        return _yarn(inv_freq, theta, config.yarn)
    if config.llama3 is not None:
        return _llama3(inv_freq, config.llama3)
    return inv_freq / config.rope_factor if config.rope_factor != 1 else inv_freq


def _llama3(inv_freq: Tensor, scaling: Llama3Rope) -> Tensor:
    """Fast rotations are kept, slow ones divided by the factor, those between interpolated by their number of turns."""
    turns = scaling.original_max_position * inv_freq / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * kept + inv_freq / scaling.factor * (1 - kept)


def _yarn(inv_freq: Tensor, theta: float, yarn: Yarn) -> Tensor:
    """Slow rotations are divided by the factor, fast ones kept."""
    dim = 2 * len(inv_freq)

    def index_of(rotations: float) -> float:
        """The (fractional) frequency index that makes this many rotations over the original context."""
        return dim * math.log(yarn.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(index_of(yarn.beta_fast)), 0)
    high = min(math.ceil(index_of(yarn.beta_slow)), dim - 1)
    steps = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    interpolated = ((steps - low) / max(high - low, 1e-3)).clamp(0, 1)
    return inv_freq * (1 - interpolated) + inv_freq / yarn.factor * interpolated


class RotaryEmbedding(nn.Module):
    """Tables for positions i64[B, S]: cos and sin, each [B, 1, S, rope_dim] in `dtype`, halves repeated."""

    inv_freq: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Made on the CPU and moved, so that the values do not depend on the device; a meta model stays on meta.
        self._config = config
        self.register_buffer("inv_freq", inverse_frequencies(config).to(torch.get_default_device()), persistent=False)
        self.scale = 1.0
        if (yarn := config.yarn) is not None:
            if yarn.mscale and yarn.mscale_all_dim:
                self.scale = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
            else:
                self.scale = yarn_mscale(yarn.factor, 1.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        """Moves with the model, but stays float32 (a bfloat16 frequency is wrong by whole turns), also from meta."""
        super()._apply(fn, recurse)
        self.inv_freq = inverse_frequencies(self._config).to(self.inv_freq.device)
        return self

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = positions[:, None, :, None].to(self.inv_freq.dtype) * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        if self.scale != 1.0:
            cos, sin = cos * self.scale, sin * self.scale
        return cos.to(dtype), sin.to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates x [B, H, S, D] by the tables [B, 1, S, D].

    Plain: value i is paired with i + D/2. Interleaved (DeepSeek): 2i with 2i+1, and the result comes out
    de-interleaved, all first members, then all second members; queries and keys agree, so scores are unchanged.
    """
    if interleaved:
        x = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin
