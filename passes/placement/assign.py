"""Longest-first assignment of replicas to GPUs."""

from __future__ import annotations

import heapq

import numpy as np


def longest_first(
    load: np.ndarray,
    count: np.ndarray,
    slots: np.ndarray,
    gpu_node: np.ndarray,
    coactivation: np.ndarray | None = None,
    slack: float = 0.0,
) -> list[list[int]]:
    """Experts of each GPU: replicas in order of falling load, each to the least loaded GPU that has a free slot
    and no replica of that expert (a second one only where nothing else is free).

    With `coactivation` [E, E], GPUs whose load is within `slack` of the least loaded one count as equal, and the
    one wins whose node, then whose GPU, holds the experts most often chosen together with this one, against
    what as many average experts would be.
    """
    if coactivation is not None:
        coactivation = coactivation - coactivation.mean()
    unit = load / count
    order = sorted(range(len(load)), key=lambda e: (-unit[e], e))
    placed: list[list[int]] = [[] for _ in slots]
    free = slots.tolist()
    heap = [(0.0, g) for g in range(len(slots)) if free[g]]
    for e in order:
        for _ in range(int(count[e])):
            g, level = _choose(e, heap, placed, gpu_node, coactivation, slack)
            placed[g].append(e)
            free[g] -= 1
            if free[g]:
                heapq.heappush(heap, (level + float(unit[e]), g))
    return placed


def _choose(
    e: int,
    heap: list[tuple[float, int]],
    placed: list[list[int]],
    gpu_node: np.ndarray,
    coactivation: np.ndarray | None,
    slack: float,
) -> tuple[int, float]:
    """Pop the GPU for one replica of `e` from the heap of (load, gpu)."""
    passed: list[tuple[float, int]] = []
    equal: list[tuple[float, int]] = []
    while heap and (not equal or (coactivation is not None and heap[0][0] <= equal[0][0] + slack)):
        entry = heapq.heappop(heap)
        (passed if e in placed[entry[1]] else equal).append(entry)
    best = equal or passed
    chosen = best[0]
    if coactivation is not None and len(best) > 1:
        on_gpu = [float(coactivation[e, placed[g]].sum()) for _, g in best]
        on_node = [
            sum(float(coactivation[e, placed[h]].sum()) for h in np.flatnonzero(gpu_node == gpu_node[g]))
            for _, g in best
        ]
        chosen = best[max(range(len(best)), key=lambda i: (on_node[i], on_gpu[i], -i))]
    for entry in passed + equal:
        if entry is not chosen:
            heapq.heappush(heap, entry)
    return chosen[1], chosen[0]
