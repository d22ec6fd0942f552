"""Passes by name: those that ship, and the user's own in modules and files."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import MISSING
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from moec.ir import ArgumentValueError, CompileError
from moec.passes.base import Pass, snake_case

_PACKAGE = "moec.passes"


@cache
def shipped_passes() -> dict[str, tuple[type[Pass], tuple[Pass, ...]]]:
    """Every concrete pass, rule set and single rule of `moec.passes` by the names that reports show: those of the
    classes, and those of rules as rule sets hold them (`no_op_reshape`), with the configured instances of that
    name. Found by importing the package's modules, so that no second list can be out of date."""
    package = importlib.import_module(_PACKAGE)
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(package.__path__, f"{_PACKAGE}.")]
    classes = sorted((c for c in _subclasses(Pass) if _shipped(c)), key=lambda c: c.__name__)
    found: dict[str, tuple[type[Pass], tuple[Pass, ...]]] = {snake_case(c.__name__): (c, ()) for c in classes}
    for p in _instances([v for m in modules for v in vars(m).values()] + classes):
        cls, known = found.get(p.name, (type(p), ()))
        if cls is type(p) and p not in known and _shipped(cls):
            found[p.name] = (cls, (*known, p))
    return dict(sorted(found.items()))


def find_pass(name: str) -> tuple[type[Pass], dict[str, Any]]:
    """The class of a shipped name (`fuse_swiglu`), of `module:Class`, or of `path/to/file.py:Class`, with the options
    that the name itself sets (`no_op_reshape` is NoOpShape with op="tensor.reshape").

    Raises ArgumentValueError with the nearest name, or with what could not be imported.
    """
    if ":" in name:
        where, _, qualname = name.rpartition(":")
        module = load_file(Path(where)) if where.endswith(".py") else _load_module(where)
        return _member(module, where, qualname), {}
    shipped = shipped_passes()
    if name in shipped:
        cls, instances = shipped[name]
        # a name that several configurations share sets nothing, and that of the class only what has no default
        fields = [f for f in dataclasses.fields(cls) if f.init and len(instances) == 1]
        if name == snake_case(cls.__name__):
            fields = [f for f in fields if f.default is MISSING and f.default_factory is MISSING]
        return cls, {f.name: getattr(instances[0], f.name) for f in fields}
    near = difflib.get_close_matches(snake_case(name), shipped, 3, 0.55)
    hint = f"did you mean {' or '.join(near)}?" if near else f"passes: {', '.join(shipped)}"
    raise ArgumentValueError(
        f"there is no pass {name!r}", code="pass-spec", hint=f"{hint} Your own: module:Class or path/to/file.py:Class"
    )


def _subclasses(cls: type) -> set[type]:
    return {cls}.union(*map(_subclasses, cls.__subclasses__()))


def _shipped(cls: type[Pass]) -> bool:
    return not inspect.isabstract(cls) and cls.__module__.startswith(f"{_PACKAGE}.") and cls.__name__[0] != "_"


def _instances(found: Iterable[Any]) -> Iterator[Pass]:
    """The passes that values hold: themselves, in tuples, in the default fields of classes."""
    for value in found:
        if isinstance(value, tuple):
            yield from _instances(value)
        elif isinstance(value, Pass):
            yield value
            yield from _instances(getattr(value, f.name) for f in dataclasses.fields(value))
        elif _is_pass(value):
            yield from _instances(f.default for f in dataclasses.fields(value) if isinstance(f.default, tuple | Pass))


def name_of(cls: type[Pass]) -> str:
    """What `find_pass` finds the class under, in another process too.

    Raises ArgumentValueError for a class inside a function or in the main script, which no name reaches.
    """
    if shipped_passes().get(snake_case(cls.__name__), (None,))[0] is cls:
        return snake_case(cls.__name__)
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    problem = None
    if "<locals>" in cls.__qualname__:
        problem = "it is defined inside a function"
    elif cls.__module__ == "__main__" or module is None:
        problem = "it is defined in the main script"
    elif _lookup(module, cls.__qualname__) is not cls:
        problem = f"{cls.__module__} has no {cls.__qualname__} any more, or another one"
    if problem is not None:
        raise ArgumentValueError(
            f"no text names the pass {cls.__qualname__}: {problem}",
            code="pass-spec",
            hint="move the class to the top level of a module",
        )
    # a module of a package may import relatively, so it keeps its name; a file by itself is found from anywhere
    if file is None or ("." in cls.__module__ and _importable(cls.__module__, file)):
        return f"{cls.__module__}:{cls.__qualname__}"
    path = Path(file).resolve()
    here = Path.cwd().resolve()
    shown = path.relative_to(here) if path.is_relative_to(here) else path
    return f"{shown.as_posix()}:{cls.__qualname__}"


def load_file(path: Path) -> ModuleType:
    """The module of a Python file: the one that is loaded already, else a new one, whose folder is on
    `sys.path` while it loads, as a script's is. Raises ArgumentValueError."""
    resolved = path.expanduser().resolve()
    if not resolved.is_file():
        raise ArgumentValueError(f"there is no file {path}", code="pass-spec")
    for loaded in list(sys.modules.values()):
        file = getattr(loaded, "__file__", None)
        if loaded.__name__ != "__main__" and isinstance(file, str) and file == str(resolved):
            return loaded
    name = f"{resolved.stem}_{abs(hash(str(resolved))):x}" if resolved.stem in sys.modules else resolved.stem
    spec = importlib.util.spec_from_file_location(name, resolved)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(resolved.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException as e:
        del sys.modules[name]
        if isinstance(e, Exception):
            raise _not_loaded(str(path), e) from e
        raise
    finally:
        sys.path.remove(str(resolved.parent))
    return module


def _load_module(name: str) -> ModuleType:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
        raise ArgumentValueError(
            f"{name!r} is neither a module nor a .py file",
            code="pass-spec",
            hint="module:Class or path/to/file.py:Class",
        )
    sys.path.insert(0, "")  # modules in the working directory, as `python -m` finds them
    try:
        return importlib.import_module(name)
    except Exception as e:
        # whatever the user's module raises while it is imported
        raise _not_loaded(name, e) from e
    finally:
        sys.path.remove("")


def _not_loaded(name: str, e: Exception) -> CompileError:
    return ArgumentValueError(f"cannot import {name}: {type(e).__name__}: {e}", code="pass-spec")


def _member(module: ModuleType, where: str, qualname: str) -> type[Pass]:
    cls = _lookup(module, qualname)
    if cls is None:
        own = [n for n, v in vars(module).items() if _is_pass(v) and v.__module__ == module.__name__]
        near = difflib.get_close_matches(qualname, own, 1)
        hint = f"did you mean {near[0]}?" if near else f"its passes: {', '.join(own) or 'none'}"
        raise ArgumentValueError(f"{where} has no {qualname!r}", code="pass-spec", hint=hint)
    if not _is_pass(cls):
        raise ArgumentValueError(f"{where}:{qualname} is no Pass or Rewrite class", code="pass-spec")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise ArgumentValueError(f"{where}:{qualname} lacks {missing}()", code="pass-spec")
    return cls


def _is_pass(x: Any) -> bool:
    return isinstance(x, type) and issubclass(x, Pass)


def _lookup(module: ModuleType, qualname: str) -> Any:
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


def _importable(module: str, file: str) -> bool:
    """Whether `import module` in a process with this `sys.path` finds that file, in a package with `__init__.py`."""
    path = None
    spec = None
    name = ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.origin is None:
            return False
        path = spec.submodule_search_locations
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == Path(file).resolve()
