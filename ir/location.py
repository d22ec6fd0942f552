"""Where in the user's model a node comes from."""

from __future__ import annotations

import inspect
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Frame:
    """One source position: module path in the model, and file:line of the code."""

    module: str = ""
    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.file else ""
        return " ".join(x for x in (self.module, where) if x) or "?"


@dataclass(frozen=True)
class Location:
    """The set of frames a node stands for; a fused node keeps those of all it replaced, in order."""

    frames: tuple[Frame, ...] = ()

    @staticmethod
    def at(module: str = "", file: str = "", line: int = 0) -> Location:
        return Location((Frame(module, file, line),)) if module or file else Location()

    @staticmethod
    def merge(*locations: Location) -> Location:
        return Location(tuple(dict.fromkeys(f for loc in locations for f in loc.frames)))

    @property
    def module(self) -> str:
        """The longest module path that all frames share."""
        paths = [f.module.split(".") for f in self.frames if f.module]
        if not paths:
            return ""
        common: list[str] = []
        for parts in zip(*paths, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        return ".".join(common)

    @property
    def layer(self) -> int | None:
        """The first number among the parts of the module path (`layers.3.mlp` → 3)."""
        return next((int(part) for part in self.module.split(".") if part.isdecimal()), None)

    def under(self, module: str) -> bool:
        """Whether any frame lies in `module` (a dotted prefix)."""
        return any(f.module == module or f.module.startswith(module + ".") for f in self.frames)

    def describe(self) -> str:
        if not self.frames:
            return "?"
        first, more = self.frames[0], len(self.frames) - 1
        if not more:
            return str(first)
        common = "" if self.module and self.module == first.module else f"{self.module or '(model)'}, "
        return f"{common}{first} and {more} more"

    def __bool__(self) -> bool:
        return bool(self.frames)


def source_of_class(cls: type) -> tuple[str, int]:
    """File and line of a class, ("", 0) where it has none. Where its text is out of reach (a notebook, exec), those
    of its first method, else of a base's."""
    try:
        return inspect.getsourcefile(cls) or "", inspect.getsourcelines(cls)[1]
    except (OSError, TypeError):
        for base in cls.__mro__:
            codes = [fn.__code__ for fn in vars(base).values() if inspect.isfunction(fn)]
            written = [(c.co_firstlineno, c.co_filename) for c in codes if c.co_filename != "<string>"]  # a dataclass's
            if written:
                line, file = min(written)
                return file, line
        return "", 0
