"""Sizes that are known only when an op has run: what brings them into a graph, and what needs them.

An op such as `tensor.nonzero` names the new symbols in attributes that its declaration lists in `binds`. Each stands by
itself as an axis of a result, which is where it is read; one that is known already is checked there instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moec.ir.dims import Dim
from moec.ir.errors import CompileError
from moec.ir.types import TensorType

if TYPE_CHECKING:
    import torch

    from moec.ir.graph import Graph, Node, Value


def symbols_of(x: Any) -> frozenset[str]:
    """Symbols in a size, a type, or a nest of them."""
    match x:
        case Dim() | TensorType():
            return x.symbols
        case list() | tuple():
            return frozenset().union(*map(symbols_of, x))
    return frozenset()


def introduces(node: Node) -> dict[str, tuple[Value, int]]:
    """The symbols that a node's results may be the first to have, and the axis that shows each."""
    if not node.opdef.binds:
        return {}
    named = symbols_of([node.attrs[a] for a in node.opdef.binds])
    axes = [(str(s), (r, i)) for r in node.results for i, s in enumerate(r.shape) if isinstance(s, Dim) and s.is_symbol]
    return {s: where for s, where in reversed(axes) if s in named}


def needs(node: Node) -> frozenset[str]:
    """Symbols that must be known when a node runs."""
    return symbols_of([v for k, v in node.attrs.items() if k not in node.opdef.binds]) | (
        symbols_of([r.type for r in node.results]) - introduces(node).keys()
    )


def runtime_symbols(graph: Graph) -> dict[str, tuple[Value, int]]:
    """Symbols that no input has, with the value and axis where each is first seen."""
    known = graph.symbols
    found: dict[str, tuple[Value, int]] = {}
    for node in graph.nodes:
        for symbol, where in introduces(node).items():
            if symbol not in known:
                found.setdefault(symbol, where)
    return found


def bind_results(node: Node, results: Sequence[torch.Tensor], binding: dict[str, int]) -> None:
    """Add the sizes that a node has brought in to `binding`. Ranks are checked by whoever checks the results."""
    for symbol, (value, axis) in introduces(node).items():
        tensor = results[value.index]
        if tensor.dim() > axis:
            binding.setdefault(symbol, tensor.shape[axis])


def check_symbols(node: Node, known: frozenset[str] | set[str]) -> None:
    """Raise CompileError where a node uses a symbol that neither an input nor a node before it has."""
    unknown = needs(node) - known
    if unknown:
        raise CompileError(
            f"{node.op} uses dimensions {sorted(unknown)} that no input of the graph has", code="structure"
        )
    hidden = symbols_of([node.attrs[a] for a in node.opdef.binds]) - introduces(node).keys() - known
    if hidden:
        raise CompileError(
            f"{node.op} names dimensions {sorted(hidden)} that are no axis of its results by themselves",
            code="structure",
        )


def measured(values: Mapping[Value, torch.Tensor], graph: Graph, binding: Mapping[str, int]) -> dict[str, int]:
    """`binding` and the run-time sizes that the values of a run show."""
    found = dict(binding)
    for symbol, (value, axis) in runtime_symbols(graph).items():
        if value in values:
            found[symbol] = values[value].shape[axis]
    return found
