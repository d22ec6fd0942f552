"""How rounding errors arise in each op: how many terms it adds up, how often it rounds, what errors are relative to."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from moec.ir import Node, Value
from moec.ir.dims import evaluate

# operands of these are larger than what is left of them
_ADDITIVE = {"math.add", "math.sub", "math.sin", "math.cos", "math.mod"}
_SUMS = {"math.sum", "math.mean", "math.cumsum"}
_NORMALISED = {"norm.rms", "norm.add_rms", "norm.layer", "math.softmax", "math.log_softmax"}
_ONE_SIGN = 16  # see `effective_length`
# f32 operations of a composed function one after the other, where there are more than two
_STEPS = {
    "math.sigmoid": 4, "math.tanh": 4, "math.erf": 4, "math.silu": 6, "math.gelu": 8, "math.softplus": 4,
    "math.log1p": 4, "math.swiglu": 8, "math.glu": 24, "math.pow": 4, "rope.apply": 3, "norm.rms": 5, "norm.add_rms": 6,
    "norm.layer": 12, "moe.route": 8, "moe.experts": 12, "quant.scaled_experts": 12, "math.softmax": 5,
    "math.log_softmax": 5, "recurrent.lstm": 24, "recurrent.gru": 24, "recurrent.rnn": 6,
}  # fmt: skip
# roundings to the stored dtype in an op's definition, where there is more than one
_ROUNDINGS = {
    "math.swiglu": 2, "math.glu": 2, "rope.apply": 3, "norm.rms": 2, "norm.add_rms": 3, "norm.layer": 2,
    "math.log_softmax": 2, "moe.route": 3, "moe.experts": 3, "quant.scaled_experts": 3,
}  # fmt: skip


def foreign(node: Node) -> bool:
    """Whether an op is declared outside of moec."""
    return node.opdef.cls.__module__.split(".")[0] != "moec"


def reduction_length(node: Node, binding: Mapping[str, int]) -> int:
    """How many terms a node adds up for one element of its result, at least 1."""

    def shape(i: int) -> list[int]:
        v = node.operands[i]
        return [] if v is None else [evaluate(s, binding) for s in v.shape]

    match node.op:
        case "linear.linear" | "linear.matmul" | "linear.grouped_matmul" | "quant.scaled_linear":
            return max(1, shape(0)[-1])
        case "attention.sdpa":
            return max(1, shape(0)[3] + shape(1)[2])
        case "attention.latent":
            return max(1, shape(0)[3] + 2 * shape(2)[3] + shape(3)[3] + shape(2)[2])
        case "attention.linear_attention":
            return max(1, shape(0)[3] + shape(0)[1])
        case "recurrent.lstm" | "recurrent.gru" | "recurrent.rnn":
            return max(1, shape(0)[2] + shape(2)[1]) * max(1, shape(0)[0])
        case "linear.conv":
            return max(1, math.prod(shape(1)[1:]))
        case "moe.experts" | "quant.scaled_experts":
            down = node.operand("down")
            return max(1, sum(evaluate(s, binding) for s in down.shape[1:]))
    if node.op.startswith("extern.aten__fft"):  # u·n: the angles of a transform that is a plain sum
        return max(1, *shape(0)) ** 2
    if node.op.startswith("extern."):  # what it adds up is not known: all that there is at most
        return max([1, *(math.prod(shape(i)) for i in range(len(node.operands)))])
    if foreign(node) and not node.opdef.elementwise:  # what it adds up is not known: any of its axes at most
        return max([1, *(s for i in range(len(node.operands)) for s in shape(i))])
    if node.op in _NORMALISED:
        return max(1, *shape(0)[-1:])
    if node.op == "math.cumsum":
        return max(1, *shape(0))
    if node.op == "moe.route":
        return max(1, shape(0)[-1])
    if node.op.startswith("math.") and node.operands and node.operands[0] is not None:
        size, result = math.prod(shape(0)), math.prod(evaluate(s, binding) for s in node.results[0].shape)
        return max(1, size // result) if result else 1
    return 1


def effective_length(node: Node, binding: Mapping[str, int]) -> float:
    """The K of a bound u·√K: terms added up and operations one after the other.

    A sum of K terms of one sign, in a row, is off by u·√(K / 3), the root of a mean of squares by half of that: what is
    divided by such a sum (norms, softmax) errs with √(K / 12), for which K / 16 stands.
    """
    k = reduction_length(node, binding)
    steps = _STEPS.get(node.op, 2)
    if node.op in _NORMALISED or node.op == "moe.route":
        return steps + k / _ONE_SIGN
    return max(k, steps) if node.op not in ("moe.experts", "quant.scaled_experts") else k + steps


def roundings(node: Node) -> int:
    """How often the values of a node are rounded to the stored dtype on the way, the result included."""
    if node.op.startswith("tensor."):
        return 0
    return _ROUNDINGS.get(node.op, 4 if foreign(node) and not node.opdef.elementwise else 1)


def scale_of(reference: torch.Tensor, node: Node | None, operands: Mapping[Value, torch.Tensor]) -> float:
    """Largest finite magnitude that the errors of a value are relative to: in the reference's tensor, and where an op
    cancels, in what it adds up."""
    own = largest(reference)
    if node is None:
        return own
    if node.op == "attention.sdpa":
        return _attention_scale(node, own, operands)
    if node.op == "math.silu":  # backends have it right to u of its operand, not of itself
        x = operands.get(node.operand("x"))
        return own if x is None else max(own, largest(x))
    if node.op == "math.swiglu":  # silu(gate) · up: silu is right to u of its operand
        gate, up = (operands.get(node.operand(name)) for name in ("gate", "up"))
        return own if gate is None or up is None else max(own, largest(gate.to(torch.float64) * up.to(torch.float64)))
    if node.op in _SUMS:
        return max(own, _sum_scale(node, operands))
    given = [operands[v] for v in node.operands if v is not None and v in operands]
    if node.op in _ADDITIVE or foreign(node):
        return max([own, *map(largest, given)])
    return own


def _sum_scale(node: Node, operands: Mapping[Value, torch.Tensor]) -> float:
    """The root of the sum of squares: how large a sum of such terms with random signs would be."""
    x = operands.get(node.operands[0]) if node.operands[0] is not None else None
    if x is None or not x.numel() or not x.is_floating_point():
        return 0.0
    axes = (node.attrs["axis"],) if node.op == "math.cumsum" else tuple(node.attrs["axes"])
    wide = x.to(torch.float64).nan_to_num(0.0, 0.0, 0.0)
    size = float(wide.square().sum(axes).sqrt().max()) if axes else float(wide.abs().max())
    return size / math.prod([x.shape[a] for a in axes]) if node.op == "math.mean" else size


def _attention_scale(node: Node, own: float, operands: Mapping[Value, torch.Tensor]) -> float:
    """An error of a score is a relative error of its exponential, and errs with |q|·|k|: about 0.4·u times that
    (operands in random order), of which `one_node` counts 8·u / 4."""
    q, k = (operands.get(node.operand(name)) for name in ("q", "k"))
    if q is None or k is None or not q.numel() or not k.numel():
        return own
    lengths = [float(x.to(torch.float64).nan_to_num(0.0, 0.0, 0.0).square().sum(-1).max()) for x in (q, k)]
    return own * (1.0 + math.sqrt(lengths[0] * lengths[1]) * abs(node.attrs["scale"]) / 4)


def largest(t: torch.Tensor) -> float:
    """Largest finite magnitude, 0 where there is none."""
    if not t.numel() or t.dtype == torch.bool or t.is_complex():
        return 0.0
    x = t.to(torch.float64).abs()
    x = x[torch.isfinite(x)]
    return float(x.max()) if x.numel() else 0.0
