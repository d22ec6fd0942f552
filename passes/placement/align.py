"""Lay a new assignment over the current one so that as few slots as possible change."""

from __future__ import annotations

import numpy as np


def align(placed: list[list[int]], slots: np.ndarray, current: np.ndarray, num_experts: int) -> np.ndarray:
    """Experts per slot, i64[S]. GPUs are interchangeable where they have the same number of slots: new GPU
    contents go to the current GPU with which they share most experts (greedy, largest overlap first), and on
    each GPU the shared experts keep their slots."""
    starts = np.cumsum(slots) - slots
    old = np.zeros((len(slots), num_experts), dtype=np.int64)
    new = np.zeros_like(old)
    for g, experts in enumerate(placed):
        np.add.at(old[g], current[starts[g] : starts[g] + slots[g]], 1)
        np.add.at(new[g], np.array(experts, dtype=np.int64), 1)
    # Σ_e min(old, new): multisets share the smaller multiplicity
    overlap = np.minimum(new[:, None, :], old[None, :, :]).sum(axis=-1)
    overlap = np.where(slots[:, None] == slots[None, :], overlap, -1)
    result = np.empty(int(slots.sum()), dtype=np.int64)
    free_new, free_old = set(range(len(slots))), set(range(len(slots)))
    for flat in np.argsort(-overlap, axis=None, kind="stable"):
        a, b = divmod(int(flat), len(slots))
        if a in free_new and b in free_old and overlap[a, b] >= 0:
            free_new.remove(a)
            free_old.remove(b)
            here = slice(starts[b], starts[b] + slots[b])
            result[here] = _keep_slots(placed[a], current[here])
    return result


def _keep_slots(experts: list[int], current: np.ndarray) -> np.ndarray:
    rest = sorted(experts)
    result = np.full(len(current), -1, dtype=np.int64)
    for i, e in enumerate(current.tolist()):
        if e in rest:
            rest.remove(e)
            result[i] = e
    result[result < 0] = rest
    return result
