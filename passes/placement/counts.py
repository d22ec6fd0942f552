"""How many replicas each expert gets, and what no placement can beat."""

from __future__ import annotations

import heapq

import numpy as np


def water_fill(load: np.ndarray, num_slots: int, num_gpus: int) -> np.ndarray:
    """Replicas per expert, i64[E], that minimise the largest load per replica.

    Every expert starts with one; each further slot goes to the expert with the most load per replica (ties:
    lower index), which is optimal for min-max because a replica is worth most there and its worth only falls.
    An expert already on every GPU gains nothing from one more: it is passed over while another can still use it.
    """
    count = np.ones(len(load), dtype=np.int64)
    heap = [(-float(x), e) for e, x in enumerate(load)]
    heapq.heapify(heap)
    full: list[tuple[float, int]] = []
    for _ in range(num_slots - len(load)):
        while heap and count[heap[0][1]] >= num_gpus:
            full.append(heapq.heappop(heap))
        if not heap:  # more slots than experts × GPUs: doubling up on a GPU is all that is left
            heap, full, num_gpus = full, [], num_slots
            heapq.heapify(heap)
        e = heap[0][1]
        count[e] += 1
        heapq.heapreplace(heap, (-float(load[e]) / float(count[e]), e))
    return count


def spare_on_coldest(load: np.ndarray, num_slots: int, num_gpus: int) -> np.ndarray:
    """Replicas per expert, i64[E], for decoding, which reads every used slot's weights once per step: a copy of
    a busy expert adds a full read, so the spare slots hold copies of the experts least likely to be read."""
    count = np.ones(len(load), dtype=np.int64)
    spare = num_slots - len(load)
    for e in np.argsort(load, kind="stable"):
        extra = min(spare, num_gpus - 1)
        count[e] += extra
        spare -= extra
    full, rest = divmod(spare, len(load))
    count += full
    count[np.argsort(load, kind="stable")[:rest]] += 1
    return count


def lower_bound(load: np.ndarray, slots: np.ndarray) -> float:
    """A max/mean GPU load that no placement with equal splits can beat. slots i64[G], each ≥ 1.

    The largest of
    - 1: some GPU carries at least the mean;
    - with c replicas, some GPU holds ≥ ⌈c/G⌉ of them, so the hottest expert costs it ≥ load / min(c, G): the
      least possible maximum of that over all counts with Σc = slots is what `water_fill` reaches;
    - without spare slots (every expert exactly once): of the m·G+1 hottest experts some GPU holds m+1, and it
      fills its other slots at best with the coldest ones.
    """
    num_gpus, total = len(slots), float(load.sum())
    if total <= 0:
        return 1.0
    mean = total / num_gpus
    count = np.minimum(water_fill(load, int(slots.sum()), num_gpus), num_gpus)
    best = max(mean, float((load / count).max()))
    if slots.sum() == len(load):
        hot = np.sort(load)[::-1]
        cold = np.concatenate([[0.0], np.cumsum(hot[::-1])])
        m = 0
        while m * num_gpus < len(load):
            others = max(0, int(slots.min()) - m - 1)
            best = max(best, float(hot[m * num_gpus - m : m * num_gpus + 1].sum()) + float(cold[others]))
            m += 1
    return best / mean
