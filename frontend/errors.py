"""torch's export errors → CompileError that says which line of the model, and what could be done."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import torch

from moec.frontend.locate import error_location
from moec.ir import CompileError

_BRANCH_HINT = (
    "replace loops and branches over tensor values by tensor ops (torch.where, masks, one-hot sums), and go through "
    "all experts: one without tokens does nothing; for transformers' experts load the model with "
    "experts_implementation='grouped_mm' or 'batched_mm'"
)


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Keep torch from logging errors that are raised, and reported by us, anyway; and from warning of itself."""
    names = [n for n in logging.root.manager.loggerDict if n.split(".")[0] == "torch"]
    handlers = list({h: None for n in ("torch", *names) for h in logging.getLogger(n).handlers})
    levels = [h.level for h in handlers]
    exporter = import_module("torch.export._trace").__dict__
    exporter["print"] = lambda *_, **__: None  # it prints the graph so far, to stderr
    for h in handlers:
        h.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*LeafSpec", category=FutureWarning)
            # torch's own recurrent layers keep a list of their parameters
            warnings.filterwarnings("ignore", message=r"The tensor attributes? \S*_flat_weights\[0\]")
            yield
    finally:
        exporter.pop("print", None)
        for h, level in zip(handlers, levels, strict=True):
            h.setLevel(level)


@contextmanager
def translated(model: torch.nn.Module | None, doing: str) -> Iterator[None]:
    """Turn whatever torch raises inside into a CompileError."""
    try:
        with quiet_torch():
            yield
    except CompileError:
        raise
    except Exception as e:
        raise translate(e, model, doing) from None


def translate(error: Exception, model: torch.nn.Module | None, doing: str) -> CompileError:
    location = error_location(error, model)
    names = {type(x).__name__ for x in _chain(error)}
    text = _first_lines(str(error))
    if names & {"GuardOnDataDependentSymNode", "DataDependentOutputException", "PendingUnbackedSymbolNotFound"}:
        return CompileError(
            f"the model's control flow depends on the values of a tensor: {text}",
            code="data-dependent",
            location=location,
            hint=_BRANCH_HINT,
        )
    if "DynamicOutputShapeException" in names:
        return CompileError(
            f"an op's result shape depends on the values of a tensor: {text}",
            code="data-dependent",
            location=location,
            hint=_BRANCH_HINT,
        )
    return CompileError(f"{doing} failed: {type(error).__name__}: {text}", code="trace", location=location)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_lines(text: str, limit: int = 400) -> str:
    """The message without torch's appended tracebacks and advice."""
    text = re.split(r"\n\s*(?:Caused by|The following call|Potential framework|While executing|Original trace|"
                    r"The above exception|User Stack|For more information|To fix the error)", text)[0]  # fmt: skip
    return _scrub(" ".join(text.split()))[:limit]


def _scrub(text: str) -> str:
    """Machine paths down to file names."""
    return re.sub(r"(?:/[\w.+-]+)+/([\w.+-]+)", r"\1", text)
