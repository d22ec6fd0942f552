"""Functions of one number as Chebyshev interpolants, fitted to torch's own float64 function."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

_DEGREE = 40
_NEGLIGIBLE = 1e-9  # of the largest coefficient: beyond float32

Oracle = Callable[[torch.Tensor], torch.Tensor]


@cache
def coefficients(f: Oracle) -> tuple[float, ...]:
    """Chebyshev coefficients of f on [−1, 1], lowest first, without a tail that float32 does not see."""

    def sampled(t: Any) -> Any:
        return f(torch.from_numpy(np.ascontiguousarray(t, np.float64))).numpy()

    found = np.polynomial.chebyshev.chebinterpolate(sampled, _DEGREE)
    last = int(np.nonzero(np.abs(found) > _NEGLIGIBLE * np.abs(found).max())[0][-1])
    return tuple(map(float, found[: last + 1]))


def evaluated(b: Any, f: Oracle, t: Any) -> Any:
    """f(t) for |t| ≤ 1, by Clenshaw's recurrence."""
    first, *rest = coefficients(f)
    double = b.add(t, t)
    after = last = None
    for c in reversed(rest):
        y = c if last is None else b.add(b.mul(double, last), c)
        y = y if after is None else b.sub(y, after)
        after, last = last, y if last is not None else b.add(b.mul(t, 0.0), c)
    if last is None:
        return b.add(b.mul(t, 0.0), first)
    y = b.add(b.mul(t, last), first)
    return y if after is None else b.sub(y, after)


def within(b: Any, x: Any, low: float, high: float) -> Any:
    """[low, high] → [−1, 1], numbers outside at its ends."""
    t = b.mul(b.sub(x, (low + high) / 2), 2 / (high - low))
    return b.clamp(t, low=-1.0, high=1.0)
