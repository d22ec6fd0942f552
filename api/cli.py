"""The command line: `moec compile | generate | inspect | compare | explain | bisect | place | doctor`."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from moec.cli_compare import compare
from moec.cli_options import (
    BackendName,
    BackendOptions,
    Batch,
    Cache,
    Memory,
    Passes,
    Quantize,
    Seq,
    Source,
    Spec,
    Threads,
    options_of,
    passes_of,
)  # fmt: skip
from moec.cli_passes import bisect, explain
from moec.files import read_regular, written_whole
from moec.ir import ArgumentValueError, CompileError
from moec.ir.strict_json import strict_json
from moec.manifest import MANIFEST_LIMIT

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compile Mixture-of-Experts transformers and run them on ONNX Runtime, Triton or the reference.",
)
app.command()(compare)
app.command()(explain)
app.command()(bisect)


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 a comparison that does not hold or a culprit that was found, 2 bad input, 3 an
    error of moec itself or of code that it was given."""
    try:
        app()
    except CompileError as e:
        Console(stderr=True).print(str(e), style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except Exception:  # Python's own exit code for it is 1, which is an answer here
        traceback.print_exc()
        sys.exit(3)


@app.command("compile")
def compile_(
    spec: Spec,
    out: Annotated[Path, typer.Option(help="folder to write")],
    passes: Passes = None,
    quantize: Quantize = None,
    backend: BackendName = "auto",
    batch: Batch = 2,
    seq: Seq = 24,
    threads: Threads = None,
    memory: Memory = "fast",
    cache: Cache = None,
    option: BackendOptions = None,
    fallback: Annotated[str, typer.Option(help="error, or reference for nodes the backend lacks")] = "error",
    dump: Annotated[Path | None, typer.Option(help="folder for the IR after every pass")] = None,
    report: Annotated[Path | None, typer.Option(help="write the report, .html or .json")] = None,
) -> None:
    """Compile a model, with dynamic batch and sequence, and save it."""
    import moec
    from moec.specs import resolve

    target = resolve(spec, batch, seq)
    compiled = moec.compile(
        target.model,
        () if isinstance(target.model, moec.Graph) else target.args,
        backend=backend,
        dynamic_shapes=target.dynamic_shapes,
        passes=passes_of(passes),
        quantize=quantize,
        fallback=fallback,
        threads=threads,
        memory=memory,
        cache=cache,
        options=options_of(option),
        dump=dump,
    )
    compiled.save(out)
    console = Console()
    for table in compiled.report.tables():
        console.print(table)
    for note in compiled.report.notes():
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    if report is not None:
        compiled.report.save(report)
    console.print(f"saved to {out}", markup=False, highlight=False)


@app.command()
def generate(
    source: Source,
    text: Annotated[str | None, typer.Argument(help="the prompt, as --prompt")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="text, for the checkpoint's tokenizer; without one it is read as UTF-8 bytes")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0)] = 64,
    backend: BackendName = "auto",
    quantize: Quantize = None,
    threads: Threads = None,
    memory: Memory = "fast",
    cache: Cache = None,
) -> None:
    """Continue a prompt greedily."""
    import torch

    import moec
    from moec.checkpoints import CheckpointModel
    from moec.specs import is_saved, resolve

    if text is not None and prompt is not None:
        raise typer.BadParameter("the prompt is there twice", param_hint="--prompt")
    prompt = prompt if text is None else text
    if not prompt:
        raise typer.BadParameter("the prompt is empty", param_hint="--prompt")
    from_checkpoint = False
    if is_saved(source):
        if quantize is not None:
            raise typer.BadParameter("a saved model is quantised already or not at all", param_hint="--quantize")
        compiled = moec.load(source, threads=threads, cache=cache)
    else:
        model = resolve(source).model
        from_checkpoint = isinstance(model, CheckpointModel)
        compiled = moec.compile(model, backend=backend, quantize=quantize, threads=threads, memory=memory, cache=cache)
    if from_checkpoint or compiled.tokenizer_json is not None:
        tokenizer = compiled.tokenizer
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        print(tokenizer.decode(compiled.generate(ids, max_new_tokens=max_new_tokens)[0].tolist()))
        return
    ids = torch.tensor([list(prompt.encode())])
    result = compiled.generate(ids, max_new_tokens=max_new_tokens)[0].tolist()
    if max(result) > 255:
        raise CompileError("this model's ids are no bytes", code="generate", hint="use the Python interface")
    print(bytes(result).decode("utf-8", "replace"))


