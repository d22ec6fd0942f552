"""How far two tensors are apart, against a bound."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moec.ir import DType
from moec.tolerance import CODE_FLIPS, Bound, limits

_CHUNK = 1 << 22  # elements that are widened to float64 at once


@dataclass(frozen=True)
class Difference:
    """Errors between two tensors against a tolerance.

    `max_error`, `mean_error`, `tolerance` are absolute (FP8 codes: in steps of the format); `relative_error` is
    ‖other − reference‖₂ / ‖reference‖₂ and `cosine` the angle's cosine, over the elements that are finite in both.
    Where the relative error is beyond its limit, `tolerance` is what the largest error would be at that limit.
    """

    max_error: float
    mean_error: float
    tolerance: float
    ok: bool
    why: str = ""
    relative_error: float = 0.0
    cosine: float = 1.0

    @property
    def badness(self) -> float:
        """max_error in units of the tolerance."""
        return self.max_error / self.tolerance if self.tolerance else (math.inf if self.max_error else 0.0)


def difference(reference: torch.Tensor, other: torch.Tensor, bound: Bound, scale: float) -> Difference:
    """Compare under a bound; `scale` is what its relative tolerance is relative to. NaN equals NaN, an infinity only
    itself; another shape or class of dtype is infinitely far."""
    if reference.shape != other.shape or reference.is_floating_point() != other.is_floating_point():
        got = f"{DType.of(other.dtype)}{list(other.shape)} for {DType.of(reference.dtype)}{list(reference.shape)}"
        return Difference(math.inf, math.inf, 0.0, False, got, math.inf, 0.0)
    if reference.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) and other.dtype == reference.dtype:
        return _codes(reference, other)
    tolerance, typical = limits(bound, reference, scale)
    found = _Errors()
    for a, b in _chunks(reference, other):
        found.add(a, b, tolerance)
    ok = found.worst <= tolerance
    if not ok and bound.loose:
        allowed = max(bound.share * reference.numel(), reference.shape[-1] if reference.dim() else 1)
        ok = found.worst <= bound.loose * scale and found.beyond <= allowed
    why = bound.why
    if ok and found.relative > typical:
        ok, why = False, f"{why}; relative error {found.relative:.3g}, at most {typical:.3g}"
        tolerance = min(tolerance, found.worst * typical / found.relative)
    mean = found.total / max(1, reference.numel())
    return Difference(found.worst, mean, tolerance, ok, why, found.relative, found.cosine)


@dataclass
class _Errors:
    worst: float = 0.0
    total: float = 0.0
    beyond: int = 0
    squares: float = 0.0  # Σ (a − b)², Σ a², Σ b², Σ a·b over finite elements
    norm_a: float = 0.0
    norm_b: float = 0.0
    dot: float = 0.0

    def add(self, a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
        same = (a == b) | (a.isnan() & b.isnan())
        error = torch.where(same, 0.0, (a - b).abs())
        error = torch.where(error.isnan() | a.isinf() & ~same, math.inf, error)
        self.worst = max(self.worst, float(error.max()))
        self.total += float(error.sum())
        self.beyond += int((error > tolerance).sum())
        finite = a.isfinite() & b.isfinite()
        a, b = torch.where(finite, a, 0.0), torch.where(finite, b, 0.0)
        self.squares += float((a - b).square().sum())
        self.norm_a += float(a.square().sum())
        self.norm_b += float(b.square().sum())
        self.dot += float((a * b).sum())

    @property
    def relative(self) -> float:
        if not self.norm_a:
            return math.inf if self.squares else 0.0
        return math.sqrt(self.squares / self.norm_a)

    @property
    def cosine(self) -> float:
        if not self.norm_a or not self.norm_b:
            return 1.0 if self.norm_a == self.norm_b else 0.0
        return max(-1.0, min(1.0, self.dot / (math.sqrt(self.norm_a) * math.sqrt(self.norm_b))))


def _chunks(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both in float64, a bounded number of elements at a time. Integers beyond 2⁵³ that differ stay different."""
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    a, b = a.detach().reshape(-1).cpu(), b.detach().reshape(-1).cpu()
    for i in range(0, a.numel(), _CHUNK):
        x, y = a[i : i + _CHUNK], b[i : i + _CHUNK]
        wide_x, wide_y = x.to(torch.float64), y.to(torch.float64)
        if not x.is_floating_point():  # float64 may merge neighbours
            wide_y = torch.where((x != y) & (wide_x == wide_y), math.inf, wide_y)
        yield wide_x, wide_y


def _codes(reference: torch.Tensor, other: torch.Tensor) -> Difference:
    """FP8 codes in steps of the format: one step at a rounding midpoint, rarely, is allowed."""
    steps = (_ordinal(reference) - _ordinal(other)).abs().to(torch.float64)
    nan = reference.to(torch.float32).isnan(), other.to(torch.float32).isnan()
    steps = torch.where(nan[0] & nan[1], 0.0, torch.where(nan[0] | nan[1], math.inf, steps))
    if not steps.numel():
        return Difference(0.0, 0.0, 1.0, True, "codes: one step")
    share = float((steps > 0).to(torch.float64).mean())
    allowed = max(CODE_FLIPS, 1 / steps.numel())
    ok = float(steps.max()) <= 1 and share <= allowed
    why = f"codes: one step at a midpoint in {CODE_FLIPS:.0%} at most"
    return Difference(float(steps.max()), float(steps.mean()), 1.0, ok, why, *_agreement(reference, other))


def _agreement(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """(relative error, cosine) of the values of codes."""
    found = _Errors()
    for x, y in _chunks(a, b):
        found.add(x, y, 0.0)
    return found.relative, found.cosine


def _ordinal(codes: torch.Tensor) -> torch.Tensor:
    """FP8 codes as integers in the order of their values (both zeros are 0)."""
    bits = codes.contiguous().view(torch.uint8).to(torch.int32)
    magnitude = bits & 0x7F
    return torch.where(bits >= 0x80, -magnitude, magnitude)
