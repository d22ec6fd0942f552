"""Lowering of `attention.linear_attention`: ONNX Runtime's operator, or a Loop over the tokens.

A Scan would say the same as the Loop, but ONNX Runtime 1.32 ends the process where a Scan's state is empty.
"""

from __future__ import annotations

import onnx_ir as onnx

from moec.backends.onnxruntime.backend import backend
from moec.backends.onnxruntime.emit import MICROSOFT, Emitter, given
from moec.backends.onnxruntime.types import carrier, onnx_type
from moec.ir import Dim, DType, Node, Value

Shape = tuple[int | Dim, ...]


@backend.lowers("attention.linear_attention")
def linear_attention(e: Emitter, node: Node) -> tuple[onnx.Value, onnx.Value]:
    if e.options.portable or carrier(node.results[0].dtype) is not DType.F32:
        return _loop(e, node)
    return _operator(e, node)


def _operator(e: Emitter, node: Node) -> tuple[onnx.Value, onnx.Value]:
    """LinearAttention of com.microsoft: f32, heads packed into the last axis, a scale of 0 stands for 1/√K."""
    q, k, v, decay, beta, state = given(node)
    batch, length, heads, columns = v.shape

    def packed(x: Value | None) -> onnx.Value | None:
        if x is None or x.type.rank == 3:
            return None if x is None else e.value(x)
        return e.reshape(e.value(x), x.shape, (batch, length, x.shape[2] * x.shape[3]))

    scale = node.attrs["scale"]
    rule = {(False, False): "linear", (True, False): "gated", (False, True): "delta", (True, True): "gated_delta"}
    out, last = e.op(
        "LinearAttention", packed(q), packed(k), packed(v), None if state is None else e.value(state), packed(decay),
        packed(beta), outputs=2, domain=MICROSOFT, q_num_heads=q.shape[2], kv_num_heads=heads, scale=scale or 1.0,
        update_rule=rule[decay is not None, beta is not None],
    )  # fmt: skip
    out = e.reshape(out, (batch, length, heads * columns), v.shape)
    return out if scale else e.op("Mul", out, e.scalar(0.0, v.dtype)), last


def _loop(e: Emitter, node: Node) -> tuple[onnx.Value, onnx.Value]:
    """The definition; what a token brings is seen as [B, Hk, H / Hk, rows, columns], so that nothing is repeated."""
    q, k, v, decay, beta, state = given(node)
    batch, length, heads, columns = v.shape
    shared, rows = q.shape[2:]
    group = heads // shared
    dtype = onnx_type(v.dtype)

    def seen(x: Value, *shape: int) -> onnx.Value:
        return e.reshape(e.value(x), x.shape, (batch, length, *shape))

    queries = e.op("Mul", seen(q, shared, 1, 1, rows), e.scalar(node.attrs["scale"], carrier(v.dtype)))
    keys, values = seen(k, shared, 1, rows, 1), seen(v, shared, group, 1, columns)
    kept = rates = None
    if decay is not None:
        kept = e.op("Exp", seen(decay, shared, group, rows if decay.type.rank == 4 else 1, 1))
    if beta is not None:
        rates = seen(beta, shared, group, 1, 1)
    inner: Shape = (batch, shared, group, rows, columns)
    if state is None:
        first = e.op("Expand", e.scalar(0, v.dtype), e.sizes.vector(inner))
    else:
        first = e.reshape(e.value(state), state.shape, inner)
    count = e.sizes.scalar(length)
    step = onnx.Value(name=e.unique("step"), type=onnx.TensorType(onnx.DataType.INT64), shape=onnx.Shape([]))
    going = onnx.Value(name=e.unique("going"), type=onnx.TensorType(onnx.DataType.BOOL), shape=onnx.Shape([]))
    before = onnx.Value(name=e.unique("before"), type=onnx.TensorType(dtype), shape=onnx.Shape([None] * 5))
    with e.body() as nodes:

        def token(x: onnx.Value) -> onnx.Value:
            return e.op("Gather", x, step, axis=1)

        key, update = token(keys), token(values)
        decayed = before if kept is None else e.op("Mul", before, token(kept))
        if rates is not None:
            predicted = e.op("MatMul", e.op("Transpose", key, perm=[0, 1, 2, 4, 3]), decayed)
            update = e.op("Mul", e.op("Sub", update, predicted), token(rates))
        after = e.op("Add", decayed, e.op("Mul", key, update))
        read = e.op("MatMul", token(queries), after)
        still = e.op("Identity", going)
    still.type, still.shape = onnx.TensorType(onnx.DataType.BOOL), onnx.Shape([])
    after.type, after.shape = onnx.TensorType(dtype), onnx.Shape([None] * 5)
    read.type, read.shape = onnx.TensorType(dtype), onnx.Shape([None] * 5)
    body = onnx.Graph([step, going, before], [still, after, read], nodes=nodes, name=e.unique("each_token"))
    last, out = e.op("Loop", count, None, first, outputs=2, body=body)
    # after no token at all, the Loop gives an axis of 0 for every size it does not know
    out = e.op("Reshape", out, e.sizes.vector((length, batch, heads, columns)), allowzero=1)
    return e.op("Transpose", out, perm=[1, 0, 2, 3]), e.reshape(last, inner, (batch, heads, rows, columns))
