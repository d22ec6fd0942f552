"""What torch was asked about sizes while tracing, also where it knew the answer from what it was asked before.

A branch `n > 100` behind one over `n <= 8` leaves no guard: torch knows it. It matters once the first turns out to make
no difference.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import sympy
from torch.fx.experimental.symbolic_shapes import ShapeEnv, uninteresting_files

from moec.frontend.locate import import_path, is_users
from moec.ir import Location

Asked = dict[sympy.Basic, Location]  # what was true → the user's line that asked

_asked: ContextVar[Asked | None] = ContextVar("_asked", default=None)


@contextmanager
def asking() -> Iterator[Asked]:
    """Within, in this thread: conditions on the sizes of inputs that torch decides. Yields a record of them.

    Exports of several threads take turns, see stand_ins.
    """
    record: Asked = {}
    token = _asked.set(record)
    original: Any = ShapeEnv._evaluate_expr
    uninteresting_files().add(__file__)  # guards name the innermost line of other files

    def evaluate(self: Any, expr: Any, hint: Any = None, node: Any = None, oblivious: bool = False,
                 fallback: bool | None = None, **more: Any) -> Any:  # fmt: skip
        result = original(self, expr, hint, node, oblivious, fallback, **more)
        known = _asked.get()
        # the fallback is what is right for any size
        if known is not None and (fallback is None or result != fallback):
            symbols = getattr(expr, "free_symbols", None)
            if symbols and symbols <= self.backed_var_to_val.keys():
                held = _held(expr, result)
                if held is not None and held not in known:
                    known[held] = _users_line()
        return result

    ShapeEnv._evaluate_expr = evaluate  # type: ignore[method-assign, assignment]  # torch has no hook
    try:
        yield record
    finally:
        ShapeEnv._evaluate_expr = original  # type: ignore[method-assign]  # as it was
        _asked.reset(token)


def _held(expr: Any, result: Any) -> sympy.Basic | None:
    if isinstance(expr, sympy.logic.boolalg.Boolean):
        return expr if result in (True, sympy.true) else sympy.Not(expr)
    return sympy.Eq(expr, result) if isinstance(result, int | sympy.Integer) else None


def _users_line() -> Location:
    frame: Any = sys._getframe(2)
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return Location.at("", import_path(frame.f_code.co_filename), frame.f_lineno) if frame is not None else Location()
