"""Sessions whose optimised models are kept in a cache.

An optimised model is written with its weights in the layouts that kernels multiply. A session that opens it neither
optimises nor holds weights of its own: it maps them. ONNX Runtime lays every weight out again and compares, so what the
cache's digests did not notice, or another CPU lays out otherwise, is an error there, and a miss here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from moec.backends.cache import Cache, Unusable
from moec.backends.onnxruntime import artifact
from moec.backends.onnxruntime.cache_key import content_key
from moec.backends.onnxruntime.lower import Lowered
from moec.backends.onnxruntime.memory import give_back
from moec.backends.onnxruntime.options import Options
from moec.backends.onnxruntime.session import Optimised, Session, open_session
from moec.ir import CompileError

_REFUSED = "refused.txt"
Make = Callable[[Optimised | None], Session]


def cached(
    lowered: Lowered, options: Options, threads: int | None, cache: Cache, make: Make
) -> tuple[Session, dict[str, Any]]:
    """The session of a lowered model from the cache, or of `make`, whose optimised model is put there; and what
    happened: `result` ("hit" or "miss"), `why` it is a miss, `warning` where the cache could not be written, the `key`
    and the seconds of each step. Raises CompileError where `make` does."""
    seconds: dict[str, float] = {}
    said: dict[str, Any] = {"folder": str(cache.folder), "result": "hit", "seconds": seconds}
    with _timed(seconds, "key"):
        key = said["key"] = content_key(lowered, options)
        lowered.forget_weights()
    session: Session | None = None
    written = False
    try:
        return _open(lowered, options, threads, cache, key, seconds), said
    except _RefusedError as e:
        said |= {"result": "miss", "why": str(e)}
    except (Unusable, CompileError) as e:
        said |= {"result": "miss", "why": _reason(e)}
        try:
            with _timed(seconds, "store"), cache.writing(key) as folder:
                session = make(Optimised(folder / artifact.MODEL, write=True))
                artifact.inline_integers(folder)
            written, session = True, None  # one copy of the weights at a time
            return _open(lowered, options, threads, cache, key, seconds), said
        except (Unusable, CompileError, OSError) as error:
            said["warning"] = f"not kept in {cache.folder}: {_reason(error)}"
            if written:
                _note_refusal(cache, key, _reason(error))
    with _timed(seconds, "load"):
        return session or make(None), said


class _RefusedError(Exception):
    """ONNX Runtime did not open what it had written for this model; trying each time would cost more than no cache."""


def _note_refusal(cache: Cache, key: str, reason: str) -> None:
    """Put the reason in place of an entry that is as it was written, and is refused nevertheless."""
    with suppress(Unusable, OSError):
        cache.find(key)
        cache.discard(key)
        with cache.writing(key) as folder:
            (folder / _REFUSED).write_text(reason, "utf-8")


def _reason(error: Exception) -> str:
    return error.message if isinstance(error, CompileError) else str(error)


def _open(
    lowered: Lowered, options: Options, threads: int | None, cache: Cache, key: str, seconds: dict[str, float]
) -> Session:
    with _timed(seconds, "check"):
        folder = cache.find(key)
        if (folder / _REFUSED).exists():
            raise _RefusedError((folder / _REFUSED).read_text("utf-8"))
        artifact.check_model(folder)
    with _timed(seconds, "load"):
        path = folder / artifact.MODEL
        session = open_session(path, options, threads, lowered.interface.sources, Optimised(path))
        give_back()  # layouts that were made to be compared, and the session that wrote them
        return Session(session, lowered.interface)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Within: wall-clock seconds, under a name."""
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = time.perf_counter() - began
