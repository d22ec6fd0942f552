"""Stacked experts by einsum, batched products and gathers, to `moe.experts`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.ir import Value, Weight
from moec.passes.moe.axes import Piece, flattened
from moec.passes.moe.combine import combine_matrix, expert_ids, flat
from moec.passes.moe.picked import either_way, name_picked, picked_outputs
from moec.passes.moe.stacked_mlp import Layer, NotExpertsError, StackedMLP, moved
from moec.passes.moe.structure import narrowed, reshaped
from moec.passes.rewrite import Match, Refused, Rewrite
from moec.passes.rewriting.match_values import describe


@dataclass
class Found:
    """The MLP, and the routing by which its outputs are added up."""

    mlp: StackedMLP
    weights: Value
    experts: Value


@dataclass(frozen=True)
class StackedExperts(Rewrite):
    """Σ weights · mlp(x) with stacked weights [E, …] → moe.experts, by a product or a sum of products, in one of three
    forms: every expert on every token, weighted by the routing's combine matrix; the same, of which the chosen experts'
    outputs are gathered; or the chosen experts' weights gathered, one MLP for each token and choice.

    Which axes are contracted is followed by name (see `axes`), so that transposes and reshapes in between are free.
    """

    def pattern(self, p: Any, y: Any, factors: Any) -> Any:
        weighted = p.sum(p.mul(y, factors), axes=p.attr(), keepdim=p.attr())
        # of one choice there is nothing to add up
        return p.either(weighted, p.matmul(y, factors), p.mul(y, factors))

    def when(self, m: Match) -> Refused | None:
        try:
            found(m)
        except NotExpertsError as e:
            product = m.root.producer is not None and m.root.producer.op == "math.mul"
            return m.no(e.reason, at=e.at, far=product or not e.near)
        return None

    def replace(self, b: Any, m: Match) -> Any:
        said = found(m)
        mlp, x = said.mlp, said.mlp.x
        assert x is not None  # when() named it
        weights, experts = flat(b, said.weights), expert_ids(b, said.experts)
        matrices = _joined(b, mlp.first), _joined(b, (mlp.down,))
        biases = _biases(b, mlp.first), _biases(b, (mlp.down,))
        rows = reshaped(b, x, (experts.shape[0], x.shape[-1]))
        weights = narrowed(b, weights, m.factors.dtype)
        y = b.moe_experts(rows, weights, experts, *matrices, *biases, **mlp.unit_attrs())
        return reshaped(b, y, m.root.shape)


def found(m: Match) -> Found:
    """The experts that a match is. Raises NotExpertsError."""
    return either_way(m, _found)


def _found(m: Match, y: Value, factors: Value) -> Found:
    outputs, source = moved(y), moved(factors)
    assert outputs is not None
    assert source is not None
    picked = picked_outputs(outputs)
    mlp = StackedMLP.of(picked[0] if picked else outputs)
    ids = mlp.experts()
    routing = combine_matrix(source) if ids is None and picked is None else None
    if ids is not None and picked is not None:
        raise NotExpertsError("chosen experts' outputs are gathered once more", outputs, near=True)
    chosen = picked[1] if picked is not None else ids
    if routing is None and chosen is None:
        text = f"all experts' outputs are multiplied by {describe(source)} {source.type}, expected a routing's weights"
        raise NotExpertsError(f"{text} scattered over zeros, or Σ one_hot(experts) · weights", source, near=True)
    weights, experts = routing or (source, chosen)
    assert experts is not None
    if experts.type.rank < 2 or weights.type.numel != experts.type.numel or weights.shape[-1] != experts.shape[-1]:
        raise NotExpertsError(f"weights are {weights.type}, expert ids {experts.type}", weights, near=True)
    mlp.name_axes(experts if ids is not None else None)
    names = mlp.names
    if picked is not None:
        name_picked(names, mlp.tokens, mlp.num, outputs, experts)
    last, size = ("expert", mlp.num) if routing is not None else ("choice", experts.shape[-1])
    names.known.pop(factors, None)
    if source.shape[-1] != size or not names.name(source, mlp.tokens, last, size):
        text = f"the factors {source.type} are not [tokens, {last}s] of {mlp.num} experts"
        raise NotExpertsError(text, source, near=True)
    _check_sum(m, mlp, last, size)
    return Found(mlp, weights, experts)


def _check_sum(m: Match, mlp: StackedMLP, last: str, size: Any) -> None:
    """That the root adds up over experts or choices, and is [tokens, channels] of x. Raises NotExpertsError."""
    x, (e, into, out) = mlp.x, mlp.down.table.weight.shape
    assert x is not None
    names = mlp.names
    axes = names.axes(m.root)
    width = x.shape[-1]
    want = flattened((mlp.tokens, () if width == 1 else (Piece("out", width),)))
    if axes is None or flattened(axes) != want or {into, out} != {width, *mlp.unit.shape[-1:]}:
        text = f"the sum is {m.root.type} of x {x.type}: not over the {last}s, or not of each token's own"
        raise NotExpertsError(text, m.root, near=True)
    sizes = {t.weight.shape[0] for t in mlp.tables}
    if sizes != {e} or m.root.dtype != x.dtype or any(t.weight.dtype != x.dtype for t in mlp.tables):
        raise NotExpertsError(f"experts by table {sorted(sizes)}, dtypes {x.dtype} and {m.root.dtype}", x, near=True)
    for layers in (mlp.first, (mlp.down,)):
        if len({layer.bias is None for layer in layers}) > 1:
            raise NotExpertsError("of gate and up one has a bias", mlp.unit, near=True)


def _joined(b: Any, layers: Sequence[Layer]) -> Value:
    """[E, N, K] of one layer, or of gate and up side by side; a view where the model stores it so."""
    weights = [layer.table.weight for layer in layers]
    flipped = [layer.flipped for layer in layers]
    if len(weights) == 1 and not flipped[0]:
        return weights[0]
    stored = [v.weight for v in weights if v.weight is not None]

    def compute() -> torch.Tensor:
        parts = [_as_rows(w, f) for w, f in zip(stored, flipped, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    e, rows, columns = weights[0].shape
    rows, columns = (columns, rows) if flipped[0] else (rows, columns)
    kind = "transposed" if len(weights) == 1 else "joined"
    type = stored[0].type.with_shape((e, rows * len(weights), columns))
    return b.weight(f"{stored[0].name}.{kind}", compute, type)


def _as_rows(weight: Weight, flipped: bool) -> torch.Tensor:
    data = weight.load()
    return data.transpose(1, 2) if flipped else data


def _biases(b: Any, layers: Sequence[Layer]) -> Value | None:
    """[E, N] of the layers' biases side by side; None where there are none."""
    values = [layer.bias.weight for layer in layers if layer.bias is not None]
    if not values:
        return None
    if len(values) == 1 and values[0].type.rank == 2:
        return values[0]
    stored = [v.weight for v in values if v.weight is not None]

    def compute() -> torch.Tensor:
        return torch.cat([w.load().flatten(1) for w in stored], 1)

    width = sum(int(v.shape[-1]) for v in values)
    return b.weight(f"{stored[0].name}.joined", compute, stored[0].type.with_shape((values[0].shape[0], width)))
