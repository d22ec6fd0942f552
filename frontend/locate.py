"""Where in the user's code a traced node, or an error raised while tracing, comes from."""

from __future__ import annotations

import re
import sys
import sysconfig
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from moec.ir import Location

_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+)', re.MULTILINE)
_OURS = str(Path(__file__).resolve().parent)
_CALLED = {
    str(Path(__file__).resolve().with_name(name))
    for name in ("stand_ins.py", "recurrences.py", "expert_loops.py", "branches.py", "asked.py")
}  # by the model, or by torch for it
_TORCH = str(Path(torch.__file__).resolve().parent)
_STDLIB = sysconfig.get_paths()["stdlib"]


def import_path(file: str) -> str:
    """A file name relative to its import root: "transformers/models/mixtral/modeling_mixtral.py". Files of
    no imported module, and scripts, keep their bare name; machine paths never appear."""
    name = _module_names().get(file) or _module_names(len(sys.modules)).get(file)
    path = Path(file)
    if not name or name == "__main__":
        return path.name
    parts = name.split(".")
    return "/".join((*parts, path.name) if path.name == "__init__.py" else (*parts[:-1], path.name))


@cache
def _module_names(count: int = 0) -> Mapping[str, str]:
    """File → module name, for the modules imported so far (`count` makes a later call look again)."""
    return {f: n for n, m in list(sys.modules.items()) if isinstance(f := getattr(m, "__file__", None), str)}


def is_users(file: str) -> bool:
    """Whether a file is neither torch's, nor Python's, nor part of this package."""
    pythons = file.startswith(_STDLIB) and "-packages" not in file
    return not pythons and not file.startswith((_OURS, _TORCH, "<"))


def node_location(meta: Mapping[str, Any], prefix: str) -> Location:
    """Module path (below `prefix`) and the innermost line of the model's own code of an FX node."""
    stack = meta.get("nn_module_stack") or {}
    module = ""
    for path, _ in stack.values():
        module = strip_prefix(_clean(path), prefix)
    frames = [(m["file"], int(m["line"])) for m in _FRAME.finditer(meta.get("stack_trace") or "")]
    users = [f for f in frames if is_users(f[0])] or [f for f in frames if not f[0].startswith((_OURS, "<"))]
    file, line = users[-1] if users else ("", 0)
    return Location.at(module, import_path(file) if file else "", line)


def _clean(path: str) -> str:
    """torch marks repeated calls of one module as "layers.0@1"."""
    return path.removeprefix("L['self'].").split("@")[0]


def strip_prefix(path: str, prefix: str) -> str:
    return "" if path == prefix else path.removeprefix(f"{prefix}.") if prefix else path


def error_location(error: BaseException, model: torch.nn.Module | None) -> Location:
    """The innermost frame of the user's code in an error's traceback (or in those of its causes), with the
    path of the module whose method that is."""
    names = {id(m): n for n, m in model.named_modules()} if model is not None else {}
    best: tuple[str, str, int] | None = None
    seen: BaseException | None = error
    while seen is not None and best is None:
        best = _innermost(seen.__traceback__, names)
        seen = seen.__cause__ or seen.__context__
    return Location.at(best[0], import_path(best[1]), best[2]) if best else Location()


def _innermost(tb: TracebackType | None, names: Mapping[int, str]) -> tuple[str, str, int] | None:
    """Looks only below the last frame of our own that called into the model."""
    frames: list[tuple[FrameType, int]] = []
    while tb is not None:
        frames.append((tb.tb_frame, tb.tb_lineno))
        tb = tb.tb_next
    # GroupedMMMode sees every torch call of the model, and what stands in for a function of it is called by it
    between = [f.f_code.co_name == "__torch_function__" or f.f_code.co_filename in _CALLED for f, _ in frames]
    ours = [f.f_code.co_filename.startswith(_OURS) and not b for (f, _), b in zip(frames, between, strict=True)]
    start = max((i for i, mine in enumerate(ours) if mine), default=-1)
    module, best = "", None
    for frame, line in frames[start + 1 :]:
        owner = frame.f_locals.get("self")
        module = names.get(id(owner), module)
        if is_users(frame.f_code.co_filename):
            best = (module, frame.f_code.co_filename, line)
    return best
