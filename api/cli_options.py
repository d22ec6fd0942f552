"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moec.ir import ArgumentValueError

if TYPE_CHECKING:
    from moec.passes import Pass

Spec = Annotated[
    str,
    typer.Argument(
        help="a checkpoint folder, `trained`, a config of moec.models, module:callable returning (model, args), "
        "a graph.ir, a model.onnx or a model.gguf"
    ),
]
Source = Annotated[
    str, typer.Argument(help="a folder written by save or `moec compile`, a graph.ir, or a model as in `compile`")
]
Memory = Annotated[
    str,
    typer.Option(
        help="onnxruntime: fast (weights in f32), fp8 (as they are stored; less memory, slower) or mapped (in f32, "
        "where the file is mapped; no copy, slower)"
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        envvar="MOEC_CACHE",
        help="onnxruntime: a folder for optimised models, from which the same model starts sooner the next time",
    ),
]
BackendOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="NAME=VALUE",
        help="for onnxruntime: portable=true, experts=moe, huge_pages=false; repeatable",
    ),
]
Quantize = Annotated[str | None, typer.Option(help="fp8, fp8-weight-only, int8 or int4")]
Batch = Annotated[int, typer.Option(min=1, help="example batch size")]
Seq = Annotated[int, typer.Option(min=1, help="example sequence length")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of the backend")]
BackendName = Annotated[str, typer.Option(help="auto, reference, onnxruntime or triton")]
Passes = Annotated[
    list[str] | None,
    typer.Option(
        "--pass",
        metavar="PASS",
        help="run it after the default passes: fuse_swiglu{max=3}, module:Class, path.py:Class; repeatable",
    ),
]


def passes_of(texts: list[str] | None) -> list[Pass]:
    """The passes of repeated --pass options, each of which may hold several. Raises ArgumentValueError."""
    from moec.passes import parse_passes

    return [p for text in texts or () for p in parse_passes(text)]


def options_of(texts: list[str] | None) -> dict[str, object] | None:
    """The options of repeated --option NAME=VALUE; true and false are no texts. Raises ArgumentValueError."""
    found: dict[str, object] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not (name and equals) or name in found:
            what = "is there twice" if name in found else "is no NAME=VALUE"
            raise ArgumentValueError(f"--option {text!r} {what}", code="options")
        found[name] = {"true": True, "false": False}.get(value.lower(), value)
    return found or None
