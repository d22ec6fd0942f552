"""Kernel functions of state-space and linear-attention layers, in terms of one op of ours.

Models call them by contracts that the kernel packages fixed (mamba-ssm, flash-linear-attention). What stands in for a
missing kernel in Python goes through the sequence step by step, or in blocks that are counted in Python, so that a
trace would hold for one length. Each function here has a kernel's parameters and its results for any length; what it
returns has the dtypes of the Python forms in transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from moec.ir import lookup

Tensor = torch.Tensor


@torch.library.custom_op("moec_frontend::linear_attention", mutates_args=())
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The IR's `attention.linear_attention` as an op of torch's, so that a trace can hold it."""
    operands = (q, k, v, decay, beta, state)
    result: tuple[Tensor, Tensor] = (
        lookup("attention.linear_attention").instance(operands, {"scale": scale}).reference()
    )
    return result


@linear_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), v.new_empty(v.shape[0], v.shape[2], q.shape[3], v.shape[3])


def _floats(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.float() for x in tensors]


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False,
    use_mambapy: bool = False, use_associative_scan: bool = False,
) -> Any:  # fmt: skip
    """`selective_scan_fn` of mamba-ssm (Mamba, arXiv:2312.00752): u, delta, z [B, D, T], A [D, N], B, C [B, N, T],
    D, delta_bias [D] → [B, D, T], and with `return_last_state` the state [B, D, N] too.

    The last two parameters choose between ways to compute the same.
    """
    if delta_bias is not None:
        delta = delta + delta_bias.to(delta.dtype)[..., None]
    if delta_softplus:
        delta = F.softplus(delta)
    step = delta.transpose(1, 2)
    q, k, v, decay = _floats(
        C.transpose(1, 2).unsqueeze(2),
        B.transpose(1, 2).unsqueeze(2),
        (step * u.transpose(1, 2)).unsqueeze(-1),
        step.unsqueeze(-1) * A,
    )
    out, state = torch.ops.moec_frontend.linear_attention(q, k, v, decay, None, None, 1.0)
    out = out.squeeze(-1).transpose(1, 2).to(u.dtype)
    if D is not None:
        out = out + u * D[None, :, None]
    if z is not None:
        out = out * F.silu(z)
    return (out, state.squeeze(-1)) if return_last_state else out


def chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int = 1, D: Tensor | None = None,
    dt_bias: Tensor | None = None, initial_states: Tensor | None = None, dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")), return_final_states: bool = False,
) -> Any:  # fmt: skip
    """`mamba_chunk_scan_combined` of mamba-ssm (Mamba-2, arXiv:2405.21060): x [B, T, H, P], dt [B, T, H], A, D, dt_bias
    [H], B, C [B, T, G, N], states [B, H, P, N] → f32 [B, T, H, P], and with `return_final_states` the state too."""
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1]).float()
    x, q, k, state = _floats(x, C, B, None if initial_states is None else initial_states.transpose(2, 3))
    out, state = torch.ops.moec_frontend.linear_attention(q, k, x * dt.unsqueeze(-1), A.float() * dt, None, state, 1.0)
    if D is not None:
        out = out + D[..., None] * x
    return (out, state.transpose(2, 3)) if return_final_states else out


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, chunk_size: int = 64,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`chunk_gated_delta_rule`, `chunk_kda` and their recurrent forms of flash-linear-attention (Gated DeltaNet,
    arXiv:2412.06464; Kimi Delta Attention, arXiv:2510.26692): q, k [B, T, Hk, K], v [B, T, H, V], beta [B, T, H],
    g [B, T, H] or [B, T, H, K], state [B, H, K, V] → o [B, T, H, V] in the dtype of q, and the state in f32 or None.
    Queries are scaled by 1 / √K."""
    dtype = q.dtype
    q, k, v, g, beta, initial_state = _floats(q, k, v, g, beta, initial_state)
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    scale = q.shape[-1] ** -0.5
    out, state = torch.ops.moec_frontend.linear_attention(q, k, v, g, beta, initial_state, scale)
    return out.to(dtype), state if output_final_state else None


def padding_mask(
    config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, past_key_values: Any = None
) -> Tensor | None:
    """`create_recurrent_attention_mask` of transformers: of a mask [B, P + T] for inputs [B, T, E], the part [B, T] for
    the layers that pass a state on. A single token counts as one that is no padding, whatever the mask says."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    length = inputs_embeds.shape[1]
    mask = attention_mask[:, attention_mask.shape[1] - length :]
    places = torch.arange(length, device=mask.device)
    alone = (places == 0) & (places == length - 1)
    return torch.where(alone, torch.ones_like(mask), mask)


# by the name of the kernel, or of the function
CONTRACTS: dict[str, Callable[..., Any]] = {
    "selective_scan_fn": selective_scan,
    "mamba_chunk_scan_combined": chunk_scan,
    "chunk_gated_delta_rule": gated_delta_rule,
    "fused_recurrent_gated_delta_rule": gated_delta_rule,
    "chunk_kda": gated_delta_rule,
    "fused_recurrent_kda": gated_delta_rule,
    "create_recurrent_attention_mask": padding_mask,
}


class Lightning:
    """The forward of a lightning attention (arXiv:2401.04658) that goes through the sequence in blocks, without them.

    Such a module keeps the decay of its heads three times, for the queries, keys and pairs of places in a block, beside
    the rate that they come from; its query, key and value lie side by side for each head.
    """

    label = "lightning attention"
    BUFFERS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
    PARTS = ("qkv_proj", "out_proj", "output_gate", "norm", "act_fn")
    NUMBERS = ("block_size", "num_attention_heads", "head_dim", "layer_idx")

    @classmethod
    def fits(cls, module: torch.nn.Module) -> bool:
        """Whether a module has the structure."""
        named = dict(module.named_buffers(recurse=False))
        return (
            all(n in named for n in cls.BUFFERS)
            and all(callable(getattr(module, n, None)) for n in cls.PARTS)
            and all(isinstance(getattr(module, n, None), int) for n in cls.NUMBERS)
            and named["slope_rate"].numel() == module.num_attention_heads
        )

    def __init__(self, module: Any):
        self.module = module
        self.block: int = module.block_size

    def __call__(
        self, hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Tensor | None = None,
        past_key_values: Any = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """hidden_states [B, T, E], attention_mask [B, T] → [B, T, E] and the state [B, H, D, D]."""
        m = self.module
        batch, length, _ = hidden_states.shape
        heads, size = m.num_attention_heads, m.head_dim
        mixed = m.act_fn(m.qkv_proj(hidden_states))
        if attention_mask is not None:
            mixed = (mixed * attention_mask[:, :, None]).to(mixed.dtype)
        q, k, v = mixed.reshape(batch, length, heads, 3 * size).split(size, dim=3)
        state = None if past_key_values is None else past_key_values.get_linear_cache(m.layer_idx)
        decay = -m.slope_rate.reshape(heads).expand(batch, length, heads)
        out, last = torch.ops.moec_frontend.linear_attention(*_floats(q, k, v, decay), None, *_floats(state), 1.0)
        out, last = out.to(v.dtype), last.to(v.dtype)
        out = m.norm(out.reshape(batch, length, heads * size))
        out = m.out_proj(torch.sigmoid(m.output_gate(hidden_states)) * out)
        if past_key_values is not None:
            past_key_values.set_linear_cache(m.layer_idx, last)
        return out, last
