"""Graphs as `.ir` files, and the numbers beside them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moec.files import TEXT_LIMIT, opened_regular, read_regular, written_whole
from moec.ir import ArgumentValueError, CompileError, Graph, parse
from moec.ir.arrays import as_bytes, copied, from_bytes

_INPUT, _WEIGHT = "input.", "weight."


def save_graph(graph: Graph, path: Path, inputs: tuple[torch.Tensor, ...] | None = None, header: str = "") -> None:
    """The graph's text, `header` as comments before it; with `inputs`, these and its weights beside it in a
    `.safetensors` file of the same name."""
    comments = "".join(f"# {line}\n" for line in header.splitlines())
    beside = path.with_suffix(".safetensors")
    with written_whole(path, beside) as (text, numbers):
        path.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(comments + str(graph), "utf-8")
        if inputs is not None:
            data = {f"{_INPUT}{v.name}": t for v, t in zip(graph.inputs, inputs, strict=True)}
            data |= {f"{_WEIGHT}{n}": v.weight.load() for n, v in graph.weights.items() if v.weight is not None}
            try:
                save_file({n: copied(as_bytes(t)) for n, t in data.items()}, numbers)
            except SafetensorError as e:
                raise OSError(str(e)) from None
        else:
            beside.unlink(missing_ok=True)


def load_graph(path: str | Path) -> tuple[Graph, tuple[torch.Tensor, ...]]:
    """A graph from an `.ir` file, and the inputs (none: they are seeded) and weight data of the `.safetensors` file
    beside it, if there is one. Raises CompileError naming the file."""
    path = Path(path)
    try:
        graph = parse(read_regular(path, TEXT_LIMIT).decode("utf-8"))
    except UnicodeDecodeError as e:
        raise ArgumentValueError(f"cannot read {path}: {e}", code="arguments") from None
    except CompileError as e:
        if not isinstance(e, ArgumentValueError):
            e.message = f"{path}: {e.message}"
        raise
    beside = path.with_suffix(".safetensors")
    if not os.path.lexists(beside):
        return graph, ()
    try:
        with opened_regular(beside, own=True) as fd:
            data = load_file(f"/dev/fd/{fd}")  # what was checked, not what the name leads to by now
        types = {f"{_WEIGHT}{n}": v.type for n, v in graph.weights.items()}
        types |= {f"{_INPUT}{v.name}": v.type for v in graph.inputs}
        data = {n: from_bytes(t, types[n].dtype) if n in types else t for n, t in data.items()}
        graph.bind_weights({n.removeprefix(_WEIGHT): t for n, t in data.items() if n.startswith(_WEIGHT)})
    except (OSError, SafetensorError, CompileError) as e:
        reason = e.message if isinstance(e, CompileError) else str(e)
        raise ArgumentValueError(f"cannot use {beside}: {reason}", code="arguments") from None
    given = [data.get(f"{_INPUT}{v.name}") for v in graph.inputs]
    return graph, tuple(t for t in given if t is not None) if all(t is not None for t in given) else ()
