"""Routers and experts, however a model writes them, to `moe.route` and `moe.experts`."""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir import Graph
from moec.passes.clean.cleanup import DeadCode
from moec.passes.fuse.fuse_mlp import GLU_RULES
from moec.passes.moe.fold_route import ROUTE_RULES
from moec.passes.moe.raise_batched import BatchedExperts
from moec.passes.moe.raise_dense import DenseExperts, ScaledInputExperts
from moec.passes.moe.raise_grouped import GroupedExperts
from moec.passes.moe.raise_scattered import SCATTERED_RULES
from moec.passes.moe.raise_stack import StackedOutputs
from moec.passes.moe.raise_stacked import StackedExperts
from moec.passes.rewrite import Rewrite, RuleSet


@dataclass(frozen=True)
class RaiseMoE(RuleSet):
    """Routers and experts, however the model writes them, to `moe.route` and `moe.experts`.

    Gated units come first: the rules of experts look for `math.swiglu` and `math.glu`.
    """

    rules: tuple[Rewrite, ...] = (
        *GLU_RULES,
        *SCATTERED_RULES,
        *ROUTE_RULES,
        GroupedExperts(),
        BatchedExperts(),
        DenseExperts(),
        ScaledInputExperts(),
        StackedExperts(),
        StackedOutputs(),
    )

    def run(self, graph: Graph) -> Graph:
        # what is left of a stack would be another use of what it stacks
        return DeadCode().run(super().run(graph))
