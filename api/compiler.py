"""`moec.compile` and `moec.trace`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moec.backends import Backend, get_backend
from moec.checkpoints import CheckpointModel, module_of, open_model
from moec.compiled import CompiledModel
from moec.decoder import (
    cached_decoder,
    check_decoding,
    check_padding,
    draft_decoder,
    example,
    generates,
    prompt_example,
    speculates,
    split_decoder,
)
from moec.frontend import Signature
from moec.frontend.errors import translated
from moec.frontend.limits import Limits
from moec.generation import Generator, Stops
from moec.in_place import in_place
from moec.ir import CompileError, Graph, Placement, Quantization
from moec.passes.base import Pass
from moec.passes.pipeline import Pipeline, build_pipeline
from moec.program import Program, Settings, Step, build, cache_folder
from moec.progress import progress
from moec.sources import acquire, describe, warn_of_training
from moec.speculation import Speculator


def compile(
    model: torch.nn.Module | torch.export.ExportedProgram | Graph | str | Path | Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    backend: str | Backend = "auto",
    dynamic_shapes: Any = None,
    passes: Iterable[Pass] | Pipeline | None = None,
    quantize: str | Quantization | None = None,
    placement: Placement | None = None,
    fallback: str = "error",
    dump: str | Path | None = None,
    threads: int | None = None,
    memory: str = "fast",
    cache: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> CompiledModel:
    """Compile a model for a backend.

    model: a torch.nn.Module (traced at the example `args` and `kwargs`), a torch.export.ExportedProgram, a Graph
        (called with tensors in the order of its inputs, returns a tuple), the path of an .onnx file or an ONNX model in
        memory (called as a Graph is; it says itself which sizes vary), or the path of a checkpoint folder or of a
        .gguf file (docs/checkpoints.md). A causal language model needs no example arguments to generate.
    backend: "auto" (triton where CUDA is, else onnxruntime), "reference", "onnxruntime", "triton", or a Backend.
    dynamic_shapes: as torch.export's, or "auto"; None means the example's sizes only.
    passes: None for the default pipeline, passes to append to it, or a Pipeline.
    quantize: None, "fp8" (weights in 128×128 blocks, activations per token in groups of 128), "fp8-weight-only",
        "int8", "int4" (weights only), or a Quantization; see docs/quantisation.md. What a checkpoint stores in FP8 is
        used as it is stored, its activations as in "fp8" or, if asked for, as in "fp8-weight-only"; as integers it is
        stored anew.
    placement: where experts live (`moec.place_experts`), or None.
    fallback: "error" refuses what the backend lacks; "reference" runs those nodes in the reference interpreter and
        lists them in the report.
    dump: a folder for the IR after every pass.
    threads: CPU threads of the backend; None for its default.
    memory: for onnxruntime, which multiplies no FP8: "fast" holds all weights in f32, "fp8" as they are stored (8 or 16
        bits) and widens each where it is used, which is slower; the report has the bytes of both. "mapped" leaves f32
        weights in a memory-mapped file: a session starts at once and holds no copy, and products are slower. What does
        not fit into memory is mapped without being asked for, and the report says so. Integer weights stay integers in
        each of them, and other backends hold FP8 weights in 8 bits.
    cache: for onnxruntime, a folder for optimised models, shared by processes; None keeps none. Compiling the same
        model again, or loading it, then starts from there (docs/starting.md); the report says whether it did.
    options: what else the backend can be told, for onnxruntime: "portable" (standard ONNX operators only), "experts"
        (the form of experts) and "huge_pages"; see docs/speed-on-cpu.md.

    A module is compiled as it is in evaluation, with a warning where it is in training mode and has dropout or batch
    norms. Weights are shared with the model, not copied; they must not change once the compiled model has run. Raises
    ArgumentTypeError (a TypeError) for arguments that forward does not take, and CompileError naming the op, module
    path, file:line and what could be done.
    """
    model = open_model(model)
    if isinstance(model, CheckpointModel):
        quantize = model.quantization(quantize)
    settings = Settings(
        backend=get_backend(backend),
        pipeline=build_pipeline(passes, quantize, placement),
        fallback=fallback,
        threads=threads,
        dump=Path(dump) if dump is not None else None,
        memory=memory,
        cache=cache_folder(cache),
        more=dict(options) if isinstance(options, Mapping) else options or {},
    )
    warn_of_training(model)
    name = describe(model)
    seconds: dict[str, float] = {}
    can_generate = generates(module_of(model))

    def make_generator() -> Generator:
        return _generator(model, settings, seconds)

    def make_speculator() -> Speculator:
        return _speculator(model, settings.under("speculative"), seconds)

    drafts = make_speculator if speculates(module_of(model)) else None
    program: Program | None = None
    signature: Signature | None = None
    tokenizer = model.checkpoint.tokenizer if isinstance(model, CheckpointModel) else None
    if can_generate and not args and not kwargs:
        generator = make_generator()
        return CompiledModel(
            name,
            settings,
            None,
            None,
            generator=generator,
            make_speculator=drafts,
            seconds=seconds,
            tokenizer=tokenizer,
        )
    with progress(f"compile {name}") as step:
        step("trace")
        start = time.perf_counter()
        graph, signature = acquire(model, args, kwargs, dynamic_shapes)
        seconds["trace"] = time.perf_counter() - start
        program = build(graph, settings, step)
    return CompiledModel(
        name,
        settings,
        program,
        signature,
        make_generator=make_generator if can_generate else None,
        make_speculator=drafts,
        seconds=seconds,
        tokenizer=tokenizer,
    )


def _generator(model: Any, settings: Settings, seconds: dict[str, float]) -> Generator:
    """One program for any number of new tokens; where a model does something else for one than for several, two."""
    module = module_of(model)
    with progress(f"compile {describe(model)} with its cache") as step:
        step("trace")
        start = time.perf_counter()
        first: Graph | None = None
        before = Limits()
        with translated(module, "running the model with its cache"):
            try:
                decoder, past_of = cached_decoder(module)
                graph, limits, least = _decoder_graph(model, decoder, *example(past_of))
            except CompileError:
                split = split_decoder(module)
                if split is None:
                    raise
                prompt, decoder, past_of = split
                example_prompt, shapes = prompt_example()
                fewest = example_prompt[0].shape[1]
                first, before, least = _decoder_graph(model, prompt, example_prompt, shapes, fewest)
                check_padding(prompt, least)
                graph, limits, _ = _decoder_graph(model, decoder, *example(past_of, length=1))
        seconds["trace cached"] = time.perf_counter() - start
        cached, past = _cached(graph, settings.under("cached"), step, limits)
        prompted = None if first is None else build(first, settings.under("prompt"), step, before)
        return Generator(cached, Stops.of(module), prompted, least, past)


def _cached(graph: Graph, settings: Settings, step: Step, limits: Limits) -> tuple[Program, str | None]:
    """The program of decoding; where its caches are buffers, the symbol that counted their filled rows."""
    past: list[str] = []

    def adapt(after: Graph) -> Graph:
        found = in_place(after) if settings.backend.in_place else None
        past.extend([] if found is None else [found.past])
        return after if found is None else found.graph

    program = build(graph, settings, step, limits, adapt)
    return program, past[0] if past else None


def _decoder_graph(
    model: Any, decoder: torch.nn.Module, args: tuple[Any, ...], shapes: dict[str, Any], fewest: int = 1
) -> tuple[Graph, Limits, int]:
    """The graph of a decoder, which holds for `fewest` new tokens, the sizes it holds for, and how few
    new tokens that is."""
    graph, signature = acquire(_with_weights(model, decoder), args, None, shapes)
    return graph, signature.limits, check_decoding(graph, signature.bounds, fewest)


def _speculator(model: Any, settings: Settings, seconds: dict[str, float]) -> Speculator:
    with progress(f"compile {describe(model)} with its drafts") as step:
        step("trace")
        start = time.perf_counter()
        with translated(module_of(model), "running the model with its drafts"):
            decoder, args, shapes = draft_decoder(module_of(model))
        graph, signature = acquire(_with_weights(model, decoder), args, None, shapes)
        seconds["trace speculative"] = time.perf_counter() - start
        return Speculator(build(graph, settings, step, signature.limits), Stops.of(module_of(model)))


def _with_weights(model: Any, decoder: torch.nn.Module) -> Any:
    """A decoder of a model; that of a checkpoint has its weights from the files."""
    return model.around(decoder) if isinstance(model, CheckpointModel) else decoder


def trace(
    model: torch.nn.Module | torch.export.ExportedProgram | Graph | str | Path | Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Graph:
    """The typed graph of a model before any pass. dynamic_shapes: as torch.export's, or "auto"; None for the
    example's sizes only. Raises CompileError naming the construct, module path and file:line that cannot be traced."""
    return acquire(model, args, kwargs, dynamic_shapes)[0]
