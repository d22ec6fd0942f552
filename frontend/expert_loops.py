"""Experts that a model goes through one after the other, by how many tokens each one got: the same without such sizes.

Each class here knows a module by what it holds, and has its forward with tokens sorted by expert and grouped products,
as transformers writes it where it lets the implementation be chosen.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch

Tensor = torch.Tensor


def grouped_experts(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """Σ over the k choices of weight · expert(x): x [T, D], experts i64[T, k], weights [T, k], gate_up [E, D, 2F], down
    [E, F, D] → [T, D]."""
    k = experts.shape[1]
    order = torch.sort(experts.reshape(-1))[1]
    ends = _ends(experts.reshape(-1), gate_up.shape[0])
    gate, up = torch.ops.moec_frontend.grouped_mm(x[order // k], gate_up, ends).chunk(2, dim=-1)
    y = torch.ops.moec_frontend.grouped_mm(activation(gate) * up, down, ends)
    y = y * weights.reshape(-1)[order].unsqueeze(-1)
    return y[torch.sort(order)[1]].view(-1, k, x.shape[1]).sum(1)


def _ends(experts: Tensor, count: int) -> Tensor:
    """Where the rows of each expert end, of those sorted by expert."""
    return torch.histc(experts.float(), bins=count, min=0, max=count - 1).cumsum(0).to(torch.int32)


def _numbers(module: Any, *names: str) -> bool:
    return all(isinstance(getattr(module, n, None), int) for n in names)


def _parameters(module: Any, **shapes: tuple[int, ...]) -> bool:
    found = dict(module.named_parameters(recurse=False)) if isinstance(module, torch.nn.Module) else {}
    return all(name in found and tuple(found[name].shape) == shape for name, shape in shapes.items())


def _takes(module: Any, *names: str) -> bool:
    """Whether a module's forward has these parameters."""
    try:
        return tuple(inspect.signature(module.forward).parameters) == names
    except (TypeError, ValueError):
        return False


class _StandIn:
    """What the structures below share: `fits` says whether a module has one, a call computes what the module does."""

    label: ClassVar[str]
    block: ClassVar[int] = 1

    def __init__(self, module: Any):
        self.module = module


class SplitGatedExperts(_StandIn):
    """Experts whose gates, ups and downs lie in three matrices [E · F, D], one expert's rows after the other's."""

    label = "a loop over experts"

    @classmethod
    def fits(cls, module: Any) -> bool:
        """Whether a module has the structure."""
        if not _numbers(module, "num_experts", "ffn_hidden_size", "hidden_size"):
            return False
        shape = (module.num_experts * module.ffn_hidden_size, module.hidden_size)
        inner = getattr(module, "mlp", None)
        return _parameters(inner, w1=shape, v1=shape, w2=shape) and callable(getattr(inner, "activation_fn", None))

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[B, S, D] or [T, D] → [B, S, D] or [T, 1, D]"""
        m = self.module
        gate, up, down = (w.view(m.num_experts, m.ffn_hidden_size, -1) for w in (m.mlp.w1, m.mlp.v1, m.mlp.w2))
        gate_up = torch.cat((gate, up), 1).transpose(1, 2)
        rows = hidden_states.reshape(-1, m.hidden_size)
        out = grouped_experts(rows, top_k_index, top_k_weights, gate_up, down, m.mlp.activation_fn)
        return out.view(hidden_states.shape[0], -1, m.hidden_size)


class ExpertsWithIdentity(_StandIn):
    """Stacked experts gate_up_proj [≥ E, 2F, D] and down_proj [E, D, F]; ids from E on leave a token as it is."""

    label = "a loop over experts"

    @classmethod
    def fits(cls, module: Any) -> bool:
        """Whether a module has the structure."""
        if not _numbers(module, "num_routed_experts", "total_experts", "intermediate_size", "hidden_size"):
            return False
        width, hidden = module.intermediate_size, module.hidden_size
        shapes = {
            "gate_up_proj": (module.total_experts, 2 * width, hidden),
            "down_proj": (module.num_routed_experts, hidden, width),
        }
        named = all(callable(getattr(module, n, None)) for n in ("act_fn", "identity_expert"))
        return named and module.num_routed_experts > 0 and _parameters(module, **shapes)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, D] → [T, D]"""
        m = self.module
        routed = top_k_index < m.num_routed_experts
        zero = torch.zeros_like(top_k_weights)
        gate_up = m.gate_up_proj[: m.num_routed_experts].transpose(1, 2)
        out = grouped_experts(
            hidden_states,
            torch.where(routed, top_k_index, torch.zeros_like(top_k_index)),
            torch.where(routed, top_k_weights, zero),
            gate_up,
            m.down_proj.transpose(1, 2),
            m.act_fn,
        )
        kept = torch.where(routed, zero, top_k_weights).sum(-1, keepdim=True)
        return (out + hidden_states * kept).to(hidden_states.dtype)


class CountingGate(_StandIn):
    """A top-k softmax gate that returns how many tokens each expert gets as a list of numbers; here as a tensor."""

    label = "a count of tokens for each expert"

    @classmethod
    def fits(cls, module: Any) -> bool:
        """Whether a module has the structure."""
        if not (_numbers(module, "num_experts", "input_size", "top_k") and _takes(module, "hidden_states")):
            return False
        return _parameters(getattr(module, "layer", None), weight=(module.num_experts, module.input_size))

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """[T, D] → rows sorted by expert as places in [T · k], their tokens, their weights, counts i64[E], logits
        [T, E]"""
        m = self.module
        logits = m.layer(hidden_states).float()
        best, chosen = logits.topk(m.top_k, dim=1)
        gates = torch.softmax(best, dim=1).type_as(hidden_states)
        flat = chosen.flatten()
        order = torch.sort(flat)[1]
        counts = torch.histc(flat.float(), bins=m.num_experts, min=0, max=m.num_experts - 1).long()
        return order, order // m.top_k, gates.flatten()[order], counts, logits


class ParallelLinear(_StandIn):
    """One product for each expert [O, I] with as many rows as it is told: weight [E, O, I]."""

    label = "a product for each expert"

    @classmethod
    def fits(cls, module: Any) -> bool:
        """Whether a module has the structure."""
        if not _numbers(module, "num_experts", "input_size", "output_size"):
            return False
        if not _takes(module, "inputs", "expert_size"):
            return False
        return _parameters(module, weight=(module.num_experts, module.output_size, module.input_size))

    def __call__(self, inputs: Tensor, expert_size: Any) -> Tensor:
        """inputs [R, I] sorted by expert, counts i64[E] → [R, O]"""
        if not isinstance(expert_size, Tensor):
            expert_size = torch.tensor(expert_size, device=inputs.device)
        ends = expert_size.cumsum(0).to(torch.int32)
        y: Tensor = torch.ops.moec_frontend.grouped_mm(inputs, self.module.weight.transpose(1, 2), ends)
        return y
