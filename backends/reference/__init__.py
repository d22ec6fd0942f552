"""The reference backend: every op by its own definition; the oracle of every test."""

from moec.backends.reference.backend import backend

__all__ = ["backend"]
