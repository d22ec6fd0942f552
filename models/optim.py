"""Muon for the matrices, AdamW for the rest (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

import torch
from torch import Tensor

from moec.models.transformer import MoETransformer

# Polar Express (Amsel et al., arXiv:2505.16932): odd quintics a x + b x³ + c x⁵, one per iteration.
_QUINTICS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
)


def orthogonalise(stack: Tensor) -> Tensor:
    """Pushes the singular values of each matrix in f32[N, rows, cols] towards 1 by a Newton-Schulz iteration.

    Four steps leave them between about 0.4 and 1.6, and those under a hundredth of the greatest smaller; more steps
    would cost more than they bring.
    """
    tall = stack.shape[1] > stack.shape[2]
    x = stack.transpose(1, 2) if tall else stack
    x = x / (1.01 * x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in _QUINTICS:
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


class Muon:
    """Momentum whose matrix updates are orthogonalised. Stacked weights are treated matrix by matrix, gate and up
    halves apart. Matrices of one shape are handled in one batched product."""

    def __init__(self, parameters: list[tuple[str, Tensor]], momentum: float = 0.95, decay: float = 0.01) -> None:
        self.parameters = parameters
        self.momentum, self.decay = momentum, decay
        self.buffers = {name: torch.zeros_like(parameter) for name, parameter in parameters}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        groups: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for name, parameter in self.parameters:
            if parameter.grad is None:
                continue
            buffer = self.buffers[name].lerp_(parameter.grad, 1 - self.momentum)
            update = parameter.grad.lerp(buffer, self.momentum)  # Nesterov
            halves = 2 if name.endswith("gate_up_proj") else 1
            shape = (-1, parameter.shape[-2] // halves, parameter.shape[-1])
            groups.setdefault(shape[1:], []).append((parameter.view(shape), update.view(shape)))
        for (rows, cols), members in groups.items():
            update = orthogonalise(torch.cat([u for _, u in members]))
            # A matrix step of spectral norm about 1 changes outputs in proportion to sqrt(rows / cols).
            scale = lr * max(1.0, rows / cols) ** 0.5
            for (parameter, _), part in zip(members, update.split([p.shape[0] for p, _ in members]), strict=True):
                parameter.mul_(1 - lr * self.decay).sub_(part, alpha=scale)

    def state(self) -> dict[str, Tensor]:
        return {f"muon.{name}": buffer for name, buffer in self.buffers.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        for name, buffer in self.buffers.items():
            buffer.copy_(state[f"muon.{name}"])


class Adam:
    """AdamW with a factor on the rate for each parameter (Loshchilov and Hutter, arXiv:1711.05101), no decay."""

    def __init__(self, parameters: list[tuple[str, Tensor, float]], betas: tuple[float, float] = (0.9, 0.98)) -> None:
        self.parameters, self.betas, self.count = parameters, betas, 0
        self.first = {name: torch.zeros_like(p) for name, p, _ in parameters}
        self.second = {name: torch.zeros_like(p) for name, p, _ in parameters}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self.count += 1
        beta1, beta2 = self.betas
        correction = (1 - beta2**self.count) ** 0.5 / (1 - beta1**self.count)
        for name, parameter, factor in self.parameters:
            if parameter.grad is None:
                continue
            first = self.first[name].lerp_(parameter.grad, 1 - beta1)
            second = self.second[name].lerp_(parameter.grad.square(), 1 - beta2)
            parameter.addcdiv_(first, second.sqrt().add_(1e-8), value=-lr * factor * correction)

    def state(self) -> dict[str, Tensor]:
        moments = {f"adam.first.{n}": t for n, t in self.first.items()}
        moments |= {f"adam.second.{n}": t for n, t in self.second.items()}
        return moments | {"adam.count": torch.tensor(self.count)}

    def load(self, state: dict[str, Tensor]) -> None:
        self.count = int(state["adam.count"])
        for kind, moments in (("first", self.first), ("second", self.second)):
            for name, moment in moments.items():
                moment.copy_(state[f"adam.{kind}.{name}"])


def optimisers(model: MoETransformer) -> tuple[Muon, Adam]:
    """Muon for projections and experts; AdamW for embedding, output head, router and norms."""
    matrices: list[tuple[str, Tensor]] = []
    others: list[tuple[str, Tensor, float]] = []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name.endswith(("mlp.gate.weight", "lm_head.weight", "embed_tokens.weight")):
            others.append((name, parameter, 3.0 if name.endswith("embed_tokens.weight") else 1.0))
        else:
            matrices.append((name, parameter))
    return Muon(matrices), Adam(others)
