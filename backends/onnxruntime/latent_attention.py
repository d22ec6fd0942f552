"""Lowering of `attention.latent`: in the space of keys, or in that of the latents, whichever takes fewer operations for
the lengths of a run."""

from __future__ import annotations

import numpy as np
import onnx_ir as onnx

from moec.backends.onnxruntime.attention import allowed_by
from moec.backends.onnxruntime.backend import backend
from moec.backends.onnxruntime.emit import MICROSOFT, Emitter, given
from moec.backends.onnxruntime.types import carrier
from moec.ir import Builder, DType, Graph, Node, Value

_HEADS_FIRST = (0, 2, 1, 3)


@backend.lowers("attention.latent")
def latent(e: Emitter, node: Node) -> onnx.Value:
    q_nope, _, c, _, weight, mask = given(node)
    heads, dn, rank = q_nope.shape[2], q_nope.shape[3], c.shape[3]
    project = rank * (weight.shape[0] // heads)  # operations per head to project a latent, or a query and its result
    more = 2 * rank - weight.shape[0] // heads  # for each pair of a query and a latent
    s, t = e.sizes.resolve(q_nope.shape[1]), e.sizes.resolve(c.shape[2])
    if not rank or not dn or weight.shape[0] == heads * dn or (mask is not None and mask.dtype is not DType.BOOL):
        return _expanded(e, node)
    if isinstance(s, int) and isinstance(t, int):
        return _absorbed(e, node) if s * (project + t * more) < t * project else _expanded(e, node)
    before = _Ready(e, node)
    key = ("absorbed", s, t, project, more)
    if key not in e.memo:
        length, keys = e.sizes.one(s), e.sizes.one(t)
        each = e.op("Add", e.op("Mul", keys, np.array([more])), np.array([project]))
        e.memo[key] = e.op("Less", e.op("Mul", length, each), e.op("Mul", keys, np.array([project])))
    return e.either(e.memo[key], lambda: _absorbed(e, node, before), lambda: _expanded(e, node), node.result.dtype)


class _Ready:
    """What the layers of a model share, made outside of the branches; and the two projections of each head,
    [H, Dn, R] and [H, R, Dv]."""

    def __init__(self, e: Emitter, node: Node):
        q, r, c, _, weight, mask = given(node)
        b, s, heads, dn = q.shape
        rank, dv = c.shape[3], weight.shape[0] // heads - dn
        self.allowed, self.dead = allowed_by(e, s, c.shape[2], mask, node.attrs["causal"])
        for shape in (
            (b, heads, s, dn), (b, heads, s, r.shape[3]), (b, 1, heads * s, rank), (b, 1, heads * s, r.shape[3]),
            (b, heads, s, c.shape[2]), (b, 1, heads * s, c.shape[2]), (b, heads, s, rank),
        ):  # fmt: skip
            e.sizes.vector(shape)
        if weight.weight is not None:
            self.into = e.weight(
                weight, ".absorbed_keys", (heads, dn, rank), lambda w: w.reshape(heads, -1, rank)[:, :dn]
            )
            self.out = e.weight(
                weight, ".absorbed_values", (heads, rank, dv),
                lambda w: w.reshape(heads, -1, rank)[:, dn:].transpose(1, 2),
            )  # fmt: skip
        else:  # folded at load where it is stored in another form
            each = e.op("Reshape", e.value(weight), np.array([heads, dn + dv, rank]))
            self.into, values = e.op("Split", each, np.array([dn, dv]), outputs=2, axis=1)
            self.out = e.op("Transpose", values, perm=[0, 2, 1])


def _absorbed(e: Emitter, node: Node, ready: _Ready | None = None) -> onnx.Value:
    """Queries carried into the space of the latents, one key head for all, and the results carried out of it."""
    q_nope, q_rope, c, k_rope, weight, _ = given(node)
    ready = ready or _Ready(e, node)
    b, s, heads, dn = q_nope.shape
    (t, rank), dr, dtype = c.shape[2:], k_rope.shape[3], node.result.dtype
    rows = heads * s

    def by_head(x: Value) -> onnx.Value:
        shape = (x.shape[0], heads, s, x.shape[3])
        if e.sizes.resolve(s) == 1:
            return e.reshape(e.value(x), x.shape, shape)
        return e.op("Transpose", e.value(x), perm=list(_HEADS_FIRST))

    q = e.op("MatMul", by_head(q_nope), ready.into)
    q = e.reshape(q, (b, heads, s, rank), (b, 1, rows, rank))
    scores = _scores(e, q, e.value(c), node)
    if dr:
        rotated = e.reshape(by_head(q_rope), (b, heads, s, dr), (b, 1, rows, dr))
        scores = e.op("Add", scores, _scores(e, rotated, e.value(k_rope), node))
    scores = e.reshape(scores, (b, 1, rows, t), (b, heads, s, t))
    if ready.allowed is not None:
        scores = e.op("Where", ready.allowed, scores, e.scalar(-np.inf, dtype))
    weights = e.reshape(e.op("Softmax", scores, axis=-1), (b, heads, s, t), (b, 1, rows, t))
    y = e.reshape(e.op("MatMul", weights, e.value(c)), (b, 1, rows, rank), (b, heads, s, rank))
    y = e.op("MatMul", y, ready.out)
    if ready.dead is not None:  # its softmax is NaN
        y = e.op("Where", ready.dead, e.scalar(0, dtype), y)
    dv = weight.shape[0] // heads - dn
    if e.sizes.resolve(s) == 1:
        return e.reshape(y, (b, heads, s, dv), (b, s, heads, dv))
    return e.op("Transpose", y, perm=list(_HEADS_FIRST))


def _scores(e: Emitter, q: onnx.Value, k: onnx.Value, node: Node) -> onnx.Value:
    """q kᵀ · scale."""
    scale = node.attrs["scale"]
    if not e.options.portable and carrier(node.result.dtype) is DType.F32 and 0 < abs(scale) < np.inf:
        return e.op("FusedMatMul", q, k, domain=MICROSOFT, transB=1, alpha=scale)
    q = e.op("Mul", q, e.scalar(scale, carrier(node.result.dtype)))
    return e.op("MatMul", q, e.op("Transpose", k, perm=[0, 1, 3, 2]))


def _expanded(e: Emitter, node: Node) -> onnx.Value:
    """Keys and values of all heads out of the latents, and attention to those: what the op stands for."""
    from moec.backends.onnxruntime.lower import emit_nodes

    g = Graph("expanded")
    operands = [None if v is None else _inside(e, g, v) for v in given(node)]
    decompose = node.opdef.decompose
    assert decompose is not None
    y = decompose(node.opdef.instance(operands, node.attrs), Builder(g, location=node.location))
    with e.call(f"{e.scope_name}/expanded"):
        emit_nodes(e, g)
    return e.value(y)


def _inside(e: Emitter, g: Graph, v: Value) -> Value:
    """An operand in a graph of its own; weights with what they are stored as, so that products take that."""
    made = v.producer
    if v.weight is not None:
        return g.weights.get(v.weight.name) or g.add_weight(v.weight)
    if made is not None and made.op == "quant.dequantize" and all(o and o.weight is not None for o in made.operands):
        stored = [None if o is None else _inside(e, g, o) for o in made.operands]
        return Builder(g, location=made.location).op(made.op, stored, made.attrs)
    inner = g.add_input(f"operand_{len(g.inputs)}", v.type)
    e.bind(inner, e.value(v))
    return inner
