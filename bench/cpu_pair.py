"""Ours against one peer in one process: blocks by turns, with a pause before each so that the other's spinning threads
have gone to sleep. Prints one JSON line per row. Started by cpu.py.

python bench/cpu_pair.py MODEL PEER [quantize]
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
from cpu_models import ROWS, ids
from cpu_peers import CONTENDERS, THREADS, Run, ours

BLOCKS = 9
PAUSE = 0.3  # seconds
BLOCK = 0.4  # seconds of calls in a block


def block(run: Run, x: torch.Tensor, count: int) -> float:
    """The median time of a call, in ms."""
    time.sleep(PAUSE)
    for _ in range(2):
        run(x)
    times = []
    for _ in range(count):
        start = time.perf_counter()
        run(x)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def calls(run: Run, x: torch.Tensor) -> int:
    """How many calls fill a block."""
    run(x)
    start = time.perf_counter()
    run(x)
    return max(3, min(200, int(BLOCK / (time.perf_counter() - start))))


def main(model: str, peer: str, quantize: str | None = None) -> None:
    torch.set_num_threads(THREADS)
    mine = ours(model, **({} if quantize is None else {"quantize": quantize}))["moec"]
    peers = CONTENDERS[peer].make(model)
    for row, (batch, length) in ROWS.items():
        x = ids(batch, length)
        want, error = mine(x), {}
        for way, run in peers.items():
            error[way] = float((run(x) - want).abs().max() / want.abs().max())
        counts = {way: calls(run, x) for way, run in peers.items()}
        trial = {way: block(run, x, counts[way]) for way, run in peers.items()}
        best = min(trial, key=lambda way: trial[way])
        count = calls(mine, x)
        pairs = [(block(mine, x, count), block(peers[best], x, counts[best])) for _ in range(BLOCKS)]
        ratios = sorted(theirs / own for own, theirs in pairs)
        print(json.dumps({
            "model": model, "peer": peer, "quantize": quantize, "row": row, "way": best, "ways_ms": trial,
            "ours_ms": statistics.median(own for own, _ in pairs),
            "peer_ms": statistics.median(theirs for _, theirs in pairs),
            "ratio": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1],
            "difference": error[best],
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
