"""A causal language model as a module with plain arguments: ids, mask and flat cache tensors in, logits and cache
tensors out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moec.generation import no_generation
from moec.ir import Graph
from moec.transformers_cache import ARGUMENTS, CacheLayout, cache_argument, close

Past = list[Tensor]
_SEVERAL = 17  # new tokens at once: more than the convolutions of states are wide


class CachedDecoder(nn.Module):
    """One decoding step: input_ids i64[B, S], attention_mask i64[B, P + S], past: cache tensors of P positions →
    (logits of the last position [B, V], cache tensors of P + S positions).

    Holds the model's own submodules and weights under their own names, so that module paths are those of the
    plain forward.
    """

    def __init__(self, model: nn.Module, step: Callable[..., Any]):
        super().__init__()
        self.training = model.training
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.__dict__["step"] = step

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: Past) -> tuple[Tensor, Past]:
        return self.__dict__["step"](input_ids, attention_mask, past)


class DraftDecoder(CachedDecoder):
    """One step of speculative decoding, see `moec.speculation.Speculator`."""

    def forward(  # type: ignore[override]  # it takes `known` besides
        self, input_ids: Tensor, attention_mask: Tensor, known: Tensor, past: Past
    ) -> tuple[Tensor, Tensor, Past]:
        return self.__dict__["step"](input_ids, attention_mask, known, past)


def speculates(model: Any) -> bool:
    """Whether a model has a head that drafts the token after the next."""
    return callable(getattr(model, "draft_step", None)) and getattr(model.config, "num_mtp_layers", 0) > 0


def draft_decoder(model: Any) -> tuple[DraftDecoder, tuple[Any, ...], dict[str, Any]]:
    """The decoder of a model with a `draft_step`, arguments to trace it at, and its dynamic shapes."""
    structure = pytree.tree_structure(model.empty_cache(1, mtp=True))

    def step(input_ids: Tensor, attention_mask: Tensor, known: Tensor, past: Past) -> tuple[Tensor, Tensor, Past]:
        caches = pytree.tree_unflatten(past, structure)
        tokens, drafts, caches = model.draft_step(input_ids, attention_mask, caches, known)
        return tokens, drafts, pytree.tree_leaves(caches)

    def run(batch: int, length: int) -> Past:
        if length == 1:  # a step takes two at least
            return [t[:, :, :1] for t in run(batch, 2)]
        past = pytree.tree_leaves(model.empty_cache(batch, mtp=True))
        ids = _ids(batch, length).to(past[0].device)
        with torch.no_grad():
            return step(ids, torch.ones_like(ids), torch.ones_like(ids[:, :1]), past)[2]

    (ids, mask, past), shapes = example(run)
    b, length = shapes["input_ids"][0], torch.export.Dim("S", min=2)
    shapes = {
        "input_ids": {0: b, 1: length},
        "attention_mask": shapes["attention_mask"],
        "known": {0: b},
        "past": shapes["past"],
    }
    return DraftDecoder(model, step), (ids, mask, torch.ones(len(ids), 1, dtype=torch.int64), past), shapes


class PromptDecoder(CachedDecoder):
    """The first step, from no past: input_ids i64[B, S], attention_mask i64[B, S] → (logits of the last position
    [B, V], cache tensors)."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Past]:  # type: ignore[override]  # no past
        result: tuple[Tensor, Past] = self.__dict__["step"](input_ids, attention_mask)
        return result


def cached_decoder(model: nn.Module) -> tuple[CachedDecoder, Callable[[int, int], Past]]:
    """The decoder of a model, and a function that makes its cache for (batch, past) by running the model.

    Recognised by structure: `empty_cache(batch)` (moec.models), or a cache of transformers'. Raises CompileError for a
    model that keeps no such cache, or does something else for several tokens with past ones than without.
    """
    if callable(getattr(model, "empty_cache", None)):
        return _own_cache(model)
    if cache_argument(model) is not None:
        layout = CacheLayout(model, _ids)
        if not layout.continues(_SEVERAL):
            raise no_generation(f"it computes something else for {_SEVERAL} tokens after others than in one run")
        return _transformers_cache(layout)
    raise no_generation(f"{type(model).__name__} has neither empty_cache() nor {' nor '.join(ARGUMENTS)}")


def split_decoder(model: nn.Module) -> tuple[PromptDecoder, CachedDecoder, Callable[[int, int], Past]] | None:
    """Two modules for a model that does something else for one token after others than for several: the step from no
    past, the step of one token, and the function that makes a cache. None for a model that cannot be split so. Raises
    CompileError where one token after others is not what it is in one run."""
    if callable(getattr(model, "empty_cache", None)) or cache_argument(model) is None:
        return None
    layout = CacheLayout(model, _ids)
    if not layout.continues(1):
        raise no_generation("it computes something else for a token after others than in one run")

    def first(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Past]:
        logits, cache = layout.call(None, input_ids, attention_mask)
        return logits[:, -1], layout.flat(cache)

    return PromptDecoder(model, first), *_transformers_cache(layout)


def generates(model: Any) -> bool:
    """Whether a model has one of the cache protocols (its run may still refuse)."""
    if not isinstance(model, nn.Module):
        return False
    return callable(getattr(model, "empty_cache", None)) or cache_argument(model) is not None


