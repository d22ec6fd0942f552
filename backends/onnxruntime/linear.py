"""Lowerings of `linear`."""

from __future__ import annotations

import numpy as np
import onnx_ir as onnx
import torch

from moec.backends.onnxruntime import nbits
from moec.backends.onnxruntime.backend import backend
from moec.backends.onnxruntime.emit import Emitter, given
from moec.backends.onnxruntime.quant import scaled_product
from moec.backends.onnxruntime.sizes import at_least
from moec.ir import DType, Node, Value


@backend.lowers("linear.matmul")
def matmul(e: Emitter, node: Node) -> onnx.Value:
    return e.op("MatMul", *e.operands(node))


def product(e: Emitter, x: onnx.Value, weight: Value) -> onnx.Value:
    """x times the transpose of weight [N, K]: a constant is stored as [K, N], so that MatMul packs it at load."""
    made = weight.producer
    if e.options.compact and made is not None and made.op == "quant.dequantize":
        return scaled_product(e, x, made.operand("codes"), made.operand("scale"), made.attrs["block"])
    if weight.weight is None:
        return e.op("MatMul", x, e.op("Transpose", e.value(weight), perm=[1, 0]))
    n, k = weight.shape

    def some(rows: torch.Tensor | None) -> onnx.Value:
        if rows is None:
            return e.weight(weight, ".T", (k, n), lambda t: t.T)
        return e.weight(weight, f".T.{int(rows[0])}", (k, len(rows)), lambda t: t[rows].T)

    return e.product(x, (n, k), some)


@backend.lowers("linear.linear")
def linear(e: Emitter, node: Node) -> onnx.Value:
    x, weight, bias = given(node)
    made = nbits.stored_weight(node)
    if made is not None and not e.options.portable:
        codes, scale, block = made.operand("codes"), made.operand("scale"), made.attrs["block"]
        e.count("linear.nbits")
        y = nbits.product(e, e.value(x), codes, scale, block, bias=None if bias is None else e.value(bias))
        return nbits.carrying(e, y, e.value(x), int(codes.shape[1])) if nbits.leaves(node.result) else y
    if nbits.is_integer(weight):
        e.count("linear.dequantised")
    y = product(e, e.value(x), weight)
    return y if bias is None else e.op("Add", y, e.value(bias))


def _conv_check(node: Node) -> str | None:
    return "ONNX Runtime has no f64 kernel for Conv" if given(node)[0].dtype is DType.F64 else None


@backend.lowers("linear.conv", check=_conv_check)
def conv(e: Emitter, node: Node) -> onnx.Value:
    """Where there may be no result along an axis, which Conv refuses, it makes one more, which is cut off."""
    a, sizes = node.attrs, node.result.shape[2:]
    short = [not at_least(e.sizes.resolve(n), 1) for n in sizes]
    after = [p + s if more else p for p, s, more in zip(a["after"], a["stride"], short, strict=True)]
    y = e.op(
        "Conv", *e.operands(node), strides=list(a["stride"]), pads=[*a["before"], *after],
        dilations=list(a["dilation"]), group=a["groups"],
    )  # fmt: skip
    axes = [i + 2 for i, more in enumerate(short) if more]
    if not axes:
        return y
    ends = e.sizes.vector([sizes[i - 2] for i in axes])
    return e.op("Slice", y, np.zeros(len(axes), np.int64), ends, np.array(axes))
