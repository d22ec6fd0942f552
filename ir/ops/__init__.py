"""The op families. Importing this package declares every op."""

from moec.ir.ops import (
    attention,
    call,
    convolution,
    elementwise,
    extern_aten,
    latent_attention,
    linear,
    linear_attention,
    moe,
    norm,
    quant,
    recurrent,
    reduction,
    rope,
    tensor,
    write,
)

__all__ = [
    "attention", "call", "convolution", "elementwise", "extern_aten", "latent_attention", "linear", "linear_attention",
    "moe", "norm", "quant", "recurrent", "reduction", "rope", "tensor", "write",
]  # fmt: skip
