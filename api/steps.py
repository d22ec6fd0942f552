"""What a decoding loop keeps between its steps: the caches, joined to new rows or in buffers with room for them."""

from __future__ import annotations

from typing import Protocol

import torch

from moec.ir.dims import evaluate
from moec.program import Program

LEAST_ROOM = 64  # rows that a buffer grows by; long ones grow by a quarter of what they hold


class Steps(Protocol):
    def step(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The last position's logits [B, V] of new tokens i64[B, S] after the past ones, under a mask i64[B, P + S]."""

    def start(self, caches: list[torch.Tensor]) -> None:
        """Go on from the caches that another program made."""


class Joined:
    """Caches that the program takes with P rows and gives with P + S."""

    def __init__(self, program: Program, batch: int):
        self.program = program
        self.caches = empty_cache(program, batch, 2)

    def step(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits, *self.caches = self.program.run([input_ids, attention_mask, *self.caches])
        return logits

    def start(self, caches: list[torch.Tensor]) -> None:
        self.caches = caches


class Buffers:
    """Caches of C rows that the program writes new ones into, see `moec.in_place`. `past`: the symbol that counted the
    filled rows when it was traced; `most`: the rows that there will be at the end."""

    def __init__(self, program: Program, past: str, batch: int, most: int):
        self.program, self.past, self.most = program, past, most
        ids, attended, _, *caches = program.graph.inputs
        self.batch, self.length, self.capacity = ids.shape[0], ids.shape[1], attended.shape[1]
        self.caches = empty_cache(program, batch, 3)
        self.axes = [v.shape.index(self.capacity) if self.capacity in v.shape else None for v in caches]
        self.filled = self.room = 0
        self.mask = torch.zeros(batch, 0, dtype=torch.int64)

    def start(self, caches: list[torch.Tensor]) -> None:
        self.caches = caches
        self.filled = self.room = next(t.shape[a] for t, a in zip(caches, self.axes, strict=True) if a is not None)

    def step(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        rows, new = len(input_ids), input_ids.shape[1]
        sizes = {str(self.batch): rows, str(self.length): new, self.past: self.filled}
        self.program.limits.check(sizes)
        end = self.filled + new
        if end > self.room:
            self._grow(end if not self.filled else min(end + max(LEAST_ROOM, end // 4), max(end, self.most)))
        if self.mask.shape[1] != self.room:
            self.mask = torch.zeros(rows, self.room, dtype=torch.int64)
        self.mask[:, :end] = attention_mask
        into = [None if axis is None else t for t, axis in zip(self.caches, self.axes, strict=True)]
        inputs = [input_ids, self.mask, torch.tensor(self.filled), *self.caches]
        logits, *self.caches = self.program.executable.run_into(inputs, [None, *into])
        self.filled = end
        return logits

    def _grow(self, room: int) -> None:
        grown = []
        for t, axis in zip(self.caches, self.axes, strict=True):
            if axis is not None:
                wide = t.new_zeros([room if i == axis else n for i, n in enumerate(t.shape)])
                wide.narrow(axis, 0, self.filled).copy_(t.narrow(axis, 0, self.filled))
                t = wide
            grown.append(t)
        self.caches, self.room = grown, room


def empty_cache(program: Program, batch: int, own: int) -> list[torch.Tensor]:
    """The cache of no past tokens, states of zeros: shapes are those of the program's inputs after `own` others."""
    ids, *others = program.legal.inputs
    sizes = dict.fromkeys(program.legal.symbols, 0) | {str(ids.shape[0]): batch}
    past = others[own - 1 :]
    return [torch.zeros([evaluate(n, sizes) for n in v.shape], dtype=v.dtype.torch) for v in past]
