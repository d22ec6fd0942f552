"""`place_experts`: which expert each slot of each GPU holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from moec.ir import ArgumentTypeError, ArgumentValueError, Mesh, Placement
from moec.passes.placement.align import align
from moec.passes.placement.assign import longest_first
from moec.passes.placement.counts import lower_bound, spare_on_coldest, water_fill
from moec.passes.placement.improve import Layer, improve


def place_experts(
    load: Any,
    mesh: Mesh,
    *,
    coactivation: Any = None,
    current: Placement | None = None,
    max_moves: int | None = None,
    phase: str = "prefill",
    tolerance: float = 0.01,
) -> Placement:
    """Place and replicate the experts of every MoE layer so that the most loaded GPU has little to do.

    `load` [L, E]: tokens (or any share of them) routed to each expert, per layer; nested lists, NumPy or torch.
    A replica takes an equal share of its expert's load. Replica counts come from water-filling, replicas go
    longest-first to the least loaded GPU without a copy of that expert, and swaps and changed counts improve the
    result until it is within `tolerance` of `Placement.lower_bound`.

    `current`: experts stay where they are unless a move helps: slots change one by one, at most `max_moves` per
    layer (None: as many as it takes), and not at all while the balance is within `tolerance` of the bound.
    `phase`: "prefill" is bound by compute, so busy experts are replicated. "decode" is bound by reading weights,
    where a copy of a busy expert is one more read per step: spare slots hold copies of the idlest experts, and
    with `current` the replica counts stay. `coactivation` [L, E, E]: how often two experts serve the same token;
    among GPUs whose load is equal within `tolerance` an expert joins the node, then the GPU, of those it serves with.

    `balance` is max/mean over the GPUs that have slots, 1 for a layer without load. The result depends on nothing
    but the arguments. Raises ArgumentValueError or ArgumentTypeError on loads that are negative, NaN or of the
    wrong shape, on fewer slots than experts, and on a `current` of another mesh, layer or expert count.
    """
    loads = _floats("load", load, 2)
    layers, experts = loads.shape
    _check_options(mesh, experts, max_moves, phase, tolerance)
    pairs = None if coactivation is None else _floats("coactivation", coactivation, 3)
    if pairs is not None and pairs.shape != (layers, experts, experts):
        raise ArgumentValueError(
            f"coactivation has shape {list(pairs.shape)}, expected {[layers, experts, experts]}", code="placement"
        )
    if current is not None:
        _check_current(current, mesh, layers, experts)
    elif max_moves is not None:
        raise ArgumentValueError("max_moves needs the placement that it starts from", code="placement", hint="current=")
    problem = _Problem(mesh, phase, tolerance)
    results = [
        problem.solve(
            loads[i],
            None if pairs is None else pairs[i],
            None if current is None else current.physical_to_logical[i],
            max_moves,
        )
        for i in range(layers)
    ]
    rows, balance, bound, moves = zip(*results, strict=True)
    return Placement(mesh, np.stack(rows), np.array(balance), np.array(bound), np.array(moves))


class _Problem:
    """What all layers share. GPUs without slots are left out: they can carry nothing."""

    def __init__(self, mesh: Mesh, phase: str, tolerance: float):
        slots = np.array(mesh.slots)
        node = np.arange(mesh.num_gpus) // mesh.gpus_per_node
        self.slots, self.node = slots[slots > 0], node[slots > 0]
        self.gpu = np.repeat(np.arange(len(self.slots)), self.slots)
        self.phase, self.tolerance = phase, tolerance

    def solve(
        self, load: np.ndarray, pairs: np.ndarray | None, current: np.ndarray | None, max_moves: int | None
    ) -> tuple[np.ndarray, float, float, int]:
        """Experts per slot, balance, lower bound and moves of one layer."""
        # experts are numbered by falling load meanwhile, so that their ids break no ties
        order = np.argsort(-load, kind="stable")
        load = load[order] / (load.max() or 1.0)  # before summing: finite loads may have an infinite sum
        pairs = None if pairs is None else pairs[np.ix_(order, order)]
        total = float(load.sum())
        load = load * (len(self.slots) / total) if total > 0 else load
        bound = lower_bound(load, self.slots)
        target = bound * (1 + self.tolerance)
        if current is None:
            layer = self._best_fresh(load, pairs, target)
            row = order[layer.expert]
            # numbering within a GPU is free: ascending ids read best
            row = np.concatenate([np.sort(row[self.gpu == g]) for g in range(len(self.slots))])
        else:
            layer = self._from_current(load, pairs, np.argsort(order)[current], target, max_moves)
            row = order[layer.expert]
        balance = float(layer.gpu_load.max()) if total > 0 else 1.0
        return row, balance, bound, layer.moves

    def _from_current(
        self,
        load: np.ndarray,
        pairs: np.ndarray | None,
        current: np.ndarray,
        target: float,
        max_moves: int | None,
    ) -> Layer:
        layer = Layer(load, current, self.gpu, original=current)
        self._improve(layer, target, max_moves)
        if layer.gpu_load.max() <= target or self.phase == "decode":
            return layer
        # small steps got stuck: a fresh start, laid over the current one, may do better for its moves
        placed = self._fresh(load, pairs, self.phase)
        fresh = Layer(load, align(placed, self.slots, current, len(load)), self.gpu, original=current)
        self._improve(fresh, target)
        within = max_moves is None or fresh.moves <= max_moves
        better = fresh.gpu_load.max() < layer.gpu_load.max() * (1 - self.tolerance)
        return fresh if within and better else layer

    def _fresh(self, load: np.ndarray, pairs: np.ndarray | None, phase: str) -> list[list[int]]:
        counts = water_fill if phase == "prefill" else spare_on_coldest
        count = counts(load, len(self.gpu), len(self.slots))
        return longest_first(load, count, self.slots, self.node, pairs, slack=self.tolerance)

    def _best_fresh(self, load: np.ndarray, pairs: np.ndarray | None, target: float) -> Layer:
        """From water-filled counts; where that stays above the target, the other extreme, spare slots on
        the idlest experts, is a second start for the search."""
        tried = []
        for phase in ("prefill", "decode") if self.phase == "prefill" else ("decode",):
            placed = self._fresh(load, pairs, phase)
            layer = Layer(load, np.concatenate([np.array(p, dtype=np.int64) for p in placed]), self.gpu)
            self._improve(layer, target)
            tried.append(layer)
            if layer.gpu_load.max() <= target or len(self.gpu) == len(load):
                break
        return min(tried, key=lambda x: float(x.gpu_load.max()))

    def _improve(self, layer: Layer, target: float, budget: int | None = None) -> None:
        improve(layer, target, budget=budget, recount=self.phase == "prefill", least=max(1e-2 * self.tolerance, 1e-9))


def _floats(name: str, data: Any, rank: int) -> np.ndarray:
    """A finite non-negative f64 array of `rank`, each axis at least 1. Raises ArgumentValueError."""
    try:
        array = np.asarray(data.detach().cpu().double() if isinstance(data, torch.Tensor) else data, dtype=np.float64)
    except (ValueError, TypeError) as e:
        raise ArgumentTypeError(f"{name} is not an array of numbers: {e}", code="placement") from None
    if array.ndim != rank or 0 in array.shape:
        want = ", ".join(["layers", "experts", "experts"][:rank])
        raise ArgumentValueError(f"{name} has shape {list(array.shape)}, expected [{want}]", code="placement")
    bad = ~(np.isfinite(array) & (array >= 0))
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ArgumentValueError(
            f"{name}{list(at)} is {array[at]}; loads are finite and not negative", code="placement"
        )
    return array


def _check_options(mesh: Mesh, experts: int, max_moves: int | None, phase: str, tolerance: float) -> None:
    if not isinstance(mesh, Mesh):
        raise ArgumentTypeError(f"mesh must be a moec.Mesh, got {type(mesh).__name__}", code="placement")
    if mesh.num_slots < experts:
        raise ArgumentValueError(
            f"{mesh.num_slots} slots cannot hold {experts} experts",
            code="placement",
            hint=f"slots_per_gpu of at least {-(-experts // mesh.num_gpus)} on {mesh.num_gpus} GPUs",
        )
    if phase not in ("prefill", "decode"):
        raise ArgumentValueError(f"phase {phase!r} is neither 'prefill' nor 'decode'", code="placement")
    if max_moves is not None and (isinstance(max_moves, bool) or not isinstance(max_moves, int) or max_moves < 0):
        raise ArgumentValueError(f"max_moves must be a count, got {max_moves!r}", code="placement")
    if not 0 <= tolerance < float("inf"):
        raise ArgumentValueError(f"tolerance must be a number ≥ 0, got {tolerance!r}", code="placement")


def _check_current(current: Placement, mesh: Mesh, layers: int, experts: int) -> None:
    if not isinstance(current, Placement):
        raise ArgumentTypeError(f"current must be a Placement, got {type(current).__name__}", code="placement")
    if current.mesh.slots != mesh.slots or current.mesh.nodes != mesh.nodes:
        raise ArgumentValueError(f"current is for {current.mesh}, not {mesh}", code="placement")
    if (current.num_layers, current.num_experts) != (layers, experts):
        raise ArgumentValueError(
            f"current has {current.num_layers} layers of {current.num_experts} experts, load has {layers} of {experts}",
            code="placement",
        )
