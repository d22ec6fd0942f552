"""Passes as text: `fuse_swiglu{max=3}`, `my_rules:FuseX{eps=1e-5}`, `path/to/rules.py:FuseX`.

    passes  = pass {"," pass}
    pass    = name ["{" [option {"," option}] "}"]      option = key "=" value
    name    = a shipped pass, rule set or rule | module ":" Class | path.py ":" Class (a path of odd letters in quotes)
    value   = number | true | false | none | word | "string" | "[" values "]" | "{" options "}" | pass

Options are the fields of the pass's dataclass; a value is checked against the type of its field and
converted to it: `{…}` stands for a nested dataclass, a pass for a field that holds one.
"""

from __future__ import annotations

import builtins
import dataclasses
import difflib
import enum
import json
import math
import re
import types
import typing
from collections.abc import Iterable
from typing import Any

import numpy as np

from moec.ir import ArgumentValueError, CompileError
from moec.passes.base import Pass
from moec.passes.registry import find_pass, name_of
from moec.passes.spec_text import WORD, Call, Raw, Scanner, Word

_PLAIN = re.compile(r"[A-Za-z_][\w./-]*\Z", re.ASCII)
_KEYWORDS: dict[str, Any] = {"none": None, "true": True, "false": False, "inf": math.inf, "nan": math.nan}


def parse_pass(text: str) -> Pass:
    """One pass from text. Raises ArgumentValueError with the column, the nearest name or the expected type."""
    passes = parse_passes(text)
    if len(passes) != 1:
        raise ArgumentValueError(f"{text!r} holds {len(passes)} passes, expected one", code="pass-spec")
    return passes[0]


def parse_passes(text: str) -> tuple[Pass, ...]:
    """Passes separated by commas, at least one. Raises ArgumentValueError as `parse_pass` does."""
    scanner = Scanner(text)
    found: list[Pass] = []
    while not found or scanner.accept(","):
        raw = scanner.value()
        if not _names_pass(raw.content):
            raise scanner.error("expected the name of a pass", raw.at)
        found.append(_Converter(scanner).make_pass(raw))
    if not scanner.done():
        raise scanner.error("expected ',' or the end")
    return tuple(found)


def print_pass(p: Pass) -> str:
    """The text that `parse_pass` reads back to an equal pass; options at their defaults are left out.

    Raises ArgumentValueError where a class cannot be named (it is defined inside a function or in the main
    script), or an option holds something that has no text form (a backend).
    """
    name = name_of(type(p))
    where, colon, qualname = name.rpartition(":")
    if colon and not WORD.fullmatch(where):
        name = f"{json.dumps(where, ensure_ascii=False)}:{qualname}"
    options = _print_fields(p, type(p).__name__)
    return f"{name}{{{options}}}" if options else name


def print_passes(passes: Iterable[Pass]) -> str:
    """The inverse of `parse_passes`."""
    return ", ".join(map(print_pass, passes))


# -- from text to values -------------------------------------------------------------------------------


class _Mismatch(Exception):
    """A value that does not have the type of its field."""


def _names_pass(content: Any) -> bool:
    return isinstance(content, Word) or (isinstance(content, Call) and content.name is not None)


