"""A progress line for work that takes longer than two seconds, only on a terminal."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

DELAY = 2.0  # seconds before anything is shown


@contextmanager
def progress(title: str) -> Iterator[Callable[[str], None]]:
    """Yields `step(name)`, to be called as work proceeds. Writes to standard error, and only where it is a
    terminal; the line disappears at the end."""
    if not sys.stderr.isatty():
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(title)
    lock, done = threading.Lock(), False

    def show() -> None:
        with lock:
            if not done:
                bar.start()

    timer = threading.Timer(DELAY, show)
    timer.daemon = True
    timer.start()
    try:
        yield lambda name: bar.update(task, description=f"{title}: {name}")
    finally:
        timer.cancel()
        with lock:
            done = True
            bar.stop()
