"""transformers' caches and result classes under torch.export. Nothing here imports transformers unless a model or a
saved folder uses it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moec.frontend.containers import CLASS_MODULES
from moec.frontend.replaced import replaced


def register() -> None:
    """Where transformers is in use, let its DynamicCache be taken apart, as its own export does."""
    if "transformers.cache_utils" in sys.modules:
        from transformers.integrations.executorch import register_dynamic_cache_export_support

        register_dynamic_cache_export_support()


@contextmanager
def traceable_caches() -> Iterator[None]:
    """While inside, a fresh cache layer starts from empty slices of its first keys and values. It starts from constant
    tensors otherwise, which torch 2.13 loses when it decomposes the exported program."""
    register()
    cache_utils = sys.modules.get("transformers.cache_utils")
    if cache_utils is None:
        yield
        return

    def start(self: Any, keys: Any, values: Any) -> None:
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys[..., :0, :], values[..., :0, :]
        self.is_initialized = True

    with replaced(cache_utils.DynamicLayer, "lazy_initialization", start):
        yield


def import_class(name: str) -> None:
    """Import the module of one of transformers' model or result classes, which registers it; of another class nothing.
    Raises ImportError."""
    module = name.rpartition(".")[0]
    if CLASS_MODULES.fullmatch(module):
        importlib.import_module(module)
        register()
