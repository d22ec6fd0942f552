"""What a graph leaves open on given inputs: how far apart evaluations of it are that all are right.

A backend rounds elsewhere, adds up in another order, and may carry narrow floats in wider ones. Behind a rounding, a
comparison or a division by nearly nothing that makes any difference. So a graph is evaluated as its reference says, in
float64, and several times with each node's result moved by what a node may be off (the idea of Monte Carlo arithmetic;
Parker 1997): what all of them agree on, a backend has to agree with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from moec.fuzzing.monte_carlo import Rounding
from moec.ir import CompileError, DType, Graph, Node, Value, run
from moec.ir.dims import evaluate
from moec.ir.interpreter import bind_inputs, evaluate_attr
from moec.ir.promote import promote
from moec.ir.runtime_sizes import introduces
from moec.op_errors import reduction_length
from moec.tolerance import unit

RUNS = 8
_MARGIN = 2.0  # a spread is seen in a few runs only


@dataclass(frozen=True)
class Spread:
    """`free`: elements that evaluations differ on beyond measure (one is infinite or NaN, or they are integers);
    `size`: the largest distance of any other element in two of them."""

    free: torch.Tensor
    size: float

    def explains(self, expected: torch.Tensor, got: torch.Tensor, tolerance: float) -> bool:
        """Whether the difference of two results is within `tolerance` and what is open."""
        if expected.shape != got.shape or expected.dtype != got.dtype:
            return False
        a, b = expected.to(torch.float64), got.to(torch.float64)
        error = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
        error = torch.where(error.isnan(), math.inf, error)[~self.free]
        return not error.numel() or float(error.max()) <= tolerance + _MARGIN * self.size


def spread(graph: Graph, inputs: Sequence[torch.Tensor], runs: int = RUNS) -> list[Spread] | None:
    """For each output; None where a moved evaluation fails, so that nothing is known."""
    expected = run(graph, inputs)
    found: list[list[torch.Tensor]] = []
    try:
        wide = promote(graph)
        found.append(run(wide, [t.to(v.dtype.torch) for v, t in zip(wide.inputs, inputs, strict=True)]))
        for seed in range(runs):
            found.append(_moved(graph, inputs, torch.Generator().manual_seed(seed), graph.functions))
    except CompileError:
        return None
    return [_between(e, [f[i] for f in found]) for i, e in enumerate(expected)]


def _between(expected: torch.Tensor, others: Sequence[torch.Tensor]) -> Spread:
    a = torch.stack([t.to(torch.float64) for t in (expected, *others)])
    same = ((a == a[:1]) | (a.isnan() & a[:1].isnan())).all(0)
    if not expected.is_floating_point():
        return Spread(torch.full_like(same, fill_value=not bool(same.all())), 0.0)
    finite = a.isfinite().all(0)
    distance = torch.where(finite & ~same, a.amax(0) - a.amin(0), 0.0)
    return Spread(~finite & ~same, float(distance.max()) if distance.numel() else 0.0)


def _moved(
    graph: Graph, inputs: Sequence[torch.Tensor], r: torch.Generator, functions: Mapping[str, Graph]
) -> list[torch.Tensor]:
    """One evaluation with every result of a node moved, those in called functions too."""
    binding = dict(bind_inputs(graph, inputs))
    values: dict[Value, torch.Tensor] = {}
    called: dict[Node, list[torch.Tensor]] = {}

    def move(value: Value, tensor: torch.Tensor) -> torch.Tensor | None:
        node = value.producer
        if node is not None and node.op == "call.graph":
            if node not in called:
                given = [v.weight.load() if v.weight is not None else values[v] for v in node.operands if v is not None]
                called[node] = _moved(functions[node.attrs["callee"]], given, r, functions)
            tensor = called[node][value.index]
        for symbol, (result, axis) in ({} if node is None else introduces(node)).items():
            if result is value:
                binding.setdefault(symbol, tensor.shape[axis])
        if node is not None and _computes(node) and value.dtype.is_wide_float and tensor.numel():
            tensor = _around(node, value, tensor, values, binding, r)
            if node.op == "math.cast" and value.dtype in (DType.F16, DType.BF16):
                tensor = _carried(node, tensor, values, r)
        values[value] = tensor
        return tensor

    return run(graph, inputs, tap=move, functions=functions)


def _computes(node: Node) -> bool:
    """Whether a node rounds by itself: it moves no data, and calls no graph."""
    return node.opdef.family not in ("tensor", "call")


def _around(
    node: Node,
    value: Value,
    tensor: torch.Tensor,
    values: Mapping[Value, torch.Tensor],
    binding: Mapping[str, int],
    r: torch.Generator,
) -> torch.Tensor:
    t = tensor.to(torch.float64)
    found = _evaluated(node, value, values, binding, torch.float64)
    exact = t if found is None else found
    off = (t - exact).abs().nan_to_num(0.0, 0.0)
    if node.opdef.elementwise and not bool(off.any()) and _is_exact(node, value, values, binding):
        return _signed(tensor, r)
    own = torch.float64 if found is not None else value.dtype.torch  # one that knows other floats is moved in those
    rounded = _evaluated(node, value, values, binding, own, Rounding(_accumulated(value), r))
    base = t if rounded is None else rounded.to(torch.float64)
    u = unit(value.dtype)
    amount = 2 * off + u * exact.abs()
    if not node.opdef.elementwise:
        most = torch.where(exact.isfinite(), exact.abs(), 0.0)
        most = most.amax(-1, keepdim=True) if most.dim() else most
        amount = amount + (u + 4 * _accumulated(value) * math.sqrt(reduction_length(node, binding))) * most
    noise = 2 * torch.rand(t.shape, generator=r, dtype=torch.float64) - 1
    stays = ~exact.isfinite() | ((base == 0) & (exact != 0))
    moved = torch.where(stays, base, base + noise * amount.nan_to_num(0.0, 0.0))
    return _signed(moved, r).to(tensor.dtype)


def _carried(node: Node, t: torch.Tensor, values: Mapping[Value, torch.Tensor], r: torch.Generator) -> torch.Tensor:
    """A cast with half of what underflows as the least number above 0: a carrier keeps it, and 0 · ∞ shows it."""
    (x,) = node.operands
    given = values.get(x) if x is not None else None
    if given is None or not given.is_floating_point():
        return t
    limits, before = torch.finfo(t.dtype), given.to(torch.float64)
    least = torch.copysign(torch.full_like(before, limits.smallest_normal * limits.eps), before).to(t.dtype)
    kept = torch.rand(t.shape, generator=r, dtype=torch.float64) < 0.5
    return torch.where(kept & (t == 0) & (before != 0), least, t)


def _accumulated(value: Value) -> float:
    """Unit roundoff of what a value is computed in."""
    return unit(DType.F64 if value.dtype is DType.F64 else DType.F32)


def _signed(t: torch.Tensor, r: torch.Generator) -> torch.Tensor:
    """With a sign drawn for every zero: backends take x + 0 and x · 1 for x, which is true of all but the sign of 0."""
    drawn = torch.where(torch.rand(t.shape, generator=r) < 0.5, 0.0, -0.0).to(t.dtype)
    return torch.where(t == 0, drawn, t)


def _is_exact(node: Node, value: Value, values: Mapping[Value, torch.Tensor], binding: Mapping[str, int]) -> bool:
    """Whether an elementwise node that shows no rounding has none: in float64 it shows none to float64, so what it
    makes of the operands' f32 values decides."""
    if value.dtype is not DType.F64:
        return True
    near = {v: t.float().double() if t.dtype == torch.float64 else t for v, t in values.items() if v in node.operands}
    narrow = _evaluated(node, value, near, binding, torch.float32)
    wide = _evaluated(node, value, near, binding, torch.float64)
    if narrow is None or wide is None:
        return False
    a = narrow.double()
    return bool(((a == wide) | (a.isnan() & wide.isnan())).all())


def _evaluated(
    node: Node,
    value: Value,
    values: Mapping[Value, torch.Tensor],
    binding: Mapping[str, int],
    dtype: torch.dtype,
    within: AbstractContextManager[Any] | None = None,
) -> torch.Tensor | None:
    """What the node gives for the same operands in `dtype` (computed `within` a context), or None where it knows other
    floats only."""
    operands: list[Any] = []
    for v in node.operands:
        t = None if v is None else v.weight.load() if v.weight is not None else values[v]
        operands.append(t.to(dtype) if t is not None and DType.of(t.dtype).is_wide_float else t)
    if node.op == "math.cast":  # a backend may carry narrow floats in wider ones
        return operands[0] if operands[0].dtype == dtype else None
    attrs = {k: evaluate_attr(a, binding) for k, a in node.attrs.items()}
    try:
        with within or nullcontext():
            found = node.opdef.instance(operands, attrs).reference()
    except (CompileError, RuntimeError, ValueError, TypeError, IndexError):
        return None
    result = found[value.index] if isinstance(found, list | tuple) else found
    wanted = tuple(evaluate(s, binding) for s in value.shape)
    return result if tuple(result.shape) == wanted and result.dtype == dtype else None
