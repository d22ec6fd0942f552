"""Ties of `topk` as the IR breaks them, while a model is run to compare a program with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_TOPK = (torch.topk, torch.Tensor.topk)


class LowestFirst(TorchFunctionMode):
    """Of equal values the one with the lower index comes first. torch promises no order, and a row that is all zeros
    (that of a padding id, say) would send its token to other experts than the program does."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        if func not in _TOPK or "out" in kwargs:
            return func(*args, **kwargs)
        found = func(*args, **kwargs)  # the arguments are torch's to check
        x = args[0] if args else kwargs["input"]
        k, dim, largest = _arguments(*args[1:], **{n: v for n, v in kwargs.items() if n not in ("input", "self")})
        if x.dim() == 0:
            return found
        values, indices = torch.sort(x, dim=dim, descending=largest, stable=True)
        return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))


# names and defaults are those of torch.topk
def _arguments(k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[int, int, bool]:
    return k, dim, largest
