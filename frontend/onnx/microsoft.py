"""Operators of com.microsoft, as ONNX Runtime's optimiser and exporters write them."""

from __future__ import annotations

from moec.frontend.onnx.context import ImportContext
from moec.frontend.onnx.registry import MICROSOFT, imports
from moec.ir import Value


@imports("Gelu", domain=MICROSOFT)
def gelu(c: ImportContext, x: Value) -> Value:
    c.floats(x)
    return c.b.gelu(x)


@imports("BiasGelu", domain=MICROSOFT)
def bias_gelu(c: ImportContext, x: Value, bias: Value) -> Value:
    c.floats(x, bias)
    return c.b.gelu(c.b.add(x, bias))


@imports("FastGelu", domain=MICROSOFT)
def fast_gelu(c: ImportContext, x: Value, bias: Value | None = None) -> Value:
    c.floats(x, bias)
    return c.b.gelu(x if bias is None else c.b.add(x, bias), approximate="tanh")


@imports("QuickGelu", domain=MICROSOFT)
def quick_gelu(c: ImportContext, x: Value, *, alpha: float | None) -> Value:
    c.floats(x)
    alpha = 1.702 if alpha is None else alpha
    return c.b.silu(x) if alpha == 1.0 else c.b.mul(x, c.b.sigmoid(c.b.mul(x, alpha)))


def _rms(c: ImportContext, x: Value, weight: Value, epsilon: float | None) -> Value:
    c.floats(x, weight)
    return c.b.rms(x, weight, eps=1e-5 if epsilon is None else epsilon)


@imports("SimplifiedLayerNormalization", domain=MICROSOFT)
def simplified_layer_norm(c: ImportContext, x: Value, weight: Value, *, axis: int | None, epsilon: float | None,
                          stash_type: int | None) -> Value:  # fmt: skip
    if axis not in (None, -1, x.type.rank - 1):
        raise c.refuse(f"axis {axis}")
    return _rms(c, x, weight, epsilon)


@imports("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_simplified(c: ImportContext, x: Value, skip: Value, weight: Value, bias: Value | None = None, *,
                    epsilon: float | None) -> list[Value | None]:  # fmt: skip
    total = c.b.add(x, skip)
    total = total if bias is None else c.b.add(total, bias)
    return [_rms(c, total, weight, epsilon), None, None, total]


@imports("SkipLayerNormalization", domain=MICROSOFT)
def skip_layer_norm(c: ImportContext, x: Value, skip: Value, weight: Value, beta: Value | None = None,
                    bias: Value | None = None, *, epsilon: float | None) -> list[Value | None]:  # fmt: skip
    total = c.b.add(x, skip)
    total = total if bias is None else c.b.add(total, bias)
    eps = 1e-12 if epsilon is None else epsilon
    return [c.b.layer(total, weight, beta, eps=eps), None, None, total]


@imports("FusedMatMul", domain=MICROSOFT)
def fused_matmul(c: ImportContext, a: Value, b: Value, *, alpha: float | None, transA: int | None,
                 transB: int | None) -> Value:  # fmt: skip
    c.floats(a, b)
    swapped = [(*range(v.type.rank - 2), v.type.rank - 1, v.type.rank - 2) for v in (a, b)]
    a = c.transpose(a, swapped[0]) if transA else a
    b = c.transpose(b, swapped[1]) if transB else b
    y = c.b.matmul(a, b)
    return y if alpha in (None, 1.0) else c.b.mul(y, alpha)
