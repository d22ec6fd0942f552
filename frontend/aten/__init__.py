"""Lowerings of ATen ops to IR ops; importing this package registers all of them."""

from moec.frontend.aten import (
    attention,
    convolution,
    create,
    elementwise,
    index,
    linear,
    memory,
    moe,
    norm,
    ranking,
    recurrent,
    reduction,
    scan,
    shape,
)
from moec.frontend.aten.registry import LOWERINGS, lowers

__all__ = [
    "LOWERINGS", "attention", "convolution", "create", "elementwise", "index", "linear", "lowers", "memory", "moe",
    "norm", "ranking", "recurrent", "reduction", "scan", "shape",
]  # fmt: skip