class _Converter:
    def __init__(self, scanner: Scanner):
        self.scanner = scanner

    def make_pass(self, raw: Raw) -> Pass:
        call = raw.content if isinstance(raw.content, Call) else Call(raw.content.text, {}, {})
        try:
            cls, preset = find_pass(call.name or "")
        except CompileError as e:
            raise self.scanner.error(e.message, raw.at, e.hint) from e
        return self._construct(cls, preset, call, raw.at, str(call.name))

    def _construct(self, cls: type, preset: dict[str, Any], call: Call, at: int, who: str) -> Any:
        fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
        hints = _hints(cls)
        values = dict(preset)
        for key, raw in call.options.items():
            if key not in fields:
                near = difflib.get_close_matches(key, fields, 1)
                known = ", ".join(f"{n}: {_shown(hints[n])}" for n in fields)
                hint = f"did you mean {near[0]!r}?" if near else f"its options: {known or 'none'}"
                raise self.scanner.error(f"{who} has no option {key!r}", call.at[key], hint)
            try:
                values[key] = self._convert(raw, hints[key])
            except _Mismatch:
                got = self.scanner.text[raw.at : raw.end]
                message = f"option {key!r} of {who} takes {_shown(hints[key])}, got {got}"
                raise self.scanner.error(message, raw.at, _advice(hints[key])) from None
        for name, f in fields.items():
            if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                wanted = hints[name]
                raise self.scanner.error(f"{who} needs the option {name!r}: {_shown(wanted)}", at, _advice(wanted))
        try:
            return cls(**values)
        except (CompileError, TypeError, ValueError) as e:  # what its __post_init__ refuses
            message = e.message if isinstance(e, CompileError) else str(e)
            raise self.scanner.error(f"{who}: {message}", at, getattr(e, "hint", None)) from e

    def _convert(self, raw: Raw, wanted: Any) -> Any:
        """The value in the type of its field. Raises _Mismatch."""
        content = raw.content
        origin, args = typing.get_origin(wanted), typing.get_args(wanted)
        if origin in (typing.Union, types.UnionType):
            return self._one_of(raw, args)
        if origin is typing.Annotated:
            return self._convert(raw, args[0])
        if wanted is tuple or origin is tuple:
            return self._tuple(content, args)
        if wanted is np.ndarray and isinstance(content, tuple):
            return self._array(raw)
        if wanted is Any:
            return self._natural(raw)
        if isinstance(wanted, builtins.type):
            if issubclass(wanted, enum.Enum):
                return _member(wanted, content.text if isinstance(content, Word) else content)
            if issubclass(wanted, Pass) and _names_pass(content):
                made = self.make_pass(raw)
                if isinstance(made, wanted):
                    return made
            elif dataclasses.is_dataclass(wanted) and isinstance(content, Call) and content.name is None:
                return self._construct(wanted, {}, content, raw.at, wanted.__name__)
        if isinstance(content, Word):
            content = _KEYWORDS.get(content.text, content.text)
        if origin is typing.Literal:
            return _literal(args, content)
        if wanted is float and type(content) is int:
            return float(content)
        if (wanted is None and content is None) or type(content) is wanted:
            return content
        raise _Mismatch

    def _one_of(self, raw: Raw, options: tuple[Any, ...]) -> Any:
        # 3 under float | int stays an int
        for option in sorted(options, key=lambda t: (t is float, t is Any)):
            try:
                return self._convert(raw, option)
            except _Mismatch:
                continue
        raise _Mismatch

    def _tuple(self, content: Any, items: tuple[Any, ...]) -> tuple[Any, ...]:
        if not isinstance(content, tuple):
            raise _Mismatch
        if not items:
            items = (Any, ...)
        if len(items) == 2 and items[1] is ...:
            return tuple(self._convert(raw, items[0]) for raw in content)
        items = () if items == ((),) else items
        if len(content) != len(items):
            raise _Mismatch
        return tuple(self._convert(raw, t) for raw, t in zip(content, items, strict=True))

    def _array(self, raw: Raw) -> np.ndarray:
        """Nested lists of numbers, all rows of one length."""
        try:
            array = np.array(self._natural(raw))
        except ValueError:  # rows of several lengths
            raise _Mismatch from None
        if array.dtype.kind not in "bif":
            raise _Mismatch
        return array

    def _natural(self, raw: Raw) -> Any:
        """A value by itself, where the field has no type to go by."""
        content = raw.content
        if isinstance(content, tuple):
            return tuple(map(self._natural, content))
        if isinstance(content, Call):
            if content.name is None:
                raise _Mismatch
            return self.make_pass(raw)
        return _KEYWORDS.get(content.text, content.text) if isinstance(content, Word) else content


def _member(wanted: type[enum.Enum], text: Any) -> Any:
    for member in wanted:
        if text in (member.value, member.name):
            return member
    raise _Mismatch


def _literal(options: tuple[Any, ...], content: Any) -> Any:
    for option in options:
        if option == content and type(option) is type(content):
            return option
    raise _Mismatch


def _hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields; Any where an annotation names something that cannot be looked up."""
    try:
        hints = typing.get_type_hints(cls)
    except (NameError, AttributeError, TypeError):  # names imported under TYPE_CHECKING only
        hints = {f.name: f.type for f in dataclasses.fields(cls)}
        hints = {name: Any if isinstance(h, str) else h for name, h in hints.items()}
    return {name: types.NoneType if h is None else h for name, h in hints.items()}


def _shown(wanted: Any) -> str:
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_shown, args))
    if origin is typing.Literal:
        return " | ".join(map(repr, args))
    if origin is not None:
        return f"{origin.__name__}[{', '.join('…' if a is ... else _shown(a) for a in args)}]"
    if isinstance(wanted, enum.EnumType):
        return " | ".join(str(m.value) for m in typing.cast("Iterable[enum.Enum]", wanted))
    if wanted is types.NoneType:
        return "none"
    return getattr(wanted, "__name__", str(wanted))


def _advice(wanted: Any) -> str | None:
    """How a value of that type is written, where its name does not say it."""
    if wanted is bool:
        return "write true or false"
    if wanted is tuple or typing.get_origin(wanted) is tuple:
        return "write [first, second]"
    if wanted is np.ndarray:
        return "write [[0, 1], [1, 0]], rows of equal length"
    if isinstance(wanted, type) and dataclasses.is_dataclass(wanted) and not issubclass(wanted, Pass):
        return f"write {{{', '.join(f'{f.name}=…' for f in dataclasses.fields(wanted))}}}"
    return None


# -- from values to text -------------------------------------------------------------------------------


def _print_fields(instance: Any, who: str) -> str:
    shown = []
    for f in dataclasses.fields(instance):
        value = getattr(instance, f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if f.init and not (type(value) is type(default) and repr(value) == repr(default) and _same(value, default)):
            shown.append(f"{f.name}={_print_value(value, f'option {f.name!r} of {who}')}")
    return ", ".join(shown)


def _same(a: Any, b: Any) -> bool:
    return bool(a == b) or (isinstance(a, float) and a != a)


def _print_value(value: Any, what: str) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case enum.Enum():
            return _print_value(value.value, what)
        case float() | int():
            return repr(value)
        case str():
            plain = _PLAIN.match(value) and value not in _KEYWORDS
            return value if plain else json.dumps(value, ensure_ascii=False)
        case tuple() | list():
            return f"[{', '.join(_print_value(v, what) for v in value)}]"
        case np.ndarray():
            return _print_value(value.tolist(), what)
        case Pass():
            return print_pass(value)
    if dataclasses.is_dataclass(value):
        return f"{{{_print_fields(value, type(value).__name__)}}}"
    raise ArgumentValueError(f"{what} holds a {type(value).__name__}, which has no text form", code="pass-spec")
