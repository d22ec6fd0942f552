"""Comparisons of sizes, `is_causal=q_len > 1`, as arguments of torch functions that want plain bools."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moec.frontend.replaced import replaced

_PLACE = 5  # of is_causal


@contextmanager
def plain_bools() -> Iterator[None]:
    """Within: `scaled_dot_product_attention` asks whether the comparison holds. Everything else goes through as it
    is, from other threads too."""
    original: Any = torch.nn.functional.scaled_dot_product_attention

    def attention(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "is_causal" in kwargs:
            kwargs["is_causal"] = _plain(kwargs["is_causal"])
        result: torch.Tensor = original(*(_plain(a) if i == _PLACE else a for i, a in enumerate(args)), **kwargs)
        return result

    with replaced(torch.nn.functional, original.__name__, attention):
        yield


def _plain(x: Any) -> Any:
    return bool(x) if isinstance(x, torch.SymBool) else x
