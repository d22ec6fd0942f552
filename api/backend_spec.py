"""Backends by text: a name, or where one of the user's own is."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

from moec.backends import BACKENDS, Backend, get_backend
from moec.ir import ArgumentValueError


def parse_backend(text: str) -> str | Backend:
    """`reference`, `onnxruntime`, `triton`, `eager` or `auto` as they are; `module:name` or `path.py:name` is the
    Backend of that name there; an .onnx file, for comparisons, as it is. Raises ArgumentValueError."""
    text = text.strip()
    if text.endswith(".onnx"):
        return text
    place, colon, name = text.rpartition(":")
    if not colon:
        if text != "eager":
            get_backend(text)
        return text
    try:
        found = getattr(_module(place), name)
    except (ImportError, AttributeError, OSError) as e:
        raise ArgumentValueError(f"cannot import backend {text!r}: {e}", code="backend") from None
    if not isinstance(found, Backend):
        raise ArgumentValueError(f"{text} is a {type(found).__name__}, not a Backend", code="backend")
    return found


def parse_backends(text: str) -> list[str | Backend]:
    """Comma-separated backends. Raises ArgumentValueError."""
    found = [parse_backend(part) for part in text.split(",") if part.strip()]
    if not found:
        raise ArgumentValueError(f"no backends in {text!r}", code="backend", hint=f"eager, {', '.join(BACKENDS)}")
    return found


def _module(place: str):
    if not place.endswith(".py"):
        sys.path.insert(0, "")
        try:
            return importlib.import_module(place)
        finally:
            sys.path.remove("")
    path = Path(place).resolve()
    name = f"moec_backend_{path.stem}"
    loader = importlib.util.spec_from_file_location(name, path)
    if loader is None or loader.loader is None:
        raise ImportError(f"{place} is no Python file")
    module = importlib.util.module_from_spec(loader)
    sys.modules[name] = module
    loader.loader.exec_module(module)
    return module
