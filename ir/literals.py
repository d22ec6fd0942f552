"""Numbers as attributes have them: what an element type makes of one."""

from __future__ import annotations

from typing import Any

import torch

from moec.ir.errors import require
from moec.ir.types import DType


def check_literal(value: Any, dtype: DType, what: str = "value") -> None:
    """Raises CompileError unless `value` is a number that `dtype` holds."""
    require(isinstance(value, int | float), f"{what} must be a number, got {value!r}")
    require(dtype.holds(value), f"{dtype} does not hold {what} {value}")


def literal(value: Any, dtype: DType) -> Any:
    """The number that `dtype` has for `value`: rounded as a cast does (1e30 is infinite in f16)."""
    if dtype is DType.BOOL:
        return bool(value)
    if not dtype.is_float:
        return int(value)
    return torch.tensor(value, dtype=torch.float64).to(dtype.torch).item()
