"""Local search on one layer's placement: swaps between GPUs and changed replica counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


class Layer:
    """One layer's placement while it changes. Loads are in units of the mean GPU load.

    `expert` i64[S]: expert per slot; `gpu` i64[S]: GPU per slot (fixed); `original` i64[S]: the experts that the
    slots held when moves are counted from there, or None.
    """

    def __init__(self, load: np.ndarray, expert: np.ndarray, gpu: np.ndarray, original: np.ndarray | None = None):
        self.load = load
        self.expert = expert.copy()
        self.gpu = gpu
        self.original = original
        self.num_gpus = int(gpu.max()) + 1
        self.count = np.bincount(self.expert, minlength=len(load))
        self.held = np.zeros((self.num_gpus, len(load)), dtype=np.int64)
        np.add.at(self.held, (gpu, self.expert), 1)

    @property
    def gpu_load(self) -> np.ndarray:
        """f64[G]."""
        return self.held @ (self.load / self.count)

    @property
    def moves(self) -> int:
        return 0 if self.original is None else int((self.expert != self.original).sum())

    def cost(self, slots: np.ndarray, experts: np.ndarray) -> np.ndarray:
        """Moves gained (−1, 0 or 1) by putting `experts` into `slots`."""
        if self.original is None:
            return np.zeros(np.broadcast(slots, experts).shape, dtype=np.int64)
        home = self.original[slots]
        return (experts != home).astype(np.int64) - (self.expert[slots] != home)

    def put(self, slot: int, e: int) -> None:
        old, g = self.expert[slot], self.gpu[slot]
        self.count[old] -= 1
        self.held[g, old] -= 1
        self.count[e] += 1
        self.held[g, e] += 1
        self.expert[slot] = e


@dataclass(frozen=True)
class Step:
    """A candidate change: new contents of slots, how much it takes off the most loaded GPU, moves it costs."""

    gain: float
    cost: int
    changes: tuple[tuple[int, int], ...]

    @property
    def value(self) -> float:
        return float(_value(np.array(self.gain), np.array(self.cost)))


def improve(
    layer: Layer, target: float, *, budget: int | None = None, recount: bool = True, least: float = 1e-4
) -> None:
    """Change `layer` until every GPU's load is ≤ `target`, no step helps by `least`, or `budget` moves are used.

    Steps for the most loaded GPU: swap one of its slots with any slot of another GPU; with `recount` also turn
    a slot of an expert that has several into one more replica of an expert on that GPU, or give one of its own
    such slots to another expert. A step must leave every GPU it adds to below the present maximum, so the loads
    sorted from the top fall and the search ends; the one that lowers the maximum most per move wins, load
    below the target not counting.
    """
    while True:
        loads = layer.gpu_load
        g = int(loads.argmax())
        if loads[g] <= target:
            return
        left = None if budget is None else budget - layer.moves
        step = _best_swap(layer, loads, g, target, left, least)
        if recount and (step is None or step.cost > 1):
            other = _best_recount(layer, loads, g, target, left, least, double=False)
            if other is not None and (step is None or other.value > step.value):
                step = other
            if step is None:
                step = _best_recount(layer, loads, g, target, left, least, double=True)
        if step is None:
            return
        for slot, e in step.changes:
            layer.put(slot, e)


def _value(gain: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Gain per move; a step that costs none, or returns an expert home, is preferred to all that do."""
    return np.where(cost > 0, gain / np.maximum(cost, 1), gain * 1e6)


def _pick(gain: np.ndarray, cost: np.ndarray, allowed: np.ndarray, left: int | None) -> int | None:
    """Flat index of the allowed candidate with the best gain per move, or None."""
    if left is not None:
        allowed = allowed & (cost <= left)
    if not allowed.any():
        return None
    return int(np.where(allowed, _value(gain, cost), -np.inf).argmax())


def _best_swap(layer: Layer, loads: np.ndarray, g: int, target: float, left: int | None, least: float) -> Step | None:
    unit = layer.load / layer.count
    mine, theirs = np.flatnonzero(layer.gpu == g), np.flatnonzero(layer.gpu != g)
    a, b = layer.expert[mine], layer.expert[theirs]
    other = layer.gpu[theirs]
    shift = unit[a][:, None] - unit[b][None, :]
    worst = np.maximum(loads[g] - shift, loads[other][None, :] + shift)
    gain = loads[g] - np.maximum(worst, target)
    fits = (layer.held[other][:, a].T == 0) & (layer.held[g, b] == 0)[None, :] & (gain > least)
    cost = layer.cost(mine[:, None], b[None, :]) + layer.cost(theirs[None, :], a[:, None])
    best = _pick(gain, cost, fits, left)
    if best is None:
        return None
    i, j = divmod(best, len(theirs))
    changes = ((int(mine[i]), int(b[j])), (int(theirs[j]), int(a[i])))
    return Step(float(gain[i, j]), int(cost[i, j]), changes)


def _best_recount(
    layer: Layer, loads: np.ndarray, g: int, target: float, left: int | None, least: float, double: bool
) -> Step | None:
    """Slot i, holding expert a (which has more), is given to expert b; with `double` also where b is there already."""
    load, count, held = layer.load, layer.count, layer.held
    spare = count[layer.expert] > 1
    here = layer.gpu == g
    relief = np.unique(layer.expert[here])  # one more replica of these takes load off g
    away, own = np.flatnonzero(spare & ~here), np.flatnonzero(spare & here)
    slot = np.concatenate([np.repeat(away, len(relief)), np.repeat(own, len(load))])
    b = np.concatenate([np.tile(relief, len(away)), np.tile(np.arange(len(load)), len(own))])
    a, at = layer.expert[slot], layer.gpu[slot]
    more = load / np.maximum(count - 1, 1) - load / count  # what a's other replicas gain
    less = load / count - load / (count + 1)  # what b's replicas lose
    landed = loads[at] + held[at, a] * more[a] - (load / np.maximum(count - 1, 1))[a]
    landed += (load / (count + 1))[b] - held[at, b] * less[b]
    # cheap tests first: few candidates leave both the slot's own GPU and the other holders of a low enough
    fullest = np.where(held > 0, loads[:, None], 0.0).max(axis=0) + more
    low = loads[g] - least
    keep = (a != b) & (landed < low) & ((fullest[a] < low) | (held[g, a] > 0))
    keep &= (held[at, b] > 0) if double else (held[at, b] == 0)
    slot, b, a, at, landed = slot[keep], b[keep], a[keep], at[keep], landed[keep]
    if not len(slot):
        return None
    change = held[:, a].T * more[a][:, None] - held[:, b].T * less[b][:, None]
    change[np.arange(len(slot)), at] = landed - loads[at]
    raised = np.where(change > 0, loads[None, :] + change, 0.0).max(axis=1)
    worst = np.maximum(loads[g] + change[:, g], raised)
    gain = loads[g] - np.maximum(worst, target)
    cost = layer.cost(slot, b)
    best = _pick(gain, cost, gain > least, left)
    if best is None:
        return None
    return Step(float(gain[best]), int(cost[best]), ((int(slot[best]), int(b[best])),))
