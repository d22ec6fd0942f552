"""Numbers as configs say them."""

from __future__ import annotations

import math
from typing import Any

LARGEST = 2**31 - 1  # of counts and sizes


def finite(value: Any) -> float | None:
    """A number as a float; None for anything else, and for what no finite float is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
