"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

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
    typer.Option(help="onnxruntime: fast (weights in f32) or fp8 (weights as they are stored; less memory, slower)"),
]
Quantize = Annotated[str | None, typer.Option(help="fp8 or fp8-weight-only")]
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
