"""Routing decisions of two backends: which tokens chose other experts, and how near the tie was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from moec.ir import Node, Value

UNIT = 2.0**-24  # of f32, in which backends compute scores


@dataclass(frozen=True)
class RoutingFlip:
    """A token whose set of experts differs. `margin`: by how much the reference's selection scores preferred its
    own experts (or groups of experts) to the other's; `near_tie`: whether rounding explains it."""

    backend: str
    location: str
    layer: int | None
    token: int
    reference: tuple[int, ...]
    other: tuple[int, ...]
    margin: float
    near_tie: bool

    def __str__(self) -> str:
        kind = "near tie" if self.near_tie else "NOT a near tie"
        layer = "" if self.layer is None else f"layer {self.layer}, "
        return (
            f"{self.backend}: token {self.token} at {layer}{self.location} chose experts {list(self.other)}, the "
            f"reference {list(self.reference)} (margin {self.margin:.3g}, {kind})"
        )


class Pinned:
    """Watches a run of the reference (as the `tap` of `moec.ir.run`) and has it go on with the experts that another
    backend chose, wherever those differ by a near tie only.

    chosen: the other backend's experts by the results of `moe.route` nodes that hold them. logits: its logits, where
    they are known: what its own error explains is a near tie. Else `tolerance(node)` says what is.
    """

    def __init__(
        self,
        backend: str,
        chosen: Mapping[Value, torch.Tensor],
        logits: Mapping[Value, torch.Tensor],
        tolerance: Callable[[Node, torch.Tensor], float],
    ):
        self.backend = backend
        self.flips: list[RoutingFlip] = []
        self._chosen, self._logits, self._tolerance = chosen, logits, tolerance
        self._operands: dict[Value, torch.Tensor] = {}
        self._experts: dict[Node, torch.Tensor] = {}
        nodes = [e.producer for e in chosen if e.producer is not None]
        self._wanted = {v for node in nodes for v in node.operands if v is not None}

    def __call__(self, value: Value, tensor: torch.Tensor) -> torch.Tensor | None:
        if value in self._wanted:
            self._operands[value] = tensor
        node = value.producer
        if node is None or node.op != "moe.route" or node.results[1] not in self._chosen:
            return None
        if value.index == 0:  # the weights come before the experts they belong to
            return self._weights(node, tensor)
        return self._experts.get(node)

    def _operand(self, node: Node, name: str) -> torch.Tensor | None:
        v = node.operand(name)
        if v is None:
            return None
        return v.weight.load() if v.weight is not None else self._operands[v]

    def _weights(self, node: Node, own: torch.Tensor) -> torch.Tensor | None:
        logits, bias = self._operand(node, "logits"), self._operand(node, "bias")
        assert logits is not None
        other = self._logits.get(node.operands[0])  # type: ignore[arg-type]  # logits are no optional operand
        theirs = self._chosen[node.results[1]]
        met = meet(self.backend, node, logits, bias, theirs, other, self._tolerance(node, logits))
        if met is None:
            return None
        weights, self._experts[node], found = met
        self.flips += found
        return weights


def meet(
    backend: str,
    node: Node,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    theirs: torch.Tensor,
    their_logits: torch.Tensor | None,
    tolerance: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, list[RoutingFlip]] | None:
    """The results of a `moe.route` node with another's choice `theirs` i64[T, k] (and order) wherever rounding explains
    it: weights [T, k], experts i64[T, k], and the flips. None where the choice is the same."""
    route = node.opdef.instance([logits, bias], node.attrs)
    scores = route.scores()
    mine, theirs = route.choose(scores), theirs.to(torch.int64)
    if theirs.shape != mine.shape or torch.equal(mine, theirs):
        return None
    explained = _explained(logits, their_logits, scores, tolerance)
    found = flips(backend, node, logits, bias, mine, theirs, explained)
    unexplained = [f.token for f in found if not f.near_tie]
    experts = theirs.clone()
    experts[unexplained] = mine[unexplained]
    return route.weigh(scores, experts), experts, found


def _explained(
    logits: torch.Tensor, other: torch.Tensor | None, scores: torch.Tensor, otherwise: float
) -> torch.Tensor:
    """The margin that rounding explains for each token, [T]: what its logits differ by (a group's score adds two, and
    one score may have lost what another won), and rounding of the scores themselves."""
    if other is None or other.shape != logits.shape:
        return torch.full((len(logits),), otherwise, dtype=torch.float64)
    apart = (logits.double() - other.double()).abs().nan_to_num(nan=0.0, posinf=0.0)
    rounding = 16 * UNIT * scores.double().abs().nan_to_num(nan=0.0, posinf=0.0).clamp(min=1.0)
    return 4 * apart.amax(dim=-1) + rounding.amax(dim=-1)


def flips(
    backend: str,
    node: Node,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    reference: torch.Tensor,
    other: torch.Tensor,
    explained: torch.Tensor,
) -> list[RoutingFlip]:
    """Tokens of a `moe.route` node whose expert sets differ. logits [T, E], reference and other i64[T, k];
    explained [T]: the largest margin of selection scores that rounding explains."""
    differs = (reference.sort(dim=-1).values != other.sort(dim=-1).values).any(dim=-1)
    found = []
    where, layer = node.location.describe(), node.location.layer
    for token in differs.nonzero()[:, 0].tolist():
        mine, theirs = reference[token].tolist(), other[token].tolist()
        margin = _margin(node, logits[token], bias, set(mine), set(theirs))
        near = margin <= float(explained[token])
        found.append(RoutingFlip(backend, where, layer, token, tuple(mine), tuple(theirs), margin, near))
    return found


def _margin(node: Node, logits: torch.Tensor, bias: torch.Tensor | None, mine: set[int], theirs: set[int]) -> float:
    if len(theirs) < len(mine) or not theirs <= set(range(len(logits))):
        return float("inf")  # a repeated or unknown expert is no tie
    scores = node.opdef.instance([logits.double(), bias], node.attrs).scores()
    if bias is not None:
        scores = scores + bias.double()
    lost, won = sorted(mine - theirs), sorted(theirs - mine)
    count = node.attrs["n_group"]
    if count > 1:
        best = scores.reshape(count, -1).sort(dim=-1, descending=True).values
        group = best[:, 0] if node.attrs["group_score"] == "max" else best[:, :2].sum(-1)
        chosen = set(group.sort(descending=True, stable=True).indices[: node.attrs["topk_group"]].tolist())
        size = len(scores) // count
        outside = [e // size for e in won if e // size not in chosen]
        if outside:
            return float(min(group[g] for g in chosen) - min(group[g] for g in outside))
    return float(scores[lost].max() - scores[won].min())
