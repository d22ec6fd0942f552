"""The ONNX Runtime backend for CPU.

A lowering gets an `Emitter` and the node, appends ONNX operators, and returns the ONNX value of each result:

    @backend.lowers("my.soft_cap")
    def soft_cap(e: Emitter, node: Node) -> onnx_ir.Value:
        (x,), cap = e.operands(node), e.scalar(node.attrs["cap"], node.result.dtype)
        return e.op("Mul", e.op("Tanh", e.op("Div", x, cap)), cap)

bf16 and f16 values are f32 there, and are rounded where they leave the session.
"""

from moec.backends.onnxruntime import (  # noqa: F401  (each registers its lowerings)
    attention,
    elementwise,
    experts,
    extern,
    extern_aten,
    latent_attention,
    linear,
    linear_attention,
    norm,
    quant,
    recurrent,
    reduction,
    rope,
    route,
    tensor,
)
from moec.backends.onnxruntime.backend import backend
from moec.backends.onnxruntime.emit import Emitter

__all__ = ["Emitter", "backend"]
