"""How far two backends may be apart, from dtype and reduction length.

A sum of K products in arithmetic of unit roundoff u has an error that grows as u·√K while the rounding errors are
independent (Higham, Accuracy and Stability of Numerical Algorithms, §2.8). The bound for a value is

    FACTOR · (u_acc · √(Σ K) + u_out · √(number of roundings)) · scale

where for one node (isolated) K is the node's reduction length and there is one rounding to the stored dtype, and end
to end both run over all nodes up to the value. u_acc is f32's unit (f64's for f64 values), u_out the stored dtype's,
scale the largest magnitude in the reference's tensor (and in the operands, where an op adds or subtracts). Integers
and booleans must be equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moec.ir import DType, Graph, Node, TensorType, Value
from moec.ir.dims import evaluate

FACTOR = 8.0
CODE_FLIPS = 0.01  # share of FP8 codes that may sit at a rounding midpoint
_UNIT = {DType.F64: 2.0**-53, DType.F32: 2.0**-24, DType.F16: 2.0**-11, DType.BF16: 2.0**-8}
_ADDITIVE = {"math.add", "math.sub", "math.mean", "math.sum", "math.cumsum", "math.sin", "math.cos", "math.mod"}


@dataclass(frozen=True)
class Bound:
    """Relative tolerance (to the scale) and its reason. A node that rounds to FP8 inside may flip a code at a
    midpoint, which shows in one row of its result: up to `loose` there, in `share` of the elements."""

    relative: float
    why: str
    loose: float = 0.0
    share: float = 0.0


def unit(dtype: DType) -> float:
    """Unit roundoff of a stored dtype; 0 for exact ones."""
    return _UNIT.get(dtype, 0.0)


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
        case "moe.experts" | "quant.scaled_experts":
            down = node.operand("down")
            return max(1, sum(evaluate(s, binding) for s in down.shape[1:]))
    if _foreign(node) and not node.opdef.elementwise:  # what it adds up is not known: any of its axes at most
        return max([1, *(s for i in range(len(node.operands)) for s in shape(i))])
    if node.op.startswith("norm.") or node.op in ("math.softmax", "math.log_softmax", "math.cumsum"):
        return max(1, *shape(0), 1)
    if node.op.startswith("math.") and node.operands and node.operands[0] is not None:
        size, result = math.prod(shape(0)), math.prod(evaluate(s, binding) for s in node.results[0].shape)
        return max(1, size // result) if result else 1
    return 1


def one_node(node: Node, value: Value, binding: Mapping[str, int]) -> Bound:
    """The bound of a node's result computed from equal operands."""
    k = reduction_length(node, binding)
    bound = _bound(value.type, k, 1, f"{node.op}: K = {k}")
    if node.op == "quant.scaled_experts" and node.attrs["group"] is not None:
        inner = node.operand("down").shape[2]
        loose = 2.0**-3 * 4 / math.sqrt(max(16, inner))  # one E4M3 step of a few of the f summed terms
        why = f"{bound.why}; a flipped inner code moves a row by {loose:.2g} at most, in {CODE_FLIPS:.0%} of them"
        return Bound(bound.relative, why, loose, CODE_FLIPS)
    return bound


def _foreign(node: Node) -> bool:
    """Whether an op is declared outside of moec."""
    return node.opdef.cls.__module__.split(".")[0] != "moec"


def end_to_end(graph: Graph, binding: Mapping[str, int]) -> dict[Value, Bound]:
    """The bounds of all node results and inputs when everything before them was computed by the backend too."""
    bounds = {v: _bound(v.type, 0, 0, "input") for v in graph.inputs}
    work = 0
    for roundings, node in enumerate(graph.nodes, 1):
        work += _work(node, graph, binding)
        for r in node.results:
            bounds[r] = _bound(r.type, work, roundings, f"ΣK = {work}")
    return bounds


def _work(node: Node, graph: Graph, binding: Mapping[str, int]) -> int:
    if node.op == "call.graph":
        callee = graph.functions[node.attrs["callee"]]
        inner = {name: evaluate(s, binding) for name, s in node.attrs["dims"]}
        return sum(_work(n, graph, inner) for n in callee.nodes)
    moves_data = node.op.startswith("tensor.")
    return 0 if moves_data else reduction_length(node, binding)


def _bound(type: TensorType, k: int, roundings: int, what: str) -> Bound:
    u_out = unit(type.dtype)
    u_acc = u_out if type.dtype is DType.F64 else unit(DType.F32)
    if u_out == 0.0:
        return Bound(0.0, f"{type.dtype} must be equal")
    if type.dtype in (DType.F32, DType.F64):  # accumulation already counts the stored dtype's roundings
        return Bound(FACTOR * u_acc * math.sqrt(max(1, k)), f"{type.dtype}, {what}")
    relative = FACTOR * (u_acc * math.sqrt(max(1, k)) + u_out * math.sqrt(max(1, roundings)))
    return Bound(relative, f"{type.dtype}, {what}, {roundings} roundings")


def scale_of(reference: torch.Tensor, node: Node | None, operands: Mapping[Value, torch.Tensor]) -> float:
    """Largest finite magnitude that the errors of a value are relative to."""
    if node is not None and node.op == "attention.sdpa":
        return _attention_scale(node, reference, operands)
    tensors = [reference]
    if node is not None and (node.op in _ADDITIVE or _foreign(node)):
        tensors += [operands[v] for v in node.operands if v is not None and v in operands]
    return max((_largest(t) for t in tensors), default=0.0)


def _attention_scale(node: Node, reference: torch.Tensor, operands: Mapping[Value, torch.Tensor]) -> float:
    """An error of a score is a relative error of its exponential: errors grow with the largest score."""
    q, k = (operands.get(node.operand(name)) for name in ("q", "k"))
    if q is None or k is None or not q.numel() or not k.numel():
        return _largest(reference)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.to(torch.float32) @ k.to(torch.float32).transpose(-1, -2)
    return _largest(reference) * (1.0 + _largest(scores) * abs(node.attrs["scale"]))


def _largest(t: torch.Tensor) -> float:
    if not t.numel() or t.dtype == torch.bool or t.is_complex():
        return 0.0
    x = t.to(torch.float64).abs()
    x = x[torch.isfinite(x)]
    return float(x.max()) if x.numel() else 0.0
