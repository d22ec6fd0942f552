"""What torch was asked about sizes while tracing, also where it knew the answer from what it was asked before.

A branch `n > 100` behind one over `n <= 8` leaves no guard: torch knows it. It matters once the first turns out to make
no difference.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sympy

from moec.frontend.decisions import Ask, Question, deciding
from moec.frontend.locate import import_path, is_users
from moec.ir import Location

Asked = dict[sympy.Basic, Location]  # what was true → the user's line that asked


@contextmanager
def asking() -> Iterator[Asked]:
    """Within, in this thread: conditions on the sizes of inputs that torch decides. Yields a record of them."""
    record: Asked = {}

    def decide(question: Question, ask: Ask) -> Any:
        result = ask()
        if question.fallback is None or result != question.fallback:
            symbols = getattr(question.expr, "free_symbols", None)
            if symbols and symbols <= question.env.backed_var_to_val.keys():
                held = _held(question.expr, result)
                if held is not None:
                    record.setdefault(held, _users_line())
        return result

    with deciding(decide):
        yield record


def _held(expr: Any, result: Any) -> sympy.Basic | None:
    if isinstance(expr, sympy.logic.boolalg.Boolean) and not expr.is_Symbol:  # to sympy, symbols are both
        return expr if result in (True, sympy.true) else sympy.Not(expr)
    return sympy.Eq(expr, result) if isinstance(result, int | sympy.Integer) else None


def _users_line() -> Location:
    frame: Any = sys._getframe(2)
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return Location.at("", import_path(frame.f_code.co_filename), frame.f_lineno) if frame is not None else Location()
