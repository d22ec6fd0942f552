"""The grammar of passes as text, read into raw values that keep their place in the text (see moec.passes.spec)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from moec.ir import ArgumentValueError

_SPACE = re.compile(r"\s*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_NUMBER = re.compile(r"-?(?:\d+\.?\d*(?:[eE][+-]?\d+)?|inf\b)(?![\w.:/])")
_KEY = re.compile(r"[^\W\d]\w*")
WORD = re.compile(r'[^\s{}\[\](),="]+')


@dataclass(frozen=True)
class Word:
    """A bare word: a keyword, the name of a pass, or a string that needs no quotes."""

    text: str


@dataclass(frozen=True)
class Call:
    """`name{…}`; without a name a nested dataclass. `at` holds where each option stands."""

    name: str | None
    options: dict[str, Raw]
    at: dict[str, int]


@dataclass(frozen=True)
class Raw:
    """A value as written (a number, string, tuple of Raw, Word or Call) and where it starts and ends."""

    content: Any
    at: int
    end: int


class Scanner:
    """Reads values one by one; errors show the column."""

    def __init__(self, text: str):
        self.text = text
        self.pos = 0

    def error(self, message: str, at: int | None = None, hint: str | None = None) -> ArgumentValueError:
        at = self.pos if at is None else at
        return ArgumentValueError(
            f"column {at + 1}: {message}", code="pass-spec", excerpt=f"{self.text}\n{' ' * at}^", hint=hint
        )

    def done(self) -> bool:
        self._skip()
        return self.pos == len(self.text)

    def accept(self, token: str) -> bool:
        found = self._ahead(token)
        self.pos += len(token) if found else 0
        return found

    def value(self) -> Raw:
        self._skip()
        at = self.pos
        content = self._content(at)
        return Raw(content, at, self.pos)

    def _skip(self) -> None:
        match = _SPACE.match(self.text, self.pos)
        assert match
        self.pos = match.end()

    def _ahead(self, token: str) -> bool:
        self._skip()
        return self.text.startswith(token, self.pos)

    def _take(self, pattern: re.Pattern[str]) -> str | None:
        self._skip()
        match = pattern.match(self.text, self.pos)
        if match:
            self.pos = match.end()
        return match.group() if match else None

    def _content(self, at: int) -> Any:
        for opening, closing in ("[]", "()"):
            if self.accept(opening):
                return self._items(closing)
        if self.accept("{"):
            return self._options(None)
        number = self._take(_NUMBER)
        if number is not None:
            return float(number) if any(c in number for c in ".eEn") else int(number)
        name = self._name(at)
        if isinstance(name, Word) and self.accept("{"):
            return self._options(name.text)
        return name

    def _name(self, at: int) -> str | Word:
        """A bare word, or a quoted string, which a path before `:Class` may be too."""
        quoted = self._take(_STRING)
        if quoted is None:
            word = self._take(WORD)
            if word is None:
                got = self.text[self.pos : self.pos + 10]
                raise self.error(f"expected a value, got {got!r}" if got else "expected a value, got the end")
            return Word(word)
        try:
            string: str = json.loads(quoted, strict=False)
        except json.JSONDecodeError as e:
            raise self.error(f"bad string: {e.msg}", at) from None
        if self.text.startswith(":", self.pos):
            self.pos += 1
            return Word(f"{string}:{self._take(WORD) or ''}")
        return string

    def _items(self, closing: str) -> tuple[Raw, ...]:
        items = []
        while not self.accept(closing):
            items.append(self.value())
            if not self.accept(",") and not self._ahead(closing):
                raise self.error(f"expected ',' or {closing!r}")
        return tuple(items)

    def _options(self, name: str | None) -> Call:
        options: dict[str, Raw] = {}
        places: dict[str, int] = {}
        while not self.accept("}"):
            self._skip()
            at = self.pos
            key = self._take(_KEY)
            if key is None:
                raise self.error("expected the name of an option or '}'")
            if key in options:
                raise self.error(f"option {key!r} is given twice", at)
            if not self.accept("="):
                raise self.error(f"expected '=' after {key!r}")
            options[key], places[key] = self.value(), at
            if not self.accept(",") and not self._ahead("}"):
                raise self.error("expected ',' or '}'")
        return Call(name, options, places)
