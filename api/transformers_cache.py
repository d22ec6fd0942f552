"""The caches of transformers' models as a list of tensors: keys and values, latents, indexer keys, states of
recurrences and convolutions, whatever a cache or one of its layers holds."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moec.generation import no_generation

ARGUMENTS = ("past_key_values", "cache_params")
"""What the forward of a causal language model calls its cache."""

_OLD = 3  # tokens before those that a model is asked to continue with


def cache_argument(model: Any) -> str | None:
    """The one of `ARGUMENTS` that a model's forward takes; None where it takes none or no ids."""
    parameters = inspect.signature(model.forward).parameters
    return next((n for n in ARGUMENTS if n in parameters), None) if "input_ids" in parameters else None


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: in an attribute of a layer or (None) of the cache itself; `key` where that is a dict or a
    list. `grows`: it has a row for each position, on its axis before the last; else it is a state of one size."""

    layer: int | None
    name: str
    key: Any = None
    grows: bool = False

    def holder(self, cache: Any) -> Any:
        return cache if self.layer is None else cache.layers[self.layer]

    def get(self, cache: Any) -> Tensor:
        held = getattr(self.holder(cache), self.name)
        return held if self.key is None else held[self.key]

    def put(self, cache: Any, t: Tensor) -> None:
        if self.key is None:
            setattr(self.holder(cache), self.name, t)
        else:
            getattr(self.holder(cache), self.name)[self.key] = t


class CacheLayout:
    """Which tensors a model's cache holds, and how to put others in their place.

    Layers that keep the last positions of a sliding window or chunk count in Python what they dropped; here they keep
    all, as the mask lets each query see its window only. States start as zeros, which is what the first tokens of a
    sequence see. Raises CompileError for a cache that counts in Python otherwise, or whose states do not start so.
    """

    def __init__(self, model: Any, ids: Callable[[int, int], Tensor]):
        argument = cache_argument(model)
        assert argument is not None
        self.model, self.ids, self.argument = model, ids, argument
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.start: Any = None  # a cache before any token; None: the model makes it
        self.template = self._started()
        shorter, longer = self._own(2, 3)[1], self._own(2, 4)[1]
        self._check_counts(shorter, longer)
        self.places = [
            Place(p.layer, p.name, p.key, p.get(shorter).shape != p.get(longer).shape) for p in _places(self.template)
        ]
        if not self.places:
            raise no_generation(f"{type(model).__name__} returned a cache without tensors")
        self._check_start()

    def run(self, batch: int, length: int) -> list[Tensor]:
        """The cache's tensors after the model's own run on `length` tokens."""
        return self.flat(self._own(batch, length)[1])

    def flat(self, cache: Any) -> list[Tensor]:
        return [place.get(cache) for place in self.places]

    def cache(self, past: list[Tensor]) -> Any:
        """A cache of `past`, which its layers may overwrite without the tensors being changed."""
        cache = _copied(self.template)
        for place, t in zip(self.places, past, strict=True):
            place.put(cache, t if place.grows else t.clone())
        return cache

    def lengths(self, past: list[Tensor]) -> list[Any]:
        """How many positions the growing tensors have."""
        return [t.shape[-2] for place, t in zip(self.places, past, strict=True) if place.grows]

    def call(self, cache: Any, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Any]:
        """The model's logits and its cache after ids [B, S], with a mask [B, P + S]; `cache` None: of no tokens."""
        named: dict[str, Any] = {}
        if cache is None:
            cache = None if self.start is None else _copied(self.start)
        elif not any(place.grows for place in self.places):  # padding is in the states already
            attention_mask = attention_mask[:, attention_mask.shape[1] - input_ids.shape[1] :]
        if self.takes_positions:  # they count the tokens of a row, so that padding shifts nothing
            positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
            named["position_ids"] = positions[:, attention_mask.shape[1] - input_ids.shape[1] :]
        if cache is not None:
            named[self.argument] = cache
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **named)
        return out.logits, getattr(out, self.argument, None)

    def continues(self, new: int) -> bool:
        """Whether `new` tokens after others, some of them padding, get the logits that they get in one run."""
        ids, old = self.ids(2, _OLD + new), _OLD
        mask = torch.ones_like(ids)
        mask[0, : old - 1] = 0
        with torch.no_grad():
            want, _ = self.call(None, ids, mask)
            _, cache = self.call(None, ids[:, :old], mask[:, :old])
            past = self.flat(cache)
            try:
                got, _ = self.call(self.cache(past), ids[:, old:], mask)
            except (RuntimeError, ValueError, IndexError):  # of shapes that do not fit
                return False
        return close(got[:, -1], want[:, -1])

    def _own(self, batch: int, length: int) -> tuple[Tensor, Any]:
        ids = self.ids(batch, length)
        with torch.no_grad():
            logits, cache = self.call(None, ids, torch.ones_like(ids))
        if not getattr(cache, "layers", None):
            raise no_generation(f"{type(self.model).__name__} returned {type(cache).__name__}, no cache of layers")
        return logits, cache

    def _started(self) -> Any:
        """A cache after one token, whose layers drop nothing."""
        from transformers.cache_utils import DynamicLayer

        cache = self._own(1, 1)[1]
        dropping = [i for i, layer in enumerate(cache.layers) if getattr(layer, "is_sliding", False)]
        for i in dropping:
            layer = cache.layers[i]
            if hasattr(layer, "conv_states"):
                raise no_generation("a layer of its cache has both a sliding window and states")
            cache.layers[i] = growing = DynamicLayer()
            growing.lazy_initialization(layer.keys, layer.values)
            growing.keys, growing.values = layer.keys, layer.values
        if dropping:
            self.start = _emptied(cache)
        return cache

    def _check_counts(self, shorter: Any, longer: Any) -> None:
        """Numbers that a cache keeps must not depend on how many tokens it saw."""
        for one, two in zip((shorter, *shorter.layers), (longer, *longer.layers), strict=True):
            for name, x in vars(one).items():
                if isinstance(x, int) and not isinstance(x, bool) and x != vars(two)[name]:
                    raise no_generation(f"a {type(one).__name__} of its cache counts positions in Python ({name})")

    def _check_start(self) -> None:
        """Zeros for all that has a size must do what no cache does."""
        logits, own = self._own(2, 3)
        past = [
            t[..., :0, :] if place.grows else torch.zeros_like(t)
            for place, t in zip(self.places, self.flat(own), strict=True)
        ]
        ids = self.ids(2, 3)
        with torch.no_grad():
            ours, _ = self.call(self.cache(past), ids, torch.ones_like(ids))
        if not close(ours, logits):
            raise no_generation("its states do not start from zeros")


