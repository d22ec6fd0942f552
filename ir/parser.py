"""Text → graph; errors name line and column."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from moec.ir.dims import parse_size
from moec.ir.errors import ArgumentTypeError, CompileError
from moec.ir.graph import Graph, Value
from moec.ir.location import Frame, Location
from moec.ir.types import DType, TensorType
from moec.ir.weight import Weight

_SPACE = re.compile(r"(?:\s+|(?:#|//)[^\n]*)*")  # comments start with # or //
_NAME = re.compile(r"[A-Za-z_0-9][A-Za-z_0-9.$-]*")
_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_NUMBER = re.compile(r"-?[0-9]+\.?[0-9]*(?:[eE][+-]?[0-9]+)?(?![\w.*/+%-])")
_DECIMAL = re.compile(r"[0-9]+")
_WORD = re.compile(r"[A-Za-z_]\w*")
_DTYPES = {d.value: d for d in DType}
_KEYWORDS = {"none": None, "true": True, "false": False, "inf": float("inf"), "nan": float("nan")}


_SHOWN = 200  # characters of a line or message
_DIGITS = 400  # of a number
_NESTING = 8  # lists in lists


def _clipped(message: str) -> str:
    return message if len(message) <= 2 * _SHOWN else f"{message[:_SHOWN]} … {message[-_SHOWN:]}"


class _Scanner:
    def __init__(self, text: str):
        self.text = text
        self.pos = 0

    def skip(self) -> None:
        match = _SPACE.match(self.text, self.pos)
        assert match
        self.pos = match.end()

    def error(self, message: str) -> CompileError:
        line = self.text.count("\n", 0, self.pos) + 1
        start = self.text.rfind("\n", 0, self.pos) + 1
        end = self.text.find("\n", self.pos)
        row = self.text[start : len(self.text) if end < 0 else end]
        column = self.pos - start + 1
        first = max(0, column - 100) if len(row) > _SHOWN else 0
        shown = row[first : first + _SHOWN].replace("\0", "\ufffd")
        where = f"line {line}, column {column}"
        return CompileError(f"{where}: {_clipped(message)}", code="syntax", excerpt=shown or None)

    def peek(self, token: str) -> bool:
        self.skip()
        return self.text.startswith(token, self.pos)

    def accept(self, token: str) -> bool:
        if not self.peek(token):
            return False
        self.pos += len(token)
        return True

    def expect(self, token: str) -> None:
        if not self.accept(token):
            got = self.text[self.pos : self.pos + 20].split("\n")[0]
            raise self.error(f"expected {token!r}, got {got or 'end of text'!r}")

    def match(self, pattern: re.Pattern[str], what: str) -> str:
        self.skip()
        m = pattern.match(self.text, self.pos)
        if not m:
            raise self.error(f"expected {what}")
        self.pos = m.end()
        return m.group()

    def string(self) -> str:
        try:
            return json.loads(self.match(_STRING, "a quoted string"))
        except json.JSONDecodeError as e:
            raise self.error(f"bad string: {e}") from None

    def integer(self, text: str) -> int:
        if len(text) > _DIGITS:
            raise self.error(f"a number of {len(text)} digits")
        return int(text)

    def name(self) -> str:
        return self.string() if self.peek('"') else self.match(_NAME, "a name")

    def expression(self) -> str:
        """Raw text of a dimension: up to a `,`, `]`, `}` or `)` outside parentheses, or the line's end."""
        self.skip()
        start, depth = self.pos, 0
        while self.pos < len(self.text):
            c = self.text[self.pos]
            if c == "(":
                depth += 1
            elif c == ")" and depth:
                depth -= 1
            elif c == "\n" or (c in ",]})" and not depth):
                break
            self.pos += 1
        return self.text[start : self.pos].strip()


