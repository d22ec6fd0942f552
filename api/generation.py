"""Decoding with a cache that is an input and an output of the compiled program."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from moec.ir import ArgumentTypeError, ArgumentValueError, CompileError, Dim
from moec.ir.interpreter import plain_tensor
from moec.positions import positions
from moec.program import Program
from moec.sampling import Sampling
from moec.steps import Buffers, Joined, Steps

GREEDY: Final = Sampling(0.0)
OnToken = Callable[[torch.Tensor], Any]


class _Unset:
    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = _Unset()
"""The model's own end-of-sequence token."""


@dataclass(frozen=True)
class Stops:
    """Tokens that end a row, what fills a row after its end, and how many positions the model was made for (None: not
    said)."""

    eos: tuple[int, ...] = ()
    pad: int | None = None
    positions: int | None = None

    @staticmethod
    def of(model: Any) -> Stops:
        """From the model's generation config, else its config; a model may have neither."""
        configs = [c for c in (getattr(model, "generation_config", None), getattr(model, "config", None)) if c]

        def first(name: str) -> tuple[int, ...]:
            return next((ids for ids in (_tokens(getattr(c, name, None)) for c in configs) if ids), ())

        pad = first("pad_token_id")
        return Stops(first("eos_token_id"), pad[0] if pad else None, positions(getattr(model, "config", None)))

    def check_room(self, mask: torch.Tensor, max_new_tokens: int) -> None:
        """Raise ArgumentValueError where the longest row would need positions that the model does not have; the last
        new token takes none."""
        longest = int(mask.sum(1).max()) if len(mask) else 0
        if self.positions is not None and longest + max_new_tokens - 1 > self.positions:
            room = max(self.positions - longest + 1, 0)
            raise ArgumentValueError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones take {longest + max_new_tokens - 1} "
                f"positions, the model has {self.positions}",
                code="value",
                hint=f"max_new_tokens can be {room} at most for this prompt",
            )

    def resolve(self, eos_token_id: Any) -> tuple[tuple[int, ...], int]:
        """(eos ids, pad id) of one `generate` call."""
        eos = self.eos if eos_token_id is UNSET else _ids(eos_token_id)
        pad = self.pad if self.pad is not None else (eos[0] if eos else 0)
        return eos, pad


def _ids(value: Any) -> tuple[int, ...]:
    """The token ids of an argument. Raises ArgumentValueError."""
    values = _listed(value)
    if not all(map(_is_token, values)):
        raise ArgumentValueError(
            f"eos_token_id must be a token id (0 up to 2⁶³ − 1), a list of them, None or UNSET, got {value!r}",
            code="arguments",
        )
    return tuple(values)


def _tokens(value: Any) -> tuple[int, ...]:
    """The token ids that a config says; −1 and the like stand for none there."""
    return tuple(v for v in _listed(value) if _is_token(v))


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    return list(value) if isinstance(value, Iterable) else [value]


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


