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
from typing import Any, NamedTuple

import sympy
from torch.fx.experimental.symbolic_shapes import ShapeEnv, uninteresting_files

from moec.frontend.locate import is_users


class Jump(NamedTuple):
    """A conditional jump: its function's file, name and first line, where its instruction begins (at its EXTENDED_ARG)
    and ends, and its line."""

    file: str
    function: str
    first: int
    start: int
    end: int
    line: int


_MANY = 1_000_003
_OFTEN = 100_000  # times that a branch may ask: for each expert of each layer, but not for ever
_ABSENT: Any = object()

# branches of the model that were decided in this thread
_decided: ContextVar[set[Jump] | None] = ContextVar("_decided", default=None)


@contextmanager
def something_found() -> Iterator[set[Jump]]:
    """Within, in this thread: torch takes sizes that depend on values as not 0, and bools as true, where a branch of
    the model asks for it. Yields the branches of the model that do.

    Exports of several threads take turns, see stand_ins.
    """
    jumps: set[Jump] = set()
    times: Counter[Jump] = Counter()
    token = _decided.set(jumps)
    original: Any = ShapeEnv._evaluate_expr
    uninteresting_files().add(__file__)  # guards name the innermost line of other files (torch keeps this set)

    def evaluate(self: Any, expr: Any, hint: Any = None, node: Any = None, oblivious: bool = False,
                 fallback: bool | None = None, **more: Any) -> Any:  # fmt: skip
        known = _decided.get()
        if known is None or fallback is not None or hint is not None:
            return original(self, expr, hint, node, oblivious, fallback, **more)
        found = _if_found(self, expr)
        jump = None if found is None else _users_jump(sys._getframe())
        if found is None or jump is None:
            return original(self, expr, hint, node, oblivious, fallback, **more)
        result = original(self, expr, hint, node, oblivious, _ABSENT, **more)
        if result is not _ABSENT:  # torch knew
            return result
        known.add(jump)
        times[jump] += 1
        if times[jump] > _OFTEN:
            return original(self, expr, hint, node, oblivious, fallback, **more)
        return sympy.true if found else sympy.false

    ShapeEnv._evaluate_expr = evaluate  # type: ignore[method-assign, assignment]  # torch has no hook
    try:
        yield jumps
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


def _users_jump(frame: FrameType | None) -> Jump | None:
    """The branch of the user's code below a frame that asks; None if an op that it calls does."""
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return None
    instructions = [i for i in dis.get_instructions(frame.f_code) if i.offset <= frame.f_lasti]
    rest = (i for i in dis.get_instructions(frame.f_code) if i.offset > frame.f_lasti)
    at = instructions[-1]
    if at.opname in ("TO_BOOL", "UNARY_NOT"):  # what is jumped on, or goes into a variable and is never seen to
        following = next((i for i in rest if i.opname != "EXTENDED_ARG"), at)
        at = following if _jumps(following.opname) else at
    elif not _jumps(at.opname):
        return None
    start, before = at.offset, {i.offset: i for i in instructions}
    while (i := before.get(start - 2)) is not None and i.opname == "EXTENDED_ARG":
        start -= 2
    return Jump(*_code(frame), start, at.offset, frame.f_lineno)


def _jumps(opname: str) -> bool:
    return "JUMP" in opname and "_IF_" in opname and "BACKWARD" not in opname  # that is `while`


def _code(frame: FrameType) -> tuple[str, str, int]:
    code = frame.f_code
    return code.co_filename, code.co_qualname, code.co_firstlineno


class Taken:
    """Which instruction Python went to after the given jumps: one that went both ways has two."""

    def __init__(self, jumps: Set[Jump]):
        self.after: dict[Jump, set[int]] = {jump: set() for jump in jumps}
        self._of: dict[Any, dict[int, Jump]] = {}
        for jump in jumps:
            self._of.setdefault(jump[:3], {})[jump.start] = jump

    @property
    def missing(self) -> set[Jump]:
        """The jumps that went one way only, or were not reached."""
        return {jump for jump, after in self.after.items() if len(after) < 2}

    def add(self, other: Taken) -> None:
        for jump, after in other.after.items():
            self.after[jump] |= after

    def __enter__(self) -> Taken:
        if self.after:
            self._before = sys.gettrace()
            sys.settrace(self._called)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.after:
            sys.settrace(self._before)

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        jumps = self._of.get(_code(frame))
        if jumps is None:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        last: list[Jump | None] = [None]

        def stepped(frame: FrameType, event: str, argument: Any) -> Any:
            if event == "opcode":
                at, jump = frame.f_lasti, last[0]
                if jump is not None and jump.start < at <= jump.end:  # behind its EXTENDED_ARG
                    return stepped
                if jump is not None:
                    self.after[jump].add(at)
                last[0] = jumps.get(at)
            return stepped

        return stepped
