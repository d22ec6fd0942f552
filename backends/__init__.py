"""Backends: what runs a graph."""

from moec.backends.base import BACKENDS, Backend, Executable, get_backend

__all__ = ["BACKENDS", "Backend", "Executable", "get_backend"]
