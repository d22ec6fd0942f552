"""How far two backends may be apart, from dtype and reduction length: see docs/tolerances.md for the derivation.

A sum of K products in arithmetic of unit roundoff u has an error that grows as u·√K while the rounding errors are
independent (Higham, Accuracy and Stability of Numerical Algorithms, §2.8). Two limits follow for a value:

    largest error   ≤ (8 · u·√K + 3 · v·√R) · scale          one element that is wrong
    ‖error‖/‖value‖ ≤  2 · u·√K + 1 · v·√R                   all elements a little wrong

u is f32's unit (f64's for f64 values), in which everything is summed up; v the stored dtype's where that is narrower,
and R the number of roundings to it. For one node (isolated) K and R are the node's own, end to end they run over all
nodes up to the value. scale is the largest magnitude in the reference's tensor, and where an op cancels, what it
cancels: on that part one node has errors of u only. Integers and booleans must be equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from moec.ir import ArgumentTypeError, ArgumentValueError, DType, Graph, Node, TensorType, Value
from moec.ir.dims import evaluate
from moec.ir.runtime_sizes import introduces
from moec.op_errors import effective_length, largest, reduction_length, roundings, scale_of

__all__ = [
    "Bound", "Tolerance", "check_tolerance", "end_to_end", "given_bound", "limits", "one_node", "reduction_length",
    "scale_of", "unit", "unknown_length",
]  # fmt: skip

FACTOR, NARROW_FACTOR = 8.0, 3.0
TYPICAL, NARROW_TYPICAL = 2.0, 1.0
CODE_FLIPS = 0.01  # share of FP8 codes that may sit at a rounding midpoint
_UNIT = {DType.F64: 2.0**-53, DType.F32: 2.0**-24, DType.F16: 2.0**-11, DType.BF16: 2.0**-8}

# below these a backend may flush to zero, or has no digits left to be right in
_SMALLEST = {DType.F64: 2.0**-1022, DType.F32: 2.0**-126, DType.BF16: 2.0**-126, DType.F16: 2.0**-24}

Tolerance = float | Mapping[str, float] | None
"""What may be given in place of the derived tolerances: see `given_bound`."""


GIVEN = "given"  # how the reason of a user's tolerance begins


@dataclass(frozen=True)
class Bound:
    """A relative tolerance on the largest error (to the scale) and its reason. A node that rounds to FP8 inside may
    flip a code at a midpoint, which shows in one row of its result: up to `loose` there, in `share` of the elements.

    `typical`: the same on ‖error‖/‖value‖. `carried`: what counts in place of `relative` on the part of the scale that
    the value itself does not reach (None: `relative`)."""

    relative: float
    why: str
    loose: float = 0.0
    share: float = 0.0
    typical: float = math.inf
    carried: float | None = None


def unit(dtype: DType) -> float:
    """Unit roundoff of a stored dtype; 0 for exact ones."""
    return _UNIT.get(dtype, 0.0)


def limits(bound: Bound, reference: torch.Tensor, scale: float) -> tuple[float, float]:
    """(limit of the largest error, limit of ‖error‖/‖reference‖) of a tensor under a bound."""
    own = min(largest(reference), scale)
    carried = bound.relative if bound.carried is None else bound.carried
    most = bound.relative * own + carried * (scale - own)
    if not bound.relative:
        return most, math.inf
    most += _SMALLEST.get(DType.of(reference.dtype), 0.0)
    if not own:
        return most, math.inf
    # of a few elements, one decides; and what cancels counts as in the scale
    few = 1 + 2 / math.sqrt(reference.numel())
    return most, bound.typical * few * most / (bound.relative * own)


def one_node(node: Node, value: Value, binding: Mapping[str, int], coarse: tuple[float, int] | None = None) -> Bound:
    """The bound of a node's result computed from equal operands; `coarse`: see `Backend.coarse_sums`."""
    k = effective_length(node, binding)
    bound = _bound(value.type, k, _narrow(value.type) ** 2 * roundings(node), f"{node.op}: K = {k:.4g}")
    if bound.relative:
        u = unit(value.dtype if value.dtype is DType.F64 else DType.F32)
        bound = replace(bound, carried=FACTOR * u * (1.0 if node.op == "attention.sdpa" else math.sqrt(k)))
    if coarse is not None and bound.relative:
        more = coarse[0] * math.sqrt(min(k, coarse[1]))
        bound = replace(
            bound,
            relative=bound.relative + FACTOR * more,
            typical=bound.typical + TYPICAL * more,
            why=f"{bound.why}, {min(round(k), coarse[1])} of them added up in units of {coarse[0]:.2g}",
        )
    if node.op == "quant.scaled_experts" and node.attrs["group"] is not None:
        inner = node.operand("down").shape[2]
        loose = 2.0**-3 * 4 / math.sqrt(max(16, inner))  # one E4M3 step of a few of the f summed terms
        why = f"{bound.why}; a flipped inner code moves a row by {loose:.2g} at most, in {CODE_FLIPS:.0%} of them"
        if coarse is None:
            return replace(bound, why=why, loose=loose, share=CODE_FLIPS, typical=math.inf)
        # coarser sums flip more codes: an error of σ crosses a midpoint in σ / spacing of them, and E4M3's codes are
        # 2⁻³ to 2⁻⁴ of their value apart; a few times that, in f codes a row
        flipped = 32 * coarse[0] * math.sqrt(coarse[1] / 2)
        rows = min(1.0, inner * flipped)
        why = f"{bound.why}; flipped inner codes move {rows:.0%} of the rows by {loose:.2g} at most"
        typical = bound.typical + math.sqrt(flipped) * 2.0**-3.5
        return replace(bound, why=why, loose=loose, share=max(CODE_FLIPS, rows), typical=typical)
    return bound


