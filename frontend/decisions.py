"""The one place where torch's decisions about sizes are watched or made while it traces."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch.fx.experimental.symbolic_shapes import ShapeEnv, uninteresting_files

from moec.frontend.replaced import replaced


class Question(NamedTuple):
    """What torch is asked while tracing: an expression over sizes, in the record `env` of all of them. `hint` is the
    value it has for the example, if the asker knows it, `fallback` the one that is right for any size, if there is."""

    env: Any
    expr: Any
    hint: Any
    fallback: Any


# Gives torch's answer, with another fallback than the asker's where one is given
Ask = Callable[..., Any]


@contextmanager
def deciding(decide: Callable[[Question, Ask], Any]) -> Iterator[None]:
    """Within, in this thread: what torch asks about sizes is answered by `decide`, which may leave it to torch.

    They nest: the inner one is asked first. Exports of several threads take turns, see stand_ins.
    """
    original: Any = ShapeEnv._evaluate_expr
    thread = threading.get_ident()
    uninteresting_files().update((__file__, decide.__code__.co_filename))  # guards name the innermost line of others

    def evaluate(self: Any, expr: Any, hint: Any = None, node: Any = None, oblivious: bool = False,
                 fallback: Any = None, **more: Any) -> Any:  # fmt: skip
        def ask(fallback: Any = fallback) -> Any:
            return original(self, expr, hint, node, oblivious, fallback, **more)

        if threading.get_ident() != thread:
            return ask()
        return decide(Question(self, expr, hint, fallback), ask)

    with replaced(ShapeEnv, "_evaluate_expr", evaluate):  # torch has no hook
        yield