def close(got: Tensor, want: Tensor) -> bool:
    """Whether logits are the same but for rounding."""
    return got.shape == want.shape and torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def _places(cache: Any) -> Iterator[Place]:
    """Where public attributes of a cache and its layers hold tensors: by themselves, in a dict, in a list."""
    for i, held in ((None, cache), *enumerate(cache.layers)):
        for name, x in sorted(vars(held).items()):
            if name.startswith("_") or (i is None and name == "layers"):
                continue
            if isinstance(x, Tensor) and x.dim() > 1:
                yield Place(i, name)
            elif isinstance(x, dict | list):
                items = x.items() if isinstance(x, dict) else enumerate(x)
                yield from (Place(i, name, key) for key, t in items if isinstance(t, Tensor))


def _copied(cache: Any) -> Any:
    """A cache with layers, dicts and lists of its own."""
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    for held in (new, *new.layers):
        for name, x in vars(held).items():
            if isinstance(x, dict | list) and name != "layers":
                setattr(held, name, copy.copy(x))
    return new


def _emptied(cache: Any) -> Any:
    """A copy as it was before any token."""
    new = _copied(cache)
    for layer in new.layers:
        for name, x in vars(layer).items():
            if isinstance(x, Tensor) and x.dim() > 1:
                setattr(layer, name, x[:0] if x.dim() < 3 else x.new_zeros(0))
            elif isinstance(x, dict) and name.startswith(("is_", "has_")):
                setattr(layer, name, dict.fromkeys(x, False))
    return new
