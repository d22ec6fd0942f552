"""`torch.nn.functional.grouped_mm` while tracing: torch's shape inference takes bfloat16 only, its kernels more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@torch.library.custom_op("moec_frontend::grouped_mm", mutates_args=())
def _grouped_mm(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.grouped_mm(rows, weight, offs=ends)


@_grouped_mm.register_fake
def _(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    torch._check(rows.shape[1] == weight.shape[1], lambda: f"rows {rows.shape} do not fit weight {weight.shape}")
    return rows.new_empty(rows.shape[0], weight.shape[2])


class GroupedMMMode(TorchFunctionMode):
    """Replaces calls on rows [R, K] with weights [E, K, N] in other dtypes than bfloat16 by an op of ours."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        if func in (torch.nn.functional.grouped_mm, torch._grouped_mm):
            given = dict(zip(("mat_a", "mat_b"), args, strict=False)) | dict(kwargs)
            rows: Any = given.get("mat_a")
            weight: Any = given.get("mat_b")
            ends = given.get("offs")
            plain = given.get("bias") is None and given.get("out_dtype") is None and len(args) <= 2
            tensors = isinstance(rows, torch.Tensor) and isinstance(weight, torch.Tensor) and ends is not None
            if plain and tensors and rows.dtype != torch.bfloat16 and (rows.dim(), weight.dim()) == (2, 3):
                return torch.ops.moec_frontend.grouped_mm(rows, weight, ends)
        return func(*args, **kwargs)
