"""The ONNX Runtime backend for CPU."""

from moec.backends.onnxruntime import (  # noqa: F401  (each registers its lowerings)
    attention,
    elementwise,
    experts,
    linear,
    norm,
    quant,
    reduction,
    rope,
    route,
    tensor,
)
from moec.backends.onnxruntime.backend import backend

__all__ = ["backend"]
