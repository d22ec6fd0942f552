"""How many positions a language model was made for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

_STRETCHED = ("yarn", "linear", "llama3")  # by a factor, over a context that may be named beside it


def positions(config: Any) -> int | None:
    """What the config of a model says, or as many as its rotary frequencies are stretched over where that is more; None
    where it says nothing."""
    said = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_position")]
    most = next((n for n in said if _is_number(n) and isinstance(n, int) and n > 0), None)
    if most is None:
        return None
    return max([most, *(int(f * (of if _is_number(of) else most)) for f, of in _stretches(config) if _is_number(f))])


def _stretches(config: Any) -> Iterator[tuple[Any, Any]]:
    """Factors, and the contexts that they are of where those are said."""
    for own in (getattr(config, name, None) for name in ("yarn", "llama3")):  # of our own models
        yield getattr(own, "factor", None), getattr(own, "original_max_position", None)
    yield getattr(config, "rope_factor", None), None
    for said in (getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")):  # of transformers'
        if isinstance(said, Mapping):
            kinds = [p for p in said.values() if isinstance(p, Mapping)]  # one for each kind of layer
            for p in kinds or [said]:
                if p.get("rope_type", p.get("type")) in _STRETCHED:
                    yield p.get("factor"), p.get("original_max_position_embeddings")


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
