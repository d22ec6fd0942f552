"""Routing decisions of two backends: which tokens chose other experts, and how near the tie was."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moec.ir import Node


@dataclass(frozen=True)
class RoutingFlip:
    """A token whose set of experts differs. `margin`: by how much the reference's selection scores preferred its
    own experts (or groups of experts) to the other's; `near_tie`: whether rounding explains it."""

    backend: str
    location: str
    token: int
    reference: tuple[int, ...]
    other: tuple[int, ...]
    margin: float
    near_tie: bool

    def __str__(self) -> str:
        kind = "near tie" if self.near_tie else "NOT a near tie"
        return (
            f"{self.backend}: token {self.token} at {self.location} chose experts {list(self.other)}, the reference "
            f"{list(self.reference)} (margin {self.margin:.3g}, {kind})"
        )


def flips(
    backend: str,
    node: Node,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    reference: torch.Tensor,
    other: torch.Tensor,
    tolerance: float,
) -> list[RoutingFlip]:
    """Tokens of a `moe.route` node whose expert sets differ. logits [T, E], reference and other i64[T, k];
    tolerance: the largest difference of selection scores that rounding explains."""
    differs = (reference.sort(dim=-1).values != other.sort(dim=-1).values).any(dim=-1)
    found = []
    for token in differs.nonzero()[:, 0].tolist():
        mine, theirs = reference[token].tolist(), other[token].tolist()
        margin = _margin(node, logits[token], bias, set(mine), set(theirs))
        found.append(
            RoutingFlip(backend, node.location.describe(), token, tuple(mine), tuple(theirs), margin,
                        margin <= tolerance)
        )  # fmt: skip
    return found


def _margin(node: Node, logits: torch.Tensor, bias: torch.Tensor | None, mine: set[int], theirs: set[int]) -> float:
    if len(theirs) < len(mine) or not theirs <= set(range(len(logits))):
        return float("inf")  # a repeated or unknown expert is no tie
    scores = logits.double()
    if node.attrs["scoring"] != "topk_softmax":
        scores = torch.softmax(scores, -1) if node.attrs["scoring"] == "softmax" else torch.sigmoid(scores)
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
