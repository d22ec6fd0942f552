"""The caches of transformers' models as a list of tensors: keys and values, latents, indexer keys, states of
recurrences and convolutions, whatever a layer holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moec.generation import no_generation

Place = tuple[int, str, Any]  # layer, attribute, key in it where it is a dict


class CacheLayout:
    """Which tensors a model's cache holds, and how to put others in their place.

    Layers that keep the last positions of a sliding window or chunk count in Python what they dropped; here they keep
    all, as the mask lets each query see its window only. States start as zeros, which is what the first tokens of a
    sequence see. Raises CompileError for a cache that counts in Python otherwise, or whose states do not start so.
    """

    def __init__(self, model: Any, ids: Callable[[int, int], Tensor]):
        self.model, self.ids = model, ids
        self.template = self._started()
        self.places = _places(self.template)
        if not self.places:
            raise no_generation(f"{type(model).__name__} returned a cache without tensors")
        self._check_counts()
        self._check_start()

    def run(self, batch: int, length: int) -> list[Tensor]:
        """The cache's tensors after the model's own run on `length` tokens."""
        return self.flat(self._own(batch, length)[1])

    def flat(self, cache: Any) -> list[Tensor]:
        return [_get(cache, place) for place in self.places]

    def cache(self, past: list[Tensor]) -> Any:
        """A cache of `past`, which its layers may overwrite without the tensors being changed."""
        cache = _copied(self.template)
        for (layer, name, key), t in zip(self.places, past, strict=True):
            held = cache.layers[layer]
            if key is None:
                setattr(held, name, t)
            else:
                getattr(held, name)[key] = t.clone()  # these layers copy into what they hold
        return cache

    def lengths(self, past: list[Tensor]) -> list[Any]:
        """How many positions the growing tensors have: their axis before the last."""
        return [t.shape[-2] for (_, _, key), t in zip(self.places, past, strict=True) if key is None]

    def _own(self, batch: int, length: int) -> tuple[Tensor, Any]:
        cache = getattr(self, "template", None)
        with torch.no_grad():
            out = self.model(
                input_ids=self.ids(batch, length),
                use_cache=True,
                **({} if cache is None else {"past_key_values": _copied(cache, empty=True)}),
            )
        cache = getattr(out, "past_key_values", None)
        if not getattr(cache, "layers", None):
            raise no_generation(f"{type(self.model).__name__} returned {type(cache).__name__}, no cache of layers")
        return out.logits, cache

    def _started(self) -> Any:
        """A cache after one token, whose layers drop nothing."""
        from transformers.cache_utils import DynamicLayer

        cache = self._own(1, 1)[1]
        for name, held in vars(cache).items():
            if name != "layers" and any(isinstance(x, Tensor) for x in pytree.tree_leaves(held)):
                raise no_generation(f"its cache holds tensors outside of its layers, as {name!r}")
        for i, layer in enumerate(cache.layers):
            if getattr(layer, "is_sliding", False):
                if hasattr(layer, "conv_states"):
                    raise no_generation("a layer of its cache has both a sliding window and states")
                cache.layers[i] = growing = DynamicLayer()
                growing.lazy_initialization(layer.keys, layer.values)
                growing.keys, growing.values = layer.keys, layer.values
        return cache

    def _check_counts(self) -> None:
        """Numbers that the layers keep must not depend on how many tokens they saw."""
        for one, two in zip(self._own(2, 3)[1].layers, self._own(2, 4)[1].layers, strict=True):
            for name, x in vars(one).items():
                if isinstance(x, int) and not isinstance(x, bool) and x != vars(two)[name]:
                    raise no_generation(f"a {type(one).__name__} of its cache counts positions in Python ({name})")

    def _check_start(self) -> None:
        """Zeros for all that has a size must do what no cache does."""
        logits, own = self._own(2, 3)
        past = [
            torch.zeros_like(t) if key is not None else t[..., :0, :]
            for (_, _, key), t in zip(self.places, self.flat(own), strict=True)
        ]
        mask = torch.ones(2, 3, dtype=torch.int64)
        with torch.no_grad():
            ours = self.model(
                input_ids=self.ids(2, 3), attention_mask=mask, past_key_values=self.cache(past), use_cache=True
            ).logits
        if not torch.allclose(ours, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max())):
            raise no_generation("its states do not start from zeros")


def _places(cache: Any) -> list[Place]:
    """Where public attributes of layers hold tensors, by themselves or in a dict."""
    found: list[Place] = []
    for i, layer in enumerate(cache.layers):
        for name, x in sorted(vars(layer).items()):
            if name.startswith("_"):
                continue
            if isinstance(x, Tensor) and x.dim() > 1:
                found.append((i, name, None))
            elif isinstance(x, dict):
                found += [(i, name, key) for key, t in x.items() if isinstance(t, Tensor)]
    return found


def _get(cache: Any, place: Place) -> Tensor:
    layer, name, key = place
    held = getattr(cache.layers[layer], name)
    return held if key is None else held[key]


def _copied(cache: Any, empty: bool = False) -> Any:
    """A cache with layers and dicts of its own; `empty`: as before any token."""
    new = copy.copy(cache)
    new.layers = []
    for layer in cache.layers:
        held = copy.copy(layer)
        for name, x in vars(layer).items():
            if isinstance(x, dict):
                setattr(held, name, dict(x))
        if empty:
            _empty(held)
        new.layers.append(held)
    return new


def _empty(layer: Any) -> None:
    for name, x in vars(layer).items():
        if isinstance(x, Tensor) and x.dim() > 1:
            setattr(layer, name, x[:0] if x.dim() < 3 else x.new_zeros(0))
        elif isinstance(x, dict) and name.startswith(("is_", "has_")):
            setattr(layer, name, dict.fromkeys(x, False))