def _own_cache(model: Any) -> tuple[CachedDecoder, Callable[[int, int], Past]]:
    structure = pytree.tree_structure(model.empty_cache(1))

    def step(input_ids: Tensor, attention_mask: Tensor, past: Past) -> tuple[Tensor, Past]:
        logits, caches = model(input_ids, attention_mask, pytree.tree_unflatten(past, structure))
        return logits[:, -1], pytree.tree_leaves(caches)

    def run(batch: int, length: int) -> Past:
        past = pytree.tree_leaves(model.empty_cache(batch))
        ids = _ids(batch, length).to(past[0].device)
        with torch.no_grad():
            return step(ids, torch.ones_like(ids), past)[1]

    return CachedDecoder(model, step), run


def _transformers_cache(layout: CacheLayout) -> tuple[CachedDecoder, Callable[[int, int], Past]]:
    def step(input_ids: Tensor, attention_mask: Tensor, past: Past) -> tuple[Tensor, Past]:
        if layout.takes_positions:
            for length in layout.lengths(past):
                # export has to know: else the new positions may get a length of their own, and dense models are refused
                torch._check(attention_mask.shape[1] == length + input_ids.shape[1])
        logits, cache = layout.call(layout.cache(past), input_ids, attention_mask)
        return logits[:, -1], layout.flat(cache)

    return CachedDecoder(layout.model, step), layout.run


def check_padding(prompt: PromptDecoder, least: int) -> None:
    """Raise CompileError where padding a prompt of one token on the left to `least` changes what comes of it."""
    ids = _ids(2, 1) + 1
    padded, mask = (torch.nn.functional.pad(t, (least - 1, 0)) for t in (ids, torch.ones_like(ids)))
    with torch.no_grad():
        want, got = prompt(ids, torch.ones_like(ids))[0], prompt(padded, mask)[0]
    if not close(got, want):
        raise no_generation(
            f"traced at {_SEVERAL} tokens, its prompt takes {least} or more, and padding on the left changes its logits"
        )


def _ids(batch: int, length: int) -> Tensor:
    return torch.arange(batch * length).reshape(batch, length) % 7


def example(past_of: Callable[[int, int], Past], length: int = 3) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments to trace a decoder at, and its dynamic shapes: batch, sequence (`length` 1: that one only), and past,
    which the caches' own sizes at different batches and lengths tell apart. A tensor of one size at every length is a
    state. Raises CompileError where one grows otherwise."""
    batch, past = 2, 5
    cache = past_of(batch, past)
    b = torch.export.Dim("B")
    s = torch.export.Dim("S")
    p = torch.export.Dim("P")
    axes = []
    others = (past_of(batch + 1, past), past_of(batch, past + 1), past_of(batch, 1))
    for t, wider, longer, least in zip(cache, *others, strict=True):
        grows_b = [i for i, (x, y) in enumerate(zip(t.shape, wider.shape, strict=True)) if x != y]
        grows_p = [i for i, (x, y) in enumerate(zip(t.shape, longer.shape, strict=True)) if x != y]
        is_state = t.shape == longer.shape == least.shape
        if len(grows_b) != 1 or t.shape[grows_b[0]] != batch or not (is_state or _grows(t, longer, least, grows_p)):
            raise no_generation(
                f"a cache tensor of shape {list(t.shape)} for batch {batch} and {past} tokens neither stays as it is"
                f" nor grows by one per row and token ({list(wider.shape)} for {batch + 1} rows,"
                f" {list(longer.shape)} for {past + 1} tokens, {list(least.shape)} for one)"
            )
        axes.append({grows_b[0]: b} | ({} if is_state else {grows_p[0]: p}))
    args = (_ids(batch, length), torch.ones(batch, past + length, dtype=torch.int64), cache)
    shapes = {
        "input_ids": {0: b, 1: s} if length > 1 else {0: b},
        "attention_mask": {0: b, 1: torch.export.Dim.AUTO},
        "past": axes,
    }
    return args, shapes


def prompt_example() -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same of a `PromptDecoder`."""
    ids, axes = _ids(2, _SEVERAL), {0: torch.export.Dim("B"), 1: torch.export.Dim("S")}
    return (ids, torch.ones_like(ids)), {"input_ids": axes, "attention_mask": axes}


def _grows(t: Tensor, longer: Tensor, least: Tensor, axes: list[int]) -> bool:
    """Whether one axis counts the tokens: as `t` has it, with one more, and with one alone."""
    sizes = [x.shape[axes[0]] for x in (t, longer, least)] if len(axes) == 1 else []
    return bool(sizes) and sizes[1] == sizes[0] + 1 and sizes[2] == 1


def check_decoding(graph: Graph, bounds: Mapping[str, tuple[int, int | None]], fewest: int = 1) -> int:
    """The fewest new tokens that a traced decoder takes. Raises CompileError where it does not hold for `fewest`."""
    (length,) = graph.inputs[0].shape[1:]
    least, greatest = bounds.get(str(length), (0, None))
    if least > fewest or (greatest is not None and greatest < fewest):
        raise no_generation(
            f"traced at several new tokens at once, it holds for {least} or more"
            + (f" up to {greatest}" if greatest is not None else "")
            + ", and decoding takes one at a time (with a cache, the model computes something else for one)"
        )
    return max(least, 1)