def end_to_end(graph: Graph, binding: Mapping[str, int]) -> dict[Value, Bound]:
    """The bounds of all node results and inputs when everything before them was computed by the backend too."""
    bounds = {v: _bound(v.type, 0, _narrow(v.type) ** 2, "input") for v in graph.inputs}
    work, variance = 0.0, 0.0
    for node in graph.nodes:
        more, rounded = _work(node, graph, binding)
        work, variance = work + more, variance + rounded
        for r in node.results:
            bounds[r] = _bound(r.type, work, variance, f"ΣK = {work:.4g}")
    return bounds


def _work(node: Node, graph: Graph, binding: Mapping[str, int]) -> tuple[float, float]:
    """(K, sum of squared unit roundoffs of narrow dtypes) that a node adds."""
    if node.op == "call.graph":
        callee = graph.functions[node.attrs["callee"]]
        inner = _sizes(callee, {name: evaluate(s, binding) for name, s in node.attrs["dims"]})
        parts = [_work(n, callee, inner) for n in callee.nodes]
        return sum(p[0] for p in parts), sum(p[1] for p in parts)
    if node.op.startswith("tensor."):  # moves data
        return 0.0, 0.0
    narrow = max((_narrow(r.type) for r in node.results), default=0.0)
    return effective_length(node, binding), narrow**2 * roundings(node)


def _sizes(callee: Graph, binding: dict[str, int]) -> dict[str, int]:
    """`binding` and the sizes that a called graph's nodes bring in, which no value outside shows: taken as all the
    elements that such a node sees."""
    for node in callee.nodes:
        for symbol in introduces(node):
            seen = [math.prod(evaluate(s, binding) for s in v.shape) for v in node.operands if v is not None]
            binding.setdefault(symbol, max([1, *seen]))
    return binding


def _narrow(type: TensorType) -> float:
    """The unit roundoff of a dtype narrower than f32, else 0."""
    return unit(type.dtype) if type.dtype in (DType.F16, DType.BF16) else 0.0


def _bound(type: TensorType, k: float, variance: float, what: str) -> Bound:
    """variance: sum of the squared unit roundoffs of all roundings to narrow dtypes."""
    if unit(type.dtype) == 0.0:
        return Bound(0.0, f"{type.dtype} must be equal")
    summed = unit(DType.F64 if type.dtype is DType.F64 else DType.F32) * math.sqrt(max(1.0, k))
    rounded = math.sqrt(max(variance, _narrow(type) ** 2))
    if rounded:
        what = f"{what}, rounded by {rounded:.2g}"
    return Bound(
        FACTOR * summed + NARROW_FACTOR * rounded,
        f"{type.dtype}, {what}",
        typical=TYPICAL * summed + NARROW_TYPICAL * rounded,
    )


UNKNOWN = 1 << 16  # terms added up on the way to a saved output
ROUNDED = 16  # roundings to its dtype


def unknown_length(type: TensorType) -> Bound:
    """The bound of a value of which nothing is known but its type: as if 2¹⁶ terms led to it, in 16 roundings."""
    return _bound(type, UNKNOWN, ROUNDED * _narrow(type) ** 2, f"K not known, taken as {UNKNOWN}")


def check_tolerance(tolerance: Tolerance) -> None:
    """Raises ArgumentTypeError or ArgumentValueError for what `given_bound` does not take."""
    if tolerance is None:
        return
    named = tolerance if isinstance(tolerance, Mapping) else {"": tolerance}
    for name, x in named.items():
        what = f"tolerance[{name!r}]" if isinstance(tolerance, Mapping) else "tolerance"
        if not isinstance(name, str):
            raise ArgumentTypeError(
                f"a key of tolerance must be an op, a family, a module path or an output, got {name!r}",
                code="arguments",
            )
        if isinstance(x, bool) or not isinstance(x, int | float):
            hint = "a mapping gives one per op, module or output" if name == "" else None
            raise ArgumentTypeError(
                f"{what} must be a relative error, got {type(x).__name__} {x!r}", code="arguments", hint=hint
            )
        if not 0 <= x < math.inf:
            raise ArgumentValueError(f"{what} must be a finite number of at least 0, got {x}", code="arguments")


def given_bound(bound: Bound, tolerance: Tolerance, node: Node | None = None, output: str | None = None) -> Bound:
    """The bound that a user's tolerance makes of a derived one: a relative error to the scale, on the largest error
    alone.

    A float holds for all values. A mapping holds where a key names the output, the node's module or one that it is in
    ("model.layers.0"), its op ("norm.rms") or its family ("norm"), the first of these and the longest path first; ""
    names all that is left. None, or no key that fits: as derived. What must be equal (integers, FP8 codes) stays so.
    """
    if tolerance is None or not bound.relative:
        return bound
    if isinstance(tolerance, Mapping):
        key = next((k for k in _keys(node, output) if k in tolerance), None)
        if key is None:
            return bound
        return Bound(float(tolerance[key]), f"{GIVEN} for {key!r}" if key else GIVEN)
    return Bound(float(tolerance), GIVEN)


def _keys(node: Node | None, output: str | None) -> list[str]:
    keys = [] if output is None else [output]
    if node is not None:
        paths = {f.module for f in node.location.frames}
        inside = {".".join(p.split(".")[:i]) for p in paths for i in range(1, p.count(".") + 2)} - {""}
        keys += sorted(inside, key=lambda p: (-len(p), p))
        keys += [node.op, node.opdef.family]
    return [*keys, ""]
