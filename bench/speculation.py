"""Speculative decoding on the shipped model, against plain greedy decoding: `make bench-speculation`.

For each text the two generate by turns, one thread, several times; the speed-up is that of the medians. `accepted` is
the share of drafts that the model itself would have chosen. Exits with 1 where a token differs.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import moec
from moec import models
from moec.speculation import Speculation

TEXTS = (
    "It was the best of times, it was the worst of times, it was the",
    "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return",
    "The quick brown fox jumps over the lazy dog and",
)
NEW, ROUNDS = 150, 7


def timed(run: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def main() -> int:
    compiled = moec.compile(models.trained(), backend="onnxruntime", threads=1)
    table = Table("text", "same tokens", "accepted", "steps", "plain tokens/s", "speed-up", title_justify="left",
                  title=f"{NEW} new tokens, medians of {ROUNDS} rounds")  # fmt: skip
    same = True
    for text in TEXTS:
        ids = torch.tensor([list(text.encode())])
        counts = Speculation()

        def plain(ids: torch.Tensor = ids) -> torch.Tensor:
            return compiled.generate(ids, max_new_tokens=NEW, eos_token_id=None)

        def drafted(ids: torch.Tensor = ids, counts: Speculation | None = None) -> torch.Tensor:
            return compiled.generate(ids, max_new_tokens=NEW, eos_token_id=None, speculative=counts or True)

        equal = torch.equal(plain(), drafted(counts=counts))  # and warm
        times = [(timed(plain)[0], timed(drafted)[0]) for _ in range(ROUNDS)]
        before, after = (statistics.median(t) for t in zip(*times, strict=True))
        same &= equal
        table.add_row(repr(text[-24:]), "yes" if equal else "NO", f"{counts.rate:.0%}", str(counts.steps),
                      f"{NEW / before:.0f}", f"{before / after:.2f}")  # fmt: skip
    Console(width=120).print(table)
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