@dataclass(eq=False)
class Generator:
    """The cached program with what decoding needs.

    Where a model does something else for one token after others than for several, `program` takes one token, and
    `prompt` the first tokens: input_ids i64[B, S ≥ `least`], attention_mask i64[B, S] → the same outputs. A shorter
    prompt is padded on the left.

    Program inputs: input_ids i64[B, S], attention_mask i64[B, P + S], then the cache's tensors, each with a batch
    axis B, and a time axis P unless it is a state of one size (of a recurrence or a convolution; zeros at first).
    Outputs: the last position's logits [B, V], then the tensors extended to P + S, the states after the S tokens.
    With `past`, the symbol P, it takes buffers instead, see `moec.in_place.InPlace`.
    """

    program: Program
    stops: Stops = field(default_factory=Stops)
    prompt: Program | None = None
    least: int = 1
    past: str | None = None

    @property
    def programs(self) -> dict[str, Program]:
        """By the names they are reported and saved under."""
        return {"cached": self.program} | ({} if self.prompt is None else {"prompt": self.prompt})

    def steps(self, batch: int, most: int) -> Steps:
        """Caches of no past tokens; there will be `most` at the end."""
        if self.past is None:
            return Joined(self.program, batch)
        return Buffers(self.program, self.past, batch, most)

    def check_ids(self, input_ids: torch.Tensor) -> None:
        """Raise ArgumentValueError for an id that has no row in the table the ids are looked up in."""
        ids = self.program.legal.inputs[0]
        tables = [n.operands[0] for n in ids.users if n.op == "tensor.gather" and n.operands[1] is ids]
        for v in tables:
            rows = v.shape[0] if v is not None and v.weight is not None else None
            if isinstance(rows, int) and input_ids.numel() and int(input_ids.max()) >= rows:
                raise ArgumentValueError(
                    f"argument 'input_ids' holds the id {int(input_ids.max())}, the model knows 0 … {rows - 1}",
                    code="value",
                )

    def _check_last(self, mask: torch.Tensor, max_new_tokens: int) -> None:
        """Raise ArgumentValueError where the program does not hold for the sizes of the last step."""
        ids, attended = (v.shape for v in self.program.graph.inputs[:2])
        past = attended[1] - ids[1] if self.past is None else Dim(self.past)
        if max_new_tokens > 1 and isinstance(past, Dim) and past.is_symbol:
            sizes = {str(ids[0]): len(mask), str(ids[1]): 1, str(past): mask.shape[1] + max_new_tokens - 2}
            self.program.limits.check(sizes)

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int = 32,
        eos_token_id: Any = UNSET,
        sampling: Sampling = GREEDY,
        on_token: OnToken | None = None,
    ) -> torch.Tensor:
        """See `CompiledModel.generate`."""
        mask = check_prompt(input_ids, attention_mask, max_new_tokens)
        if on_token is not None and not callable(on_token):
            raise ArgumentTypeError(
                f"argument 'on_token' must be callable, got {type(on_token).__name__}", code="arguments"
            )
        self.check_ids(input_ids)
        self.stops.check_room(mask, max_new_tokens)
        self._check_last(mask, max_new_tokens)
        eos, pad = self.stops.resolve(eos_token_id)
        ids, step, first = input_ids, input_ids, self.prompt
        if first is not None:
            missing = max(self.least - step.shape[1], 0)
            step, mask = (torch.nn.functional.pad(t, (missing, 0)) for t in (step, mask))
        steps = self.steps(len(ids), mask.shape[1] + max_new_tokens - 1)
        ended = torch.zeros(len(ids), dtype=torch.bool)
        ends, random = torch.tensor(eos, dtype=torch.int64), sampling.generator()
        for _ in range(max_new_tokens):
            if ended.all():
                break
            if first is None:
                logits = steps.step(step, mask)
            else:
                logits, *caches = first.run([step, mask])
                steps.start(caches)
                first = None
            token = torch.where(ended, pad, sampling.choose(logits, random))
            ids = torch.cat((ids, token[:, None]), dim=1)
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
            step = token[:, None]
            if on_token is not None:
                on_token(token.clone())
            ended = ended | torch.isin(token, ends)
        return ids


def check_prompt(input_ids: Any, attention_mask: Any, max_new_tokens: Any) -> torch.Tensor:
    """The attention mask to start from. Raises ArgumentTypeError or ArgumentValueError."""
    for name, t in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if t is None and name == "attention_mask":
            continue
        if not isinstance(t, torch.Tensor):
            raise ArgumentTypeError(
                f"argument {name!r} must be a torch.Tensor i64[B, S], got {type(t).__name__}", code="arguments"
            )
        if t.dtype != torch.int64:
            raise ArgumentTypeError(
                f"argument {name!r} has dtype {t.dtype}, expected torch.int64", code="dtype", hint=f"{name}.long()"
            )
        if t.ndim != 2:
            raise ArgumentValueError(
                f"argument {name!r} has rank {t.ndim} (shape {list(t.shape)}), expected rank 2 [B, S]", code="rank"
            )
        plain_tensor(name, t)
    if input_ids.shape[1] == 0:
        raise ArgumentValueError("argument 'input_ids' has no tokens, expected S ≥ 1", code="shape")
    if input_ids.numel() and int(input_ids.min()) < 0:
        raise ArgumentValueError(f"argument 'input_ids' holds the id {int(input_ids.min())}", code="value")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
        raise ArgumentTypeError(
            f"argument 'max_new_tokens' must be an int, got {type(max_new_tokens).__name__}", code="arguments"
        )
    if max_new_tokens < 0:
        raise ArgumentValueError(f"argument 'max_new_tokens' is {max_new_tokens}, expected ≥ 0", code="value")
    if attention_mask is None:
        return torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ArgumentValueError(
            f"argument 'attention_mask' has shape {list(attention_mask.shape)}, expected {list(input_ids.shape)} "
            "as input_ids",
            code="shape",
        )
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ArgumentValueError("argument 'attention_mask' holds values other than 0 and 1", code="value")
    empty = (attention_mask == 0).all(dim=1).nonzero().flatten().tolist()
    if empty:
        raise ArgumentValueError(
            f"argument 'attention_mask' leaves no token of row {empty[0]}", code="value", hint="1 stands for a token"
        )
    if bool((attention_mask.diff(dim=1) < 0).any()) or not bool(attention_mask[:, -1].all()):
        raise ArgumentValueError(
            "argument 'attention_mask' masks a position after a token: prompts are padded on the left",
            code="value",
            hint="pad on the left, e.g. tokenizer.padding_side = 'left'",
        )
    return attention_mask


def no_generation(reason: str) -> CompileError:
    """The error of a model without a usable KV cache."""
    return CompileError(
        f"this model cannot generate: {reason}",
        code="generate",
        hint="generate() takes causal language models: one with `empty_cache(batch)` and "
        "`forward(input_ids, attention_mask, past) -> (logits, past)`, or one of transformers' with a DynamicCache",
    )
