"""Graph → text. `moec.ir.parser.parse` reads it back to an equal graph."""

from __future__ import annotations

import itertools
import json
import math
import re
from typing import Any

from moec.ir.dims import Dim
from moec.ir.graph import Graph, Node, Value
from moec.ir.location import Frame, Location
from moec.ir.opdef import shown_value
from moec.ir.types import DType, TensorType

_PLAIN = re.compile(r"[A-Za-z_0-9][A-Za-z_0-9.$-]*\Z")

SURROGATE = re.compile("[\ud800-\udfff]")


def quote(text: str) -> str:
    # names of files may hold lone surrogates, which no encoding has
    return SURROGATE.sub(lambda m: f"\\u{ord(m.group()):04x}", json.dumps(text, ensure_ascii=False))


def symbol(name: str) -> str:
    """A name as it stands after `%` or `@`: bare where it can be, else quoted."""
    return name if _PLAIN.match(name) else quote(name)


def print_attr(value: Any) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case DType():
            return value.value
        case float():
            if math.isnan(value):
                return "nan"
            return ("inf" if value > 0 else "-inf") if math.isinf(value) else repr(value)
        case str():
            return quote(value)
        case tuple():
            return "[" + ", ".join(map(print_attr, value)) + "]"
        case int() | Dim() | TensorType():
            return str(value)
    raise TypeError(f"not an attribute: {value!r}")


def _shown_attr(value: Any) -> str:
    """As `print_attr`; what no attribute may hold, which only a broken graph has, as text that does not parse."""
    try:
        return print_attr(value)
    except TypeError:
        return f"<{shown_value(value)}>"


def print_frame(frame: Frame) -> str:
    return f"{quote(frame.module)} {quote(frame.file)}:{frame.line}"


def print_location(location: Location) -> str:
    return "loc(" + ", ".join(map(print_frame, location.frames)) + ")" if location else ""


def print_origins(*groups: frozenset[str]) -> str:
    if not any(groups):
        return ""
    return "origin(" + " | ".join(", ".join(map(quote, sorted(g))) for g in groups) + ")"


class _Names:
    """Numbers values in order of definition; inputs keep their names."""

    def __init__(self, graph: Graph):
        self.names: dict[Value, str] = {v: "%" + symbol(v.name or "") for v in graph.inputs}
        taken = {v.name for v in graph.inputs}
        number = (i for i in itertools.count() if str(i) not in taken)
        for v in (r for n in graph.nodes for r in n.results):
            self.names[v] = f"%{next(number)}"

    def __call__(self, v: Value | None) -> str:
        if v is None:
            return "_"
        if v.weight is not None:
            return "@" + symbol(v.weight.name)
        return self.names.get(v, "%?")


def print_node(node: Node, names: Any, *, locations: bool = True) -> str:
    results = ", ".join(f"{names(r)}: {r.type}" for r in node.results)
    text = f"{results} = {node.op}({', '.join(map(names, node.operands))})"
    shown = {k: v for k, v in node.attrs.items() if not _is_default(node, k, v)}
    if shown:
        text += " {" + ", ".join(f"{k}={_shown_attr(v)}" for k, v in shown.items()) + "}"
    if locations:
        for extra in (print_location(node.location), print_origins(*(r.origins for r in node.results))):
            text += f" {extra}" if extra else ""
    return text


def _is_default(node: Node, name: str, value: Any) -> bool:
    if name not in node.opdef.attrs:
        return False
    default = node.opdef.attrs[name].default
    return (
        type(default) is type(value) and default == value and print_attr(default) == print_attr(value)
    )  # −0.0 is not 0.0


def _header(graph: Graph, keyword: str) -> str:
    names = _Names(graph)
    ins = []
    for v in graph.inputs:
        extra = print_origins(v.origins) if v.origins != {v.name} else ""
        ins.append(f"{names(v)}: {v.type}" + (f" {extra or 'origin()'}" if v.origins != {v.name} else ""))
    pairs = itertools.zip_longest(graph.output_names, graph.outputs)  # of a broken graph, of two lengths
    outs = [f"%{'?' if n is None else symbol(n)}: {'?' if v is None else v.type}" for n, v in pairs]
    name = "" if graph.name == "graph" and keyword == "graph" else f" @{symbol(graph.name)}"
    return f"{keyword}{name}({', '.join(ins)}) -> ({', '.join(outs)}) {{"


def print_graph(graph: Graph, *, locations: bool = True, keyword: str = "graph") -> str:
    """The whole graph and its functions; `locations=False` drops locations and origins for reading."""
    names = _Names(graph)
    lines = [_header(graph, keyword)]
    for name, v in graph.weights.items():
        line = f"  weight @{symbol(name)}: {v.type}"
        if v.weight is not None and v.weight.digest:
            line += f" sha256={quote(v.weight.digest)}"
        if v.origins:
            line += f" {print_origins(v.origins)}"
        lines.append(line)
    lines += [f"  {print_node(n, names, locations=locations)}" for n in graph.nodes]
    lines.append(f"  return {', '.join(map(names, graph.outputs))}".rstrip())
    lines.append("}")
    for fname, fn in graph.functions.items():
        assert fn.name == fname, "a function is stored under its name"
        lines += ["", print_graph(fn, locations=locations, keyword="function")]
    return "\n".join(lines) + ("\n" if keyword == "graph" else "")


_LONG_LIST = re.compile(r"\[([^\[\]]{80,})\]")


def shorten(line: str) -> str:
    """A line for a message: of long lists, such as the numbers of a constant, the first and the last items."""

    def short(match: re.Match[str]) -> str:
        items = match.group(1).split(", ")
        return f"[{', '.join(items[:4])}, … {len(items) - 5} more, {items[-1]}]" if len(items) > 8 else match.group()

    return _LONG_LIST.sub(short, line)


def excerpt(node: Node, *, around: int = 2) -> str:
    """The node with its neighbours, an arrow before it. It is for messages about graphs that are not valid: it prints
    any."""
    graph = node.graph
    nodes = [] if graph is None else list(graph.nodes)
    at = next((i for i, n in enumerate(nodes) if n is node), None)
    if graph is None or at is None:
        return node.op
    names = _Names(graph)
    rows = []
    for i in range(max(0, at - around), min(len(nodes), at + around + 1)):
        rows.append(("> " if i == at else "  ") + shorten(print_node(nodes[i], names, locations=False)))
    return "\n".join(rows)
