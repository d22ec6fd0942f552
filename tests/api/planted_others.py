"""Bugs in Triton kernels, written and generated (in the interpreter), and in an executable that lowers nothing."""

from __future__ import annotations

from typing import Any

import torch

from moec.backends.triton.runner import run
from moec.ir import Node

from .planted import Bug


def eps_forgotten(right: Any, op: Any) -> Any:
    return run("rms_norm", op.x, op.weight, eps=0.0)


def gates_swapped(right: Any, op: Any) -> str:
    return f"{op.gate} * silu({op.up})"


def not_normalised(right: Any, op: Any) -> Any:
    op.normalize = False
    return right(op)


def gates_interleaved(right: Any, op: Any) -> Any:
    op.interleaved = True
    return right(op)


def last_row_lost(right: Any, op: Any) -> Any:
    """A grid of whole blocks: the rows of the last, partial one are not written."""
    y = right(op).clone()
    rows = y.reshape(-1, y.shape[-1])
    rows[len(rows) // 4 * 4 :] = 0
    return y


TRITON = "transformers deepseek-v3"
KERNELS = [
    Bug("eps forgotten in a Triton kernel", TRITON, "norm.rms", eps_forgotten, inputs="few", backend="triton"),
    Bug("gate and up swapped in a generated kernel", TRITON, "math.swiglu", gates_swapped, inputs="few",
        backend="triton"),
    Bug("a Triton router that does not normalise", TRITON, "moe.route", not_normalised, inputs="few",
        backend="triton"),
    Bug("Triton experts that read gates interleaved", TRITON, "moe.experts", gates_interleaved, inputs="few",
        backend="triton"),
    Bug("last block of a Triton product not written", TRITON, "linear.linear", last_row_lost, inputs="few",
        backend="triton"),
]  # fmt: skip


def first_row_for_all(node: Node, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:1].expand(tensor.shape)


def odd_row_lost(node: Node, tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[-1] *= 0.99
    return tensor


def one_percent(node: Node, tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 1.01


EXECUTABLES = [
    Bug("attention of the first batch row for all", "mixtral-8x7b", "attention.sdpa", first_row_for_all,
        "model.layers.1", backend="reference"),
    Bug("last token of the experts one percent off", "deepseek-v2-lite", "moe.experts", odd_row_lost,
        "model.layers.2", backend="reference"),
    Bug("experts one percent off in bf16", "transformers mixtral bf16", "moe.experts", one_percent,
        backend="reference", modes=("isolated",)),
    Bug("attention one percent off in bf16", "transformers mixtral bf16", "attention.sdpa", one_percent,
        backend="reference", modes=("isolated",)),
]  # fmt: skip

BUGS = [*KERNELS, *EXECUTABLES]
