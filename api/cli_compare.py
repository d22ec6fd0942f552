"""`moec compare`: a model on several backends, or one thing against another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.cli_options import Batch, Passes, Quantize, Seq, passes_of
from moec.ir import ArgumentValueError

if TYPE_CHECKING:
    from moec.backends import Backend
    from moec.comparing import Comparison
    from moec.compiled import CompiledModel

BOTH = "reference,onnxruntime"


def compare(
    first: Annotated[
        str, typer.Argument(help="a model as in `compile`, a saved folder, an .onnx file, or a file of outputs")
    ],
    second: Annotated[
        str | None, typer.Argument(help="what to compare it with, instead of backends with each other")
    ] = None,
    backends: Annotated[
        str | None,
        typer.Option(
            help="comma-separated names, module:name or path.py:name; the first is the reference. "
            f"Default: {BOTH}; with two models onnxruntime for both (saved folders run on their own); eager: as it is"
        ),
    ] = None,
    passes: Passes = None,
    quantize: Quantize = None,
    isolated: Annotated[bool | None, typer.Option(help="judge every node by itself; default: for FP8")] = None,
    fallback: Annotated[str, typer.Option(help="error, or reference for nodes a backend lacks")] = "error",
    tolerance: Annotated[float | None, typer.Option(min=0, help="relative, in place of the derived ones")] = None,
    processes: Annotated[
        bool | None, typer.Option(help="a process for each backend; default: where the weights are large")
    ] = None,
    inputs: Annotated[Path | None, typer.Option(help=".safetensors or .npz file of inputs by name")] = None,
    save: Annotated[Path | None, typer.Option(help="folder for inputs, outputs and values inside")] = None,
    repro: Annotated[Path | None, typer.Option(help="folder for the first divergent node, where there is one")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="write the comparison as JSON")] = None,
    batch: Batch = 2,
    seq: Seq = 24,
) -> None:
    """Compare a model on several backends, two models or saved folders, or either with saved outputs.

    Exit code 0 where they agree, 1 where they differ, 2 for bad input, 3 for a crash. A graph.ir runs on the data of
    the .safetensors file beside it, or on seeded random numbers; so do an .onnx file and a saved folder without
    --inputs.
    """
    options = {
        "passes": passes_of(passes),
        "quantize": quantize,
        "isolated": isolated,
        "fallback": fallback,
        "tolerance": tolerance,
        "processes": processes,
        "save": save,
    }
    found = _compare(first, second, backends, inputs, (batch, seq), options)
    print(str(found))
    if json_ is not None:
        json_.write_text(json.dumps(found.to_dict(), indent=1), "utf-8")
    if repro is not None and found.first_divergence is not None:
        print(f"the first divergent node is in {found.save_repro(repro)}")
    raise typer.Exit(0 if found.ok else 1)


def _compare(
    first: str,
    second: str | None,
    backends: str | None,
    inputs: Path | None,
    sizes: tuple[int, int],
    options: dict[str, Any],
) -> Comparison:
    import moec
    from moec.backend_spec import parse_backends
    from moec.comparing.saved import compare_files
    from moec.passes import Pipeline

    given = [first] if second is None else [first, second]
    files = [s for s in given if _is_file(s)]
    if len(files) == 2:
        return compare_files(first, str(second), options["tolerance"])
    if second is None and files:
        raise ArgumentValueError(f"{first} holds outputs: name what to compare it with", code="arguments")
    subject = next(_Subject.of(s, inputs, *sizes) for s in given if not _is_file(s))
    if second is None:
        sides: Sequence[Any] = parse_backends(backends or BOTH)
    elif files:
        chosen: list[Any] = parse_backends(backends or "onnxruntime")
        sides = [*files, *chosen] if _is_file(first) else [*chosen[:1], *files, *chosen[1:]]
    else:
        chosen = parse_backends(backends or "onnxruntime")
        if len(chosen) > 2:
            raise ArgumentValueError(f"--backends {backends}: one for both, or one for each", code="arguments")
        return _two(subject, _Subject.of(str(second), inputs, *sizes), chosen[0], chosen[-1], options)
    if subject.loaded is not None:  # its graph has been through the passes
        options = {**options, "passes": Pipeline(tuple(options["passes"]))}
    found = moec.compare(subject.model, subject.args, subject.kwargs, backends=sides, **options)
    if files and subject.seeded:
        found.notes.append(f"{subject.name} ran on random numbers; --inputs FILE gives what {files[0]} was made from")
    return found


def _two(subject: _Subject, other: _Subject, mine: Any, theirs: Any, options: dict[str, Any]) -> Comparison:
    """One thing on a backend against another on a backend; one of them may be a module as it is ("eager")."""
    import moec
    from moec.passes import Pipeline

    if mine == theirs == "eager":
        raise ArgumentValueError("'eager' can be one of the two", code="arguments", hint="--backends eager,onnxruntime")
    subject = subject.at(other)
    sides = [
        "eager" if mine == "eager" else subject.on(mine, options),
        "eager" if theirs == "eager" else other.on(theirs, options, subject),
    ]
    if "eager" in sides:
        model = (subject if mine == "eager" else other).model
    else:
        model = sides[0] if subject.loaded is None else subject.model
        options = {**options, "passes": Pipeline(()), "quantize": None}
    return moec.compare(model, subject.args, subject.kwargs, backends=sides, **options)


def _is_file(text: str) -> bool:
    return Path(text).suffix in (".safetensors", ".npz")


@dataclass
class _Subject:
    """A model with arguments; of a saved one, its graph with the tensors of its inputs. `seeded`: the arguments are
    random numbers, for want of others."""

    name: str
    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] | None
    loaded: CompiledModel | None = None
    seeded: bool = False

    @staticmethod
    def of(spec: str, inputs: Path | None, batch: int, seq: int) -> _Subject:
        import moec
        from moec.comparing.contenders import read_tensors
        from moec.sources import is_onnx
        from moec.specs import Target, resolve

        loaded = moec.load(spec) if Path(spec).is_dir() else None
        target = Target(loaded.graph, (), None) if loaded is not None else resolve(spec, batch, seq)
        named = None if inputs is None else read_tensors(inputs)
        if isinstance(target.model, moec.Graph) or is_onnx(target.model):
            filled = target.with_data()
            args = filled.args if named is None else _by_name([str(v.name) for v in filled.model.inputs], named, inputs)
            model = target.model if is_onnx(target.model) else filled.model
            return _Subject(spec, model, args, None, loaded, seeded=named is None and not target.args)
        return _Subject(spec, target.model, () if named is not None else target.args, named)

    def at(self, other: _Subject) -> _Subject:
        """The same with the arguments of the other, where it has some of its own and this one seeded numbers."""
        if not self.seeded or other.seeded or not (other.args or other.kwargs):
            return self
        return replace(self, args=other.args, kwargs=other.kwargs)

    def on(self, backend: str | Backend, options: dict[str, Any], like: _Subject | None = None) -> CompiledModel:
        """Compiled, on the backend (what is saved: on its own), at the arguments of `like`."""
        import moec
        from moec.sources import is_onnx

        if self.loaded is not None:
            return self.loaded
        at = like or self
        typed = isinstance(self.model, moec.Graph) or is_onnx(self.model)  # which needs no examples
        return moec.compile(
            self.model,
            () if typed else at.args,
            None if typed else at.kwargs,
            backend=backend,
            passes=options["passes"],
            quantize=options["quantize"],
            fallback=options["fallback"],
        )


def _by_name(names: Sequence[str], tensors: dict[str, Any], path: Path | None) -> tuple[Any, ...]:
    missing = [n for n in names if n not in tensors]
    if missing:
        raise ArgumentValueError(
            f"{path} has no inputs {', '.join(missing)}; it holds {', '.join(sorted(tensors))}", code="arguments"
        )
    return tuple(tensors[n] for n in names)
