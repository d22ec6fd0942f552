"""Outputs of expert modules that are stacked, to the sum that an unrolled loop would build."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.ir import Value
from moec.passes.moe.axes import Axis, Named, Piece, flattened, named
from moec.passes.moe.combine import combine_matrix, expert_ids, flat, same_sizes
from moec.passes.moe.picked import either_way, name_picked, picked_outputs
from moec.passes.moe.stacked_mlp import NotExpertsError, moved
from moec.passes.moe.structure import producer, reshaped
from moec.passes.rewrite import Match, Refused, Rewrite


@dataclass
class Stack:
    """What is weighted: each expert's output [..., d], in order, and the routing."""

    outputs: list[Value]
    weights: Value
    experts: Value


@dataclass(frozen=True)
class StackedOutputs(Rewrite):
    """Σ over experts of stack(y_0, y_1, …) · combine matrix, or over choices of the chosen outputs · weights
    → Σ_e combine[:, e] · y_e, as a product or as a sum of products"""

    def pattern(self, p: Any, y: Any, factors: Any) -> Any:
        weighted = p.sum(p.mul(y, factors), axes=p.attr(), keepdim=p.attr())
        return p.either(weighted, p.matmul(y, factors))

    def when(self, m: Match) -> Refused | None:
        try:
            found(m)
        except NotExpertsError as e:
            return m.no(e.reason, at=e.at, far=not e.near)
        return None

    def replace(self, b: Any, m: Match) -> Any:
        stack = found(m)
        weights, experts = flat(b, stack.weights), expert_ids(b, stack.experts)
        num, lead = len(stack.outputs), stack.outputs[0].shape[:-1]
        weights = weights if weights.dtype == m.root.dtype else b.cast(weights, dtype=m.root.dtype)
        zeros = b.full(shape=(experts.shape[0], num), value=0.0, dtype=m.root.dtype)
        combine = b.scatter_elements(zeros, experts, weights, axis=-1, reduce="add")
        total: Value | None = None
        for e, y in enumerate(stack.outputs):
            column = reshaped(b, b.slice(combine, axis=-1, start=e, end=e + 1), (*lead, 1))
            total = b.mul(y, column) if total is None else b.add(total, b.mul(y, column))
        assert total is not None
        return reshaped(b, total, m.root.shape)


def found(m: Match) -> Stack:
    """The outputs that a match weighs. Raises NotExpertsError."""
    return either_way(m, _found)


def _found(m: Match, y: Value, factors: Value) -> Stack:
    whole, source = moved(y), moved(factors)
    assert whole is not None
    assert source is not None
    picked = picked_outputs(whole)
    stacked = moved(picked[0]) if picked is not None else whole
    concat = producer(stacked, "tensor.concat")
    routing = (source, picked[1]) if picked is not None else combine_matrix(source)
    if concat is None or routing is None or len(concat.operands) < 2:
        raise NotExpertsError("it is no stack of outputs that a routing weighs", y)
    outputs = [moved(o) for o in concat.operands]
    if any(v is None or v.type != outputs[0].type or v.type.rank < 2 for v in outputs):  # type: ignore[union-attr]  # None is tested first
        raise NotExpertsError("what is stacked differs in its type", y)
    if not same_sizes(*routing):
        raise NotExpertsError(f"weights are {routing[0].type}, expert ids {routing[1].type}", source, near=True)
    parts = [v for v in outputs if v is not None]
    names, tokens = Named(), named(*(f"token {i}" for i in range(parts[0].type.rank - 1)), sizes=parts[0].shape[:-1])
    if not _name_stack(names, concat, parts, flattened(tokens)):
        raise NotExpertsError("the outputs are not stacked along an axis of their own", stacked)
    num, k = len(parts), routing[1].shape[-1]
    if picked is not None:
        name_picked(names, flattened(tokens), num, whole, routing[1])
    last, size = ("choice", k) if picked is not None else ("expert", num)
    want = (*tokens, *named("out", sizes=parts[0].shape[-1:]))
    named_well = source.shape[-1] == size and names.name(source, flattened(tokens), last, size)
    axes = names.axes(m.root) if named_well else None
    if axes is None or flattened(axes) != flattened(want) or parts[0].dtype != m.root.dtype:
        text = f"the stacked outputs of {num} experts are not added up over the {last}s with factors {source.type}"
        raise NotExpertsError(text, m.root, near=True)
    return Stack(parts, *routing)


def _name_stack(names: Named, concat: Any, parts: list[Value], tokens: Axis) -> bool:
    """Names what is stacked [tokens, out], and the axis along which it is "expert"."""
    for v in parts:
        if not names.name(v, tokens, "out", v.shape[-1]):
            return False
    axes = [names.axes(o) for o in concat.operands]
    first = axes[0]
    if first is None or any(a != first for a in axes):
        return False
    at = concat.attrs["axis"] % len(first)
    if any(o.shape[at] != 1 for o in concat.operands):
        return False
    expert = (Piece("expert", len(parts)),)
    names.known[concat.results[0]] = tuple(expert if i == at else a for i, a in enumerate(first))
    return True
