"""Result and argument classes of transformers, known to pytree."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

# modules whose import registers ModelOutput subclasses; nothing else of a saved signature is ever imported
_MODULES = re.compile(r"transformers\.(modeling_outputs|cache_utils|models\.\w+\.modeling_\w+)")


def register_caches() -> None:
    """Let transformers register DynamicCache, where transformers is in use (it does so on request only)."""
    if "transformers.cache_utils" in sys.modules:
        importlib.import_module("transformers.integrations.executorch").register_dynamic_cache_export_support()


def import_classes(spec: Any) -> None:
    """Import the transformers classes that a serialised TreeSpec names, where transformers is installed."""
    for name in _type_names(spec):
        module = name.rpartition(".")[0]
        if _MODULES.fullmatch(module):
            try:
                importlib.import_module(module)
            except ImportError:
                continue
    register_caches()


def _type_names(spec: Any) -> Iterator[str]:
    if isinstance(spec, Mapping):
        if isinstance(spec.get("type"), str):
            yield spec["type"]
        for v in spec.values():
            yield from _type_names(v)
    elif isinstance(spec, list):
        for v in spec:
            yield from _type_names(v)
