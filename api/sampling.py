"""How the next token is chosen from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from moec.ir import ArgumentTypeError, ArgumentValueError

_LEAST = torch.finfo(torch.float32).tiny  # of temperatures above 0: a divisor in f32


@dataclass(frozen=True)
class Sampling:
    """Draws from softmax(logits / temperature), cut to the `top_k` likeliest tokens (Fan et al. 2018) and then to the
    likeliest ones whose probabilities add up to `top_p` (nucleus sampling, Holtzman et al. 2020), at least one. A
    temperature of 0 takes the likeliest token, the lowest id among equal ones."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        given = _float(self.temperature)
        fits = given == 0 or _LEAST <= given < math.inf
        _check_number("temperature", self.temperature, fits, f"≥ 0 and finite, above 0 at least {_LEAST:.2g}")
        if self.top_k is not None:
            _check_int("top_k", self.top_k)
            if self.top_k < 1:
                raise ArgumentValueError(f"argument 'top_k' is {self.top_k}, expected ≥ 1", code="value")
        if self.top_p is not None:
            _check_number("top_p", self.top_p, 0 < _float(self.top_p) <= 1, "> 0 and ≤ 1")
        if self.seed is not None:
            _check_int("seed", self.seed)
            if not -(2**63) <= self.seed < 2**64:
                raise ArgumentValueError(f"argument 'seed' is {self.seed}, expected −2⁶³ up to 2⁶⁴ − 1", code="value")

    @staticmethod
    def of(temperature: Any = None, top_k: Any = None, top_p: Any = None, seed: Any = None) -> Sampling:
        """Greedy where nothing is given, else a draw at temperature 1 unless another is given. Raises ArgumentTypeError
        or ArgumentValueError."""
        if temperature is None:
            temperature = 0.0 if top_k is None and top_p is None and seed is None else 1.0
        return Sampling(temperature, top_k, top_p, seed)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def generator(self) -> torch.Generator:
        """What `choose` draws with: seeded, or from the system's entropy."""
        g = torch.Generator()
        if self.seed is None:
            g.seed()
        else:
            g.manual_seed(self.seed)
        return g

    def choose(self, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """logits [B, V] → tokens i64[B]. Raises ArgumentValueError where a row has no number to choose by."""
        if self.greedy:
            return logits.argmax(dim=-1)
        probabilities = self.probabilities(logits)
        if not bool((probabilities.isfinite().all(-1) & (probabilities.sum(-1) > 0)).all()):
            raise ArgumentValueError("the model's logits hold NaN or +∞: there is nothing to sample from", code="value")
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0] if len(logits) else logits.argmax(dim=-1)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """f32[B, V] that add up to 1 in each row."""
        scores = logits.to(torch.float32)
        # relative to the likeliest, so that nothing overflows at low temperatures
        scores = (scores - scores.amax(-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = scores.sort(dim=-1, descending=True, stable=True)
            probabilities = ordered.softmax(dim=-1)
            before = probabilities.cumsum(dim=-1) - probabilities
            cut = torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, before >= self.top_p)
            scores = scores.masked_fill(cut, -math.inf)
        return scores.softmax(dim=-1)


def _float(x: Any) -> float:
    try:
        return float(x) if isinstance(x, int | float) and not isinstance(x, bool) else math.nan
    except OverflowError:
        return math.inf


def _check_number(name: str, x: Any, fits: bool, expected: str) -> None:
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise ArgumentTypeError(f"argument {name!r} must be a number, got {type(x).__name__} {x!r}", code="arguments")
    if not fits:
        raise ArgumentValueError(f"argument {name!r} is {x}, expected {expected}", code="value")


def _check_int(name: str, x: Any) -> None:
    if isinstance(x, bool) or not isinstance(x, int):
        raise ArgumentTypeError(f"argument {name!r} must be an int, got {type(x).__name__} {x!r}", code="arguments")
