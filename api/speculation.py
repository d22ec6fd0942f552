"""Speculative greedy decoding with a model's own multi-token prediction head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moec.generation import UNSET, Generator, OnToken, check_prompt
from moec.steps import empty_cache


@dataclass
class Speculation:
    """What a speculative `generate` did: `steps` of the model after the prompt, `drafted` tokens that rows which had
    not ended yet were offered, and how many of them the model itself would have chosen."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        """Accepted share of the drafts, 0 where there was none."""
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass(eq=False)
class Speculator(Generator):
    """The program of `draft_step` (see `moec.models.MoETransformer`) and its loop (Leviathan et al., arXiv:2211.17192,
    for greedy choice): each step runs the last token and a draft of the next, keeps the draft where the model chooses
    it too, and drafts one more.

    Program inputs: input_ids i64[B, S ≥ 2], attention_mask i64[B, P + S], known i64[B, 1], the caches. Outputs:
    tokens i64[B, 2], drafts i64[B, 2], the caches. A refused draft stays in the caches as a masked position, so that
    rows of a batch accept independently.
    """

    def speculate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int = 32,
        eos_token_id: Any = UNSET,
        on_token: OnToken | None = None,
        counts: Speculation | None = None,
    ) -> torch.Tensor:
        """As `Generator.generate` greedily, with the same result."""
        mask = check_prompt(input_ids, attention_mask, max_new_tokens)
        self.check_ids(input_ids)
        self.stops.check_room(mask, max_new_tokens)
        eos, pad = self.stops.resolve(eos_token_id)
        rows = _Rows(len(input_ids), max_new_tokens, eos, pad, on_token)
        counts = Speculation() if counts is None else counts
        if not rows.open:
            return torch.cat((input_ids, rows.tokens()), dim=1)
        prompt = input_ids
        if prompt.shape[1] == 1:  # the program takes two positions at least
            prompt, mask = (torch.nn.functional.pad(t, (1, 0)) for t in (prompt, mask))
        known = torch.ones(len(prompt), 1, dtype=torch.int64)
        tokens, drafts, *past = self.program.run([prompt, mask, known, *empty_cache(self.program, len(prompt), 3)])
        last, draft = tokens[:, 1], drafts[:, 1]
        rows.add(last)
        while rows.open:
            ids = torch.stack((last, draft), dim=1)
            mask = torch.cat((mask, mask.new_ones(len(mask), 2)), dim=1)
            tokens, drafts, *past = self.program.run([ids, mask, torch.zeros_like(known), *past])
            accepted = tokens[:, 0] == draft
            counts.steps += 1
            counts.drafted += int(rows.running.sum())
            counts.accepted += int((rows.running & accepted).sum())
            mask[:, -1] = accepted
            rows.add(tokens[:, 0])
            rows.add(tokens[:, 1], accepted)
            last = torch.where(accepted, tokens[:, 1], tokens[:, 0])
            draft = torch.where(accepted, drafts[:, 1], drafts[:, 0])
        return torch.cat((input_ids, rows.tokens()), dim=1)


class _Rows:
    """New tokens of rows that get on at different speeds, handed on column by column."""

    def __init__(self, count: int, limit: int, eos: tuple[int, ...], pad: int, on_token: Callable[..., Any] | None):
        self.limit, self.eos, self.pad, self.on_token = limit, set(eos), pad, on_token
        self.rows: list[list[int]] = [[] for _ in range(count)]
        self.ended = [limit == 0] * count
        self.told = 0

    @property
    def running(self) -> torch.Tensor:
        return torch.tensor([not e for e in self.ended], dtype=torch.bool)

    @property
    def open(self) -> bool:
        return not all(self.ended)

    def add(self, tokens: torch.Tensor, where: torch.Tensor | None = None) -> None:
        for i, token in enumerate(tokens.tolist()):
            if not self.ended[i] and (where is None or bool(where[i])):
                self.rows[i].append(token)
                self.ended[i] = token in self.eos or len(self.rows[i]) == self.limit
        self._tell()

    def _tell(self) -> None:
        """Columns that every row has, or has ended before."""
        longest = max(map(len, self.rows), default=0)
        while self.told < longest and all(e or len(r) > self.told for r, e in zip(self.rows, self.ended, strict=True)):
            column = [r[self.told] if len(r) > self.told else self.pad for r in self.rows]
            self.told += 1
            if self.on_token is not None:
                self.on_token(torch.tensor(column))

    def tokens(self) -> torch.Tensor:
        width = max(map(len, self.rows), default=0)
        filled = [r + [self.pad] * (width - len(r)) for r in self.rows]
        return torch.tensor(filled, dtype=torch.int64).reshape(len(self.rows), width)
