"""Lowerings of `norm`."""

from __future__ import annotations

import numpy as np
import onnx_ir as onnx

from moec.backends.onnxruntime.backend import backend
from moec.backends.onnxruntime.emit import MICROSOFT, Emitter, given
from moec.backends.onnxruntime.types import carrier, numpy_type
from moec.ir import DType, Node, Value


def _scale(e: Emitter, x: Value, weight: Value | None) -> onnx.Value:
    """The weight, or ones (the operators ask for one). Raises CompileError on a symbolic width."""
    if weight is not None:
        return e.value(weight)
    width = x.shape[-1]
    if isinstance(width, int):
        return e.constant(np.ones(width, numpy_type(x.dtype)))
    return e.op("Expand", e.scalar(1, x.dtype), e.sizes.one(width))


@backend.lowers("norm.rms")
def rms(e: Emitter, node: Node) -> onnx.Value:
    x, weight = given(node)
    return e.op("RMSNormalization", e.value(x), _scale(e, x, weight), axis=-1, epsilon=node.attrs["eps"])


@backend.lowers("norm.add_rms")
def add_rms(e: Emitter, node: Node) -> tuple[onnx.Value, ...]:
    x, residual, weight = given(node)
    values, eps = (e.value(x), e.value(residual)), node.attrs["eps"]
    if not e.options.portable and carrier(x.dtype) is DType.F32 and x.type.rank in (2, 3):
        y, _mean, _inverse, total = e.op(
            "SkipSimplifiedLayerNormalization",
            *values,
            _scale(e, x, weight),
            outputs=4,
            domain=MICROSOFT,
            epsilon=eps,
        )
        _mean.name = _inverse.name = ""  # not computed
        return y, total
    total = e.op("Add", *values)
    return e.op("RMSNormalization", total, _scale(e, x, weight), axis=-1, epsilon=eps), total


@backend.lowers("norm.layer")
def layer(e: Emitter, node: Node) -> onnx.Value:
    x, weight, bias = given(node)
    rest = [] if bias is None else [e.value(bias)]
    return e.op("LayerNormalization", e.value(x), _scale(e, x, weight), *rest, axis=-1, epsilon=node.attrs["eps"])
