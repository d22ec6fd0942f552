"""What is found where a law is held against a graph."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Broken:
    """A law that a graph breaks. `law` is the same for the same kind of mistake."""

    law: str
    message: str

    def __str__(self) -> str:
        return f"{self.law}: {self.message}"


@dataclass(frozen=True)
class Outcome:
    """`broken` is None where the law holds; `skipped` says why it could not be asked; `note`: how it was decided."""

    broken: Broken | None = None
    skipped: str | None = None
    note: str = ""
