"""Errors that reach a user: what went wrong, where, expected, got, and what could be done."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moec.ir.location import Location


class CompileError(Exception):
    """A problem with the input of the compiler.

    Attributes: `code` (a stable short word such as "unsupported-op"), `message`, `location` (module
    path and file:line, if known), `excerpt` (the IR around the problem, if any), `hint` (what to do).
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "invalid",
        location: Location | None = None,
        excerpt: str | None = None,
        hint: str | None = None,
    ):
        super().__init__(message)
        self.code = code
        self.message = message
        self.location = location
        self.excerpt = excerpt
        self.hint = hint

    def __str__(self) -> str:
        lines = [f"[{self.code}] {self.message}"]
        if self.location:
            lines.append(f"  at {self.location.describe()}")
        if self.excerpt:
            lines += ["  in:"] + [f"    {line}" for line in self.excerpt.splitlines()]
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)

    def located(self, location: Location | None, excerpt: str | None = None) -> CompileError:
        """The same error with a location and excerpt filled in where it had none."""
        self.location = self.location or location
        self.excerpt = self.excerpt or excerpt
        return self


class ArgumentTypeError(CompileError, TypeError):
    """An argument of the wrong count, kind or dtype."""


class ArgumentValueError(CompileError, ValueError):
    """An argument whose value or shape does not fit."""


class ArtifactError(CompileError, ValueError):
    """A saved folder that is corrupt, foreign or incomplete."""


def require(condition: object, message: str, *, hint: str | None = None) -> None:
    """Raise a CompileError with code "type" unless `condition` holds (used inside `infer`)."""
    if not condition:
        raise CompileError(message, code="type", hint=hint)