class _Parser:
    def __init__(self, text: str):
        self.s = _Scanner(text)

    def size(self) -> Any:
        try:
            return parse_size(self.s.expression())
        except CompileError as e:
            raise self.s.error(e.message) from None

    def type(self) -> TensorType:
        dtype = self.s.match(_WORD, "a dtype")
        if dtype not in _DTYPES:
            raise self.s.error(f"unknown dtype {dtype!r}; one of {', '.join(_DTYPES)}")
        self.s.expect("[")
        shape = []
        while not self.s.accept("]"):
            shape.append(self.size())
            if not self.s.peek("]"):
                self.s.expect(",")
        try:
            return TensorType(_DTYPES[dtype], tuple(shape))
        except CompileError as e:
            raise self.s.error(e.message) from None

    def attr(self, depth: int = 0) -> Any:
        s = self.s
        s.skip()
        if s.accept("["):
            if depth == _NESTING:
                raise s.error(f"lists nested more than {_NESTING} deep")
            items = []
            while not s.accept("]"):
                items.append(self.attr(depth + 1))
                if not s.peek("]"):
                    s.expect(",")
            return tuple(items)
        if s.peek('"'):
            return s.string()
        number = _NUMBER.match(s.text, s.pos)
        if number:
            s.pos = number.end()
            text = number.group()
            if not any(c in text for c in ".eE"):
                return s.integer(text)
            value = float(text)
            if math.isinf(value):
                raise s.error(f"{text} is beyond 64-bit floats")
            return value
        if s.accept("-inf"):
            return float("-inf")
        word = _WORD.match(s.text, s.pos)
        if word and word.group() in _KEYWORDS:
            s.pos = word.end()
            return _KEYWORDS[word.group()]
        if word and word.group() in _DTYPES:
            if s.text.startswith("[", word.end()):
                return self.type()
            s.pos = word.end()
            return _DTYPES[word.group()]
        return self.size()

    def location(self) -> Location:
        s = self.s
        if not s.accept("loc("):
            return Location()
        frames = []
        while not s.accept(")"):
            module, file = s.string(), s.string()
            s.expect(":")
            frames.append(Frame(module, file, s.integer(s.match(_DECIMAL, "a line number"))))
            if not s.peek(")"):
                s.expect(",")
        return Location(tuple(frames))

    def origins(self, groups: int) -> list[frozenset[str]] | None:
        s = self.s
        if not s.accept("origin("):
            return None
        result: list[set[str]] = [set()]
        while not s.accept(")"):
            if s.accept("|"):
                result.append(set())
            elif not s.accept(","):
                result[-1].add(s.string())
        if len(result) != groups:
            raise s.error(f"{len(result)} origin groups for {groups} results")
        return [frozenset(g) for g in result]

    def graph(self, keyword: str) -> Graph:
        s = self.s
        s.expect(keyword)
        g = Graph(s.name() if s.accept("@") else "graph")
        values: dict[str, Value] = {}
        s.expect("(")
        while not s.accept(")"):
            s.expect("%")
            name = s.name()
            s.expect(":")
            type = self.type()
            try:
                values[name] = g.add_input(name, type)
            except CompileError as e:
                raise s.error(e.message) from None
            origins = self.origins(1)
            if origins is not None:
                values[name].origins = origins[0]
            if not s.peek(")"):
                s.expect(",")
        s.expect("->")
        s.expect("(")
        outputs: list[tuple[str, TensorType]] = []
        while not s.accept(")"):
            s.expect("%")
            name = s.name()
            s.expect(":")
            outputs.append((name, self.type()))
            if not s.peek(")"):
                s.expect(",")
        s.expect("{")
        while s.accept("weight "):
            self.weight(g)
        while not s.accept("return"):
            self.node(g, values)
        returned = []
        while not s.accept("}"):
            returned.append(self.value(g, values))
            if not s.peek("}"):
                s.expect(",")
        if len(returned) != len(outputs):
            raise s.error(f"returns {len(returned)} values, declares {len(outputs)} outputs")
        for (name, declared), value in zip(outputs, returned, strict=True):
            if value is None or value.type != declared:
                raise s.error(f"output {name!r} is declared {declared}, returned is {value.type if value else '_'}")
            try:
                g.add_output(value, name)
            except CompileError as e:
                raise s.error(e.message) from None
        return g

    def weight(self, g: Graph) -> None:
        s = self.s
        s.expect("@")
        name = s.name()
        s.expect(":")
        type = self.type()
        digest = s.string() if s.accept("sha256=") else None
        if name in g.weights:
            raise s.error(f"weight {name!r} is declared twice")
        value = g.add_weight(Weight(name, type, None, digest))
        value.origins = (self.origins(1) or [frozenset()])[0]

    def value(self, g: Graph, values: dict[str, Value]) -> Value | None:
        s = self.s
        if s.accept("%"):
            name = s.name()
            if name not in values:
                raise s.error(f"%{name} is used before it is defined")
            return values[name]
        if s.accept("@"):
            name = s.name()
            if name not in g.weights:
                raise s.error(f"weight @{name} is not declared")
            return g.weights[name]
        s.expect("_")
        return None

    def node(self, g: Graph, values: dict[str, Value]) -> None:
        s = self.s
        start = s.pos
        results: dict[str, TensorType] = {}
        while not results or s.accept(","):
            s.expect("%")
            name = s.name()
            if name in values or name in results:
                raise s.error(f"%{name} is defined twice")
            s.expect(":")
            results[name] = self.type()
        s.expect("=")
        op = s.match(_NAME, "an op name")
        s.expect("(")
        operands = []
        while not s.accept(")"):
            operands.append(self.value(g, values))
            if not s.peek(")"):
                s.expect(",")
        attrs: dict[str, Any] = {}
        if s.accept("{"):
            while not s.accept("}"):
                key = s.match(_WORD, "an attribute name")
                if key in attrs:
                    raise s.error(f"attribute {key!r} is given twice")
                s.expect("=")
                attrs[key] = self.attr()
                if not s.peek("}"):
                    s.expect(",")
        location = self.location()
        origins = self.origins(len(results)) or [frozenset()] * len(results)
        end = s.pos
        try:
            # types come from the text: a call may name a function that stands further down, and the
            # verifier re-infers all of them
            node = g.create(op, operands, attrs, location=location, types=list(results.values()))
        except CompileError as e:
            s.pos = start
            s.skip()
            error = s.error(e.message)
            error.hint = e.hint
            raise error from None
        s.pos = end
        for name, value, origin in zip(results, node.results, origins, strict=True):
            value.origins = origin
            values[name] = value


def parse(text: str, *, verify: bool = True) -> Graph:
    """Read the text format. Weights come back without data (see `Graph.bind_weights`).

    Raises CompileError with line and column on bad syntax, unknown ops, undefined names, and (with
    `verify`) on types that do not re-infer; ArgumentTypeError on anything but a str.
    """
    if not isinstance(text, str):
        raise ArgumentTypeError(f"the text of a graph is a str, got {type(text).__name__}", code="arguments")
    p = _Parser(text)
    graph = p.graph("graph")
    while p.s.peek("function"):
        fn = p.graph("function")
        if fn.name in graph.functions:
            raise p.s.error(f"function @{fn.name} is defined twice")
        graph.functions[fn.name] = fn
    p.s.skip()
    if p.s.pos != len(text):
        raise p.s.error("text after the end of the graph")
    if verify:
        graph.verify()
    return graph
