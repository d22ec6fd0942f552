"""What torch was asked about sizes while tracing, also where it knew the answer from what it was asked before.

A branch `n > 100` behind one over `n <= 8` leaves no guard: torch knows it. It matters once the first turns out to make
no difference.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import sympy
import torch

from moec.frontend.decisions import Ask, Question, deciding
from moec.frontend.locate import import_path, is_users
from moec.ir import Location


class Asker(NamedTuple):
    """The user's line that asked, and whether it did so itself: a branch of the model, not of an op that it calls."""

    line: Location
    itself: bool


Asked = dict[sympy.Basic, Asker]  # by what was true


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
                if held is not None and not (held in record and record[held].itself):
                    asker = _asker()
                    record[held] = asker if asker.itself else record.get(held, asker)
        return result

    with deciding(decide):
        yield record


def _held(expr: Any, result: Any) -> sympy.Basic | None:
    if isinstance(expr, sympy.logic.boolalg.Boolean) and not expr.is_Symbol:  # to sympy, symbols are both
        return expr if result in (True, sympy.true) else sympy.Not(expr)
    return sympy.Eq(expr, result) if isinstance(result, int | sympy.Integer) else None


def _asker() -> Asker:
    frame: Any = sys._getframe(2)
    called: Any = None
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame, called = frame.f_back, frame
    if frame is None:
        return Asker(Location(), False)
    # bool(size), int(size): ops ask torch's record without
    itself = called is not None and called.f_code.co_filename == torch.__file__
    return Asker(Location.at("", import_path(frame.f_code.co_filename), frame.f_lineno), itself)
