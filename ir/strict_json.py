"""JSON that came from elsewhere."""

from __future__ import annotations

import json
from typing import Any


def strict_json(data: bytes, constants: bool = False) -> Any:
    """JSON as the standard has it: UTF-8, no name twice in an object, and no NaN or Infinity unless `constants` lets
    them through (Python writes them). Raises ValueError."""

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no number of JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_once, parse_constant=None if constants else constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _once(found: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(found)
    if len(result) != len(found):
        names = [k for k, _ in found]
        raise ValueError(f"an object has the name {next(k for k in names if names.count(k) > 1)!r} twice")
    return result
