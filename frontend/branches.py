"""Branches over whether something was found, as loops over experts have them (`if tokens.numel() == 0: continue`).

They are traced as if something was, and that is not taken for granted: the program is compared with the model on
inputs for which the model goes either way (see recheck), or refused.
"""

from __future__ import annotations

import dis
import sys
from collections import Counter
from collections.abc import Iterator, Set
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

import sympy
from torch.fx.experimental.symbolic_shapes import ShapeEnv, uninteresting_files

from moec.frontend.locate import is_users

Line = tuple[str, int]  # file and number
_MANY = 1_000_003
_OFTEN = 100_000  # times that a line may ask: for each expert of each layer, but not for ever
_ABSENT: Any = object()

# lines of the model whose branch was decided in this thread
_decided: ContextVar[set[Line] | None] = ContextVar("_decided", default=None)


@contextmanager
def something_found() -> Iterator[set[Line]]:
    """Within, in this thread: torch takes sizes that depend on values as not 0, and bools as true, where a branch of
    the model asks for it. Yields the lines of the model that do.

    Exports of several threads take turns, see stand_ins.
    """
    lines: set[Line] = set()
    times: Counter[Line] = Counter()
    token = _decided.set(lines)
    original: Any = ShapeEnv._evaluate_expr
    uninteresting_files().add(__file__)  # guards name the innermost line of other files (torch keeps this set)

    def evaluate(self: Any, expr: Any, hint: Any = None, node: Any = None, oblivious: bool = False,
                 fallback: bool | None = None, **more: Any) -> Any:  # fmt: skip
        known = _decided.get()
        if known is None or fallback is not None or hint is not None:
            return original(self, expr, hint, node, oblivious, fallback, **more)
        found = _if_found(self, expr)
        line = None if found is None else _users_line(sys._getframe())
        if found is None or line is None:
            return original(self, expr, hint, node, oblivious, fallback, **more)
        result = original(self, expr, hint, node, oblivious, _ABSENT, **more)
        if result is not _ABSENT:  # torch knew
            return result
        known.add(line)
        times[line] += 1
        if times[line] > _OFTEN:
            return original(self, expr, hint, node, oblivious, fallback, **more)
        return sympy.true if found else sympy.false

    ShapeEnv._evaluate_expr = evaluate  # type: ignore[method-assign, assignment]  # torch has no hook
    try:
        yield lines
    finally:
        ShapeEnv._evaluate_expr = original  # type: ignore[method-assign]  # as it was
        _decided.reset(token)


def _if_found(env: Any, expr: Any) -> bool | None:
    """What a condition over one size or bool known only at run time is where something was found, if it asks for just
    that: other sizes than 0 are all the same to it."""
    symbols = getattr(expr, "free_symbols", ())
    if len(symbols) != 1 or not isinstance(expr, sympy.logic.boolalg.Boolean):
        return None
    symbol = next(iter(symbols))
    if symbol in env.backed_var_to_val or not symbol.is_integer:
        return None
    known = env.var_to_range.get(symbol)
    places = (1,) if known is not None and known.upper == 1 else (1, 2, _MANY)
    empty, found = expr.subs(symbol, 0), [expr.subs(symbol, n) for n in places]
    if len(set(found)) != 1 or found[0] == empty or not {empty, found[0]} <= {sympy.true, sympy.false}:
        return None
    return found[0] is sympy.true


def _users_line(frame: FrameType | None) -> Line | None:
    """The line of the user's code below a frame, where it is a branch that asks; not if an op that it calls does."""
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return None
    instruction = dis.opname[frame.f_code.co_code[frame.f_lasti]]
    jumps = "JUMP" in instruction and "_IF_" in instruction and "BACKWARD" not in instruction  # that is `while`
    asks = jumps or instruction in ("TO_BOOL", "UNARY_NOT")
    return (frame.f_code.co_filename, frame.f_lineno) if asks else None


class Taken:
    """Which lines Python went to after the given ones: a branch that went both ways has two."""

    def __init__(self, lines: Set[Line]):
        self.after: dict[Line, set[int | None]] = {line: set() for line in lines}
        self._files = {file for file, _ in lines}

    @property
    def missing(self) -> set[Line]:
        """The lines that went one way only, or were not reached."""
        return {line for line, after in self.after.items() if len(after) < 2}

    def add(self, other: Taken) -> None:
        for line, after in other.after.items():
            self.after[line] |= after

    def __enter__(self) -> Taken:
        if self.after:
            self._before = sys.gettrace()
            sys.settrace(self._called)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.after:
            sys.settrace(self._before)

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        last: list[Line | None] = [None]

        def stepped(frame: FrameType, event: str, argument: Any) -> Any:
            if event in ("line", "return"):
                if last[0] in self.after:
                    self.after[last[0]].add(frame.f_lineno if event == "line" else None)
                last[0] = (frame.f_code.co_filename, frame.f_lineno)
            return stepped

        return stepped
