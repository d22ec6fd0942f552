"""One error for everything that is wrong with a checkpoint."""

from __future__ import annotations

from typing import NoReturn

from moec.ir import CompileError

SHOWN = 40  # complaints listed in full; of the others, how many


class Problems:
    """Complaints about one checkpoint, collected so that its user sees all of them at once."""

    def __init__(self, where: str):
        self.where = where
        self.found: dict[str, None] = {}

    def add(self, problem: str) -> None:
        self.found[problem if len(problem) <= 300 else problem[:297] + "..."] = None

    def check(self) -> None:
        """Raise CompileError where there are any."""
        if self.found:
            self.stop()

    def stop(self) -> NoReturn:
        """Raise CompileError listing them."""
        listed = list(self.found)
        more = len(listed) - SHOWN
        lines = listed if more <= 0 else [*listed[:SHOWN], f"… and {more} more"]
        what = "1 problem" if len(listed) == 1 else f"{len(listed)} problems"
        text = "".join(f"\n  {line if line.isprintable() else ascii(line)}" for line in lines)
        raise CompileError(f"the checkpoint {self.where} has {what}:{text}", code="checkpoint")