@app.command()
def inspect(
    source: Source,
    passes: Passes = None,
    ir: Annotated[bool, typer.Option(help="print the IR")] = True,
    weights: Annotated[bool, typer.Option(help="print the weights")] = False,
    locations: Annotated[bool, typer.Option(help="print where each node comes from")] = False,
    batch: Batch = 2,
    seq: Seq = 24,
) -> None:
    """Print a model's IR after the passes, its weights and its node counts.

    A saved folder and an .ir file are printed as they are, after the passes given by --pass alone.
    """
    import moec
    from moec.ir.printer import print_graph
    from moec.passes import Pipeline, build_pipeline
    from moec.specs import is_saved, resolve

    pipeline = Pipeline(tuple(passes_of(passes)))
    if is_saved(source):
        graph = moec.load(source).graph
    else:
        target = resolve(source, batch, seq)
        if isinstance(target.model, moec.Graph):
            graph = target.model
        else:
            graph = moec.trace(target.model, target.args, dynamic_shapes=target.dynamic_shapes)
            pipeline = build_pipeline(pipeline.passes)
    graph, _ = pipeline.run(graph)
    console = Console(soft_wrap=True)
    if ir:
        console.print(print_graph(graph, locations=locations), markup=False, highlight=False)
    if weights:
        table = Table("weight", "type", "bytes")
        table.columns[2].justify = "right"
        for name, v in graph.weights.items():
            table.add_row(name, str(v.type), f"{v.type.nbytes:,}")
        console.print(table, soft_wrap=False)
    table = Table("op", "nodes")
    table.columns[1].justify = "right"
    for op, count in graph.count_ops().items():
        table.add_row(op, str(count))
    console.print(table, soft_wrap=False)


@app.command()
def place(
    load: Annotated[Path, typer.Argument(help="JSON: a list of layers, each a list of expert loads")],
    slots: Annotated[int, typer.Option(min=1, help="experts per GPU and layer")],
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs per node")] = 8,
    out: Annotated[Path | None, typer.Option(help="write the placement as JSON")] = None,
) -> None:
    """Place (and replicate) experts on GPUs by measured load."""
    import torch

    import moec

    try:
        data = strict_json(read_regular(load, MANIFEST_LIMIT))
        loads = torch.tensor(data, dtype=torch.float64)
    except ArgumentValueError:
        raise
    except (ValueError, TypeError, RuntimeError, OverflowError) as e:
        raise CompileError(f"{load} holds no list of layers of expert loads: {e}", code="arguments") from None
    placement = moec.place_experts(loads, moec.Mesh(nodes=nodes, gpus_per_node=gpus, slots_per_gpu=slots))
    table = Table("layer", "busiest GPU / mean", "lower bound")
    for layer, (balance, bound) in enumerate(zip(placement.balance, placement.lower_bound, strict=True)):
        table.add_row(str(layer), f"{balance:.3f}", f"{bound:.3f}")
    Console().print(table)
    if out is not None:
        with written_whole(out) as (partial,):
            partial.write_text(json.dumps(placement.to_dict()))


@app.command()
def doctor() -> None:
    """Versions, devices, backends, and a small program run on each backend."""
    from moec.doctor import examine

    checks = examine()
    table = Table("what", "state")
    for check in checks:
        table.add_row(check.what, check.state if check.ok else f"[red]{check.state}[/red]")
    Console().print(table)
    raise typer.Exit(0 if all(c.ok for c in checks) else 1)
