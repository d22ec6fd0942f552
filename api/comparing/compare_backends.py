"""`moec.compare`: the same program on several backends, and where they first part."""

from __future__ import annotations

import difflib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moec.backends import Backend, get_backend
from moec.comparing import transport
from moec.comparing.contenders import ONNX, Compiled, Contender, Eager, Fresh, Saved
from moec.comparing.fitting import fit
from moec.comparing.localise import Localised, blame, bounds_of, divergence_of, localise
from moec.comparing.matching import corresponding
from moec.comparing.result import Comparison, Divergence, OutputResult, dtype_note
from moec.comparing.store import Store, Values, ordered
from moec.comparing.tuning import examine, tuned_by
from moec.compiled import CompiledModel
from moec.difference import difference
from moec.frontend import Signature
from moec.ir import ArgumentValueError, Graph, Node, Placement, Quantization, Value
from moec.passes.base import Pass
from moec.passes.pipeline import Pipeline, build_pipeline
from moec.program import Settings, run_passes
from moec.progress import progress
from moec.sources import acquire, describe, is_onnx, positional
from moec.tolerance import GIVEN, Bound, Tolerance, check_tolerance, given_bound, scale_of

Step = Callable[[str], None]
LARGE = 256 << 20  # bytes of weights from which on every backend has a process of its own
_QUANTISED = 0.25  # of an output's scale
_TAPPED = 1e-3  # how far reading values inside may move an output, relative
SAVED = (".safetensors", ".npz")


def compare(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    backends: Sequence[str | Path | Backend | CompiledModel] = ("reference", "onnxruntime"),
    dynamic_shapes: Any = None,
    passes: Iterable[Pass] | Pipeline | None = None,
    quantize: str | Quantization | None = None,
    placement: Placement | None = None,
    fallback: str = "error",
    threads: int | None = None,
    isolated: bool | None = None,
    tolerance: Tolerance = None,
    processes: bool | None = None,
    save: str | Path | None = None,
) -> Comparison:
    """Run a model on several backends and compare each with the first.

    model, args, kwargs, dynamic_shapes, passes, quantize, placement, fallback, threads: as in `moec.compile`; every
        backend runs the graph after the same passes. For a Graph, args are the tensors of its inputs. A CompiledModel,
        or the folder that one was saved to, is compared as the graph that it holds.
    backends: at least two of: a name, a Backend, a CompiledModel of this model (or of its ONNX export: inputs and
        outputs are matched by name, else by position), the path of an `.onnx` file, which is compiled for ONNX Runtime,
        a `.safetensors` or `.npz` file of outputs by name, or "eager" for the model itself in PyTorch.
    isolated: False ("propagated"): every backend computes on its own values; outputs are compared, and values inside at
        points that survive in both graphs, in order; the node to blame is then found among what leads to the first that
        differs. True: every node gets the reference's operands and is judged by itself, which is how FP8 is judged.
        None chooses True for graphs that quantise activations, and where a backend does so inside (integer weights on
        onnxruntime), else False.
        A backend with tuning passes of its own is run with and without them, and nodes are named without them.
    tolerance: relative to the largest magnitude of a tensor, in place of the tolerances from dtype and reduction length
        (docs/tolerances.md): one for all, or by output, module path, op or family of ops ("" for the rest).
    processes: whether each backend named by text has a process of its own, one after the other, so that memory stays
        near that of the larger plain run and a crash is an error. None: where the weights have 256 MiB or more.
    save: a folder to keep inputs, outputs and values in; its `NAME/outputs.safetensors` can stand for a backend later.

    Tokens whose experts differ are reported with their margin; where that is a near tie, the reference is run again
    with the other backend's experts, so that the comparison goes on past them. Values go through files, two are held at
    a time. Raises CompileError, also for a backend that crashes in its own process.
    """
    if isinstance(backends, str | Path | Backend | CompiledModel) or len(backends) < 2:
        raise ArgumentValueError(f"backends={backends!r} must be at least two", code="arguments")
    check_tolerance(tolerance)
    with progress("compare") as step:
        step("trace")
        held = _held(model)
        if held is not None:
            graph, signature = held.program.graph, held.signature or positional(held.program.graph)
            passes = Pipeline(()) if passes is None else passes
        else:
            example, named = ((), None) if isinstance(model, Graph) else (args, kwargs)
            graph, signature = acquire(model, example, named, dynamic_shapes)
        inputs = signature.flatten(args, kwargs)
        pipeline = build_pipeline(passes, quantize, placement)
        base = Settings(get_backend("reference"), pipeline, fallback, threads)
        after, _ = run_passes(graph, base, step)
        _check_names(tolerance, after)
        with _workspace(save) as folder:
            source = describe(model) if held is None else held.name
            call = (args, kwargs or {})
            run = _Run(model, source, call, signature, after, inputs, base, tolerance, processes, folder, step)
            return run.compare(backends, isolated)


@dataclass(eq=False)
class _Run:
    model: Any
    source: str  # its name
    call: tuple[Sequence[Any], Mapping[str, Any]]
    signature: Signature
    after: Graph
    inputs: list[torch.Tensor]
    base: Settings
    tolerance: Tolerance
    processes: bool | None
    folder: Path
    step: Step
    packed: Path | None = None

    def compare(self, backends: Sequence[Any], isolated: bool | None) -> Comparison:
        contenders = _distinct([self._contender(b) for b in backends])
        first, *others = contenders
        rounded = _quantises(self.after) or any(_is_coarse(c) for c in contenders)
        isolated = rounded if isolated is None else isolated
        comparison = Comparison(first.name, isolated)
        self._keep_inputs()
        self.step(f"run {first.name}")
        base = first.run(self.inputs, _all(first) if first.untuned is None else (), self._at(first))
        guide, guided = self._guide(first, base)
        bounds = bounds_of(guided, self.tolerance)
        outputs = [
            given_bound(bounds.get(v, Bound(0.0, "a weight")), self.tolerance, v.producer, name)
            for name, v in zip(self.after.output_names, guide.outputs, strict=True)
        ]
        for other in others:
            self.step(f"run {other.name}")
            theirs, pairs = self._run_beside(guide, guided, other)
            comparison.fallbacks[other.name] = other.fallbacks
            found = None
            if isolated and other.settings is not None:
                nodes = [n for n in guided.graph.nodes if n.op != "tensor.constant"]
                rows = other.nodes(guided, nodes, self.tolerance, self.step)
                comparison.nodes += rows
                bad = next((r for r in rows if not r.ok), None)
                divergence = None if bad is None else divergence_of(bad, guided)
                if bad is None and other.untuned is not None and not guide.is_foreign(other):
                    at = self._at(other) / "tuned"
                    rows, divergence = examine(other, guided, theirs, at, self.tolerance, self.step)
                    comparison.nodes += rows
            else:
                divergence, found = self._propagated(comparison, guide, guided, other, theirs, pairs)
            expected = found.reference.store if found is not None and guide is first else base
            # the nodes of the first say nothing of the graph and weights of a compiled model, or of saved outputs
            judged = not isolated or not isinstance(other, Fresh)
            if isinstance(other, Saved) and other.renamed:
                comparison.notes.append(
                    f"{other.name}: its only tensor {other.renamed!r} was taken for the only output"
                )
            whole = [_end_to_end(b) for b in outputs] if judged and isolated and rounded else outputs
            self._outputs(comparison, expected, other, theirs, whole, judged)
            comparison.first_divergence = comparison.first_divergence or divergence
            self._finish(comparison, other, theirs, first.legal is not None)
        for c in contenders:
            if c.peak_bytes:
                comparison.peak_bytes[c.name] = c.peak_bytes
        self._save_outputs(contenders)
        return comparison

    # -- contenders --------------------------------------------------------------------------------

    def _contender(self, backend: Any) -> Contender:
        if isinstance(backend, CompiledModel):
            return self._compiled(backend)
        if is_onnx(backend):
            from moec.compiler import compile

            self.step(f"compile {describe(backend)}")
            fallback, threads = self.base.fallback, self.base.threads
            return self._compiled(compile(backend, backend="onnxruntime", fallback=fallback, threads=threads))
        if backend == "eager":
            if not isinstance(self.model, torch.nn.Module):
                raise ArgumentValueError(
                    f"'eager' needs a torch.nn.Module, got {type(self.model).__name__}", code="arguments"
                )
            return Eager(self.model, *self.call, self.signature.outputs)
        if isinstance(backend, str | Path) and Path(backend).suffix in SAVED:
            return Saved(Path(backend), self.after.output_names)
        return self._fresh(replace(self.base, backend=get_backend(backend)))

    def _compiled(self, compiled: CompiledModel) -> Compiled:
        name = compiled.name if compiled.name.endswith(ONNX) else f"compiled {compiled.backend}"
        return Compiled(name, compiled, fit(compiled, self.after, self.source, self.inputs))

    def _fresh(self, settings: Settings) -> Fresh:
        obstacle = transport.obstacle(self.after, settings)
        apart = _weight_bytes(self.after) >= LARGE if self.processes is None else self.processes
        if not apart or obstacle is not None:
            if obstacle is not None and self.processes:
                raise ArgumentValueError(
                    f"processes=True, but {settings.backend.name} cannot run in another process: {obstacle}",
                    code="arguments",
                )
            return Fresh(self.after, self.source, settings)
        if self.packed is None:
            self.step("write the weights")
            self.packed = self.folder / "packed"
            transport.pack(self.after, self.packed)
        return Fresh(self.after, self.source, settings, self.packed, self.folder / "inputs")

    def _guide(self, first: Contender, base: Store) -> tuple[Contender, Values]:
        """Whose values the others' are held against: the first contender's, or the reference's where that has none."""
        if first.untuned is not None:
            # values inside are those that the model has, outputs those that users get
            guide = first.untuned
            assert guide.legal is not None
            self.step(f"run {guide.name}")
            store = guide.run(self.inputs, _all(guide), self._at(guide))
            for i in range(len(self.after.outputs)):
                store.put(f"output{i}", base.get(f"output{i}"))
            return guide, Values(guide.legal, store, first.name, 0)
        if first.legal is not None:
            return first, Values(first.legal, base, first.name)
        guide = self._fresh(self.base)
        self.step("run reference")
        assert guide.legal is not None
        return guide, Values(guide.legal, guide.run(self.inputs, (), self.folder / "guide"))

    def _run_beside(self, guide: Contender, guided: Values, other: Contender) -> tuple[Store, dict[Value, Value]]:
        """A run of `other`, and which of its values are the guide's."""
        pairs: dict[Value, Value] = {}
        if guide.legal is not None and other.legal is not None:
            foreign = guide.is_foreign(other)
            pairs = corresponding(guide.legal, other.legal, foreign=foreign, by_place=other.untuned is None)
        theirs = other.run(self.inputs, list(dict.fromkeys(pairs.values())), self._at(other))
        if guide.is_foreign(other):
            pairs = _of_one_shape(pairs, guided, other, theirs)
        return theirs, pairs

    # -- judging -----------------------------------------------------------------------------------

    def _propagated(
        self,
        comparison: Comparison,
        guide: Contender,
        guided: Values,
        other: Contender,
        theirs: Store,
        pairs: Mapping[Value, Value],
    ) -> tuple[Divergence | None, Localised | None]:
        """Where `other` parts from the guide, first of all without the backend's tuning, and what its outputs are to be
        compared with. A CompiledModel is judged as it is: without tuning it only says where it is wrong."""
        if other.legal is None:
            return None, None
        found = self._localised(comparison, guide, guided, other, theirs, pairs)
        comparison.routing_flips += found.flips
        plain = other.untuned
        if plain is not None and (found.first is not None or not isinstance(other, Compiled)):
            self.step(f"run {plain.name}")
            store, same = self._run_beside(guide, guided, plain)
            other.peak_bytes = max(other.peak_bytes, plain.peak_bytes)
            first = self._localised(comparison, guide, guided, plain, store, same)
            seen = {(f.location, f.token) for f in found.flips}
            comparison.routing_flips += [f for f in first.flips if (f.location, f.token) not in seen]
            if first.first is not None:
                if found.first is None:
                    comparison.notes.append(
                        f"{other.name}: only lowered without the backend's tuning passes is it wrong; as tuned, which "
                        "is what runs, it agrees"
                    )
                self.step(f"blame {plain.name}")
                return replace(blame(first, plain, store, same, self.tolerance, self.step), backend=other.name), found
        if found.first is None:
            return None, found
        if plain is not None and not guide.is_foreign(other):
            at = self._at(other) / "tuned"
            wrong = examine(other, guided, theirs, at, self.tolerance, self.step)[1]
            if wrong is not None:
                return wrong, found
            found.first = replace(found.first, tuning=tuned_by(other))
        self.step(f"blame {other.name}")
        return blame(found, other, theirs, pairs, self.tolerance, self.step), found

    def _localised(
        self,
        comparison: Comparison,
        guide: Contender,
        guided: Values,
        other: Contender,
        theirs: Store,
        pairs: Mapping[Value, Value],
    ) -> Localised:
        self.step(f"compare {other.name}")
        again = self.folder / f"pinned-{other.folder}"
        found = localise(guide, guided, other, theirs, pairs, self.inputs, self.tolerance, again)
        at_output = self._at_an_output(found, guide, other, theirs)
        if at_output is None and guide.is_foreign(other):
            # what was taken for the same value inside need not be: it may show where outputs part, and no more
            found.rows, found.first, found.flips = [], None, [f for f in found.flips if f.near_tie]
            comparison.notes.append(f"{other.name}: of another source than {guide.name}, so outputs alone were judged")
        comparison.values += found.rows
        if found.first is None:
            found.first = at_output
        return found

    def _at_an_output(self, found: Localised, guide: Contender, other: Contender, theirs: Store) -> Divergence | None:
        """The node of the first output out of tolerance."""
        for i, v in enumerate(guide.outputs):
            if v.producer is None:
                continue
            expected = found.reference.output(i)
            d = difference(expected, theirs.get(f"output{i}"), found.bounds[v], scale_of(expected, None, {}))
            if not d.ok:
                where = v.producer.location.describe()
                return Divergence(other.name, v.producer, where, d.max_error, d.tolerance, d.why)
        return None

    def _outputs(
        self,
        comparison: Comparison,
        base: Store,
        other: Contender,
        theirs: Store,
        bounds: Sequence[Bound],
        judged: bool,
    ) -> None:
        for i, (name, bound) in enumerate(zip(self.after.output_names, bounds, strict=True)):
            expected, got = base.get(f"output{i}"), theirs.get(f"output{i}")
            d = difference(expected, got, bound, scale_of(expected, None, {}))
            comparison.outputs.append(OutputResult(other.name, name, d, judged))
            if isinstance(other, Saved) and got.dtype is not expected.dtype:
                comparison.notes.append(dtype_note(other.name, name, expected, got))

    def _finish(self, comparison: Comparison, other: Contender, theirs: Store, guided: bool) -> None:
        """Notes on what the tables do not say."""
        if other.legal is not None:
            seen = Values(other.legal, theirs)
            for i, (name, v) in enumerate(zip(self.after.output_names, other.outputs, strict=True)):
                if v.producer is None or v not in seen:
                    continue
                plain, tapped = theirs.get(f"output{i}"), seen.get(v)
                d = difference(plain, tapped, Bound(_TAPPED, ""), scale_of(tapped, None, {}))
                if not d.ok:
                    comparison.notes.append(
                        f"{other.name}: output {name!r} changes by {d.max_error:.3g} when values inside are read, so "
                        "that the backend's own fusion of the whole program is at fault"
                    )
        if not guided:
            comparison.notes.append(
                f"{comparison.reference} has no values inside: {other.name}'s were held against the reference's"
            )

    # -- files -------------------------------------------------------------------------------------

    def _at(self, contender: Contender) -> Path:
        return self.folder / contender.folder

    def _keep_inputs(self) -> None:
        store = Store(self.folder / "inputs")
        for i, t in enumerate(self.inputs):
            store.put(f"input{i}", t)

    def _save_outputs(self, contenders: Sequence[Contender]) -> None:
        from safetensors.torch import save_file

        for c in contenders:
            store = Store(self._at(c) / "values")
            named = {n: store.get(f"output{i}").clone() for i, n in enumerate(self.after.output_names)}
            save_file(named, self._at(c) / "outputs.safetensors")


def _held(model: Any) -> CompiledModel | None:
    """A compiled model, or the one that a folder holds."""
    from moec.artifact import load
    from moec.manifest import MANIFEST

    if isinstance(model, CompiledModel):
        return model
    if isinstance(model, str | Path) and (Path(model) / MANIFEST).is_file():
        return load(model)
    return None


def _all(contender: Contender) -> list[Value]:
    return [] if contender.legal is None else [v for v in ordered(contender.legal) if v.producer is not None]


def _of_one_shape(pairs: Mapping[Value, Value], guided: Values, other: Contender, theirs: Store) -> dict[Value, Value]:
    """The pairs whose values have one shape in this run: symbols of two sources say nothing of each other."""
    assert other.legal is not None
    got = Values(other.legal, theirs)
    known = {a: b for a, b in pairs.items() if a in guided and b in got}
    return {a: b for a, b in known.items() if guided.type(a).shape == got.type(b).shape}


def _end_to_end(bound: Bound) -> Bound:
    """For outputs of graphs that are judged node by node: codes that flip at a midpoint, from layer to layer, show as
    some hundredths; other weights or another program as more than this."""
    if not bound.relative or bound.why.startswith(GIVEN):
        return bound
    return Bound(max(bound.relative, _QUANTISED), "end to end, rounded to few bits inside")


def _quantises(graph: Graph) -> bool:
    def inside(node: Node) -> bool:
        return node.op == "quant.scaled_experts" and node.attrs["group"] is not None

    return any(node.op == "quant.quantize" or inside(node) for node in graph.nodes)


def _is_coarse(contender: Contender) -> bool:
    """Whether a backend adds up some nodes more coarsely than f32."""
    if contender.settings is None or contender.legal is None:
        return False
    return any(contender.settings.backend.coarse_sums(n) is not None for n in contender.legal.nodes)


def _weight_bytes(graph: Graph) -> int:
    sizes = (v.type.nbytes for v in graph.weights.values())
    return sum(s for s in sizes if isinstance(s, int))


def _distinct(contenders: list[Contender]) -> list[Contender]:
    """With names that tell them apart, and folders of their own."""
    seen: dict[str, int] = {}
    folders = {"inputs", "packed", "guide"}
    for c in contenders:
        seen[c.name] = seen.get(c.name, 0) + 1
        if seen[c.name] > 1:
            c.name = f"{c.name} #{seen[c.name]}"
        c.folder = re.sub(r"[^\w.-]+", "-", c.name).strip(".-") or "backend"
        if c.folder.startswith("pinned-"):
            c.folder = f"backend-{c.folder}"
        while c.folder in folders:
            c.folder += "_"
        folders.add(c.folder)
    return contenders


def _check_names(tolerance: Tolerance, graph: Graph) -> None:
    """That every key of a mapping names something. Raises ArgumentValueError."""
    if not isinstance(tolerance, Mapping):
        return
    known = {"", *graph.output_names}
    for node in graph.nodes:
        known |= {node.op, node.opdef.family}
        for path in (f.module.split(".") for f in node.location.frames):
            known |= {".".join(path[:i]) for i in range(1, len(path) + 1)}
    unknown = [name for name in tolerance if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 3)
        raise ArgumentValueError(
            f"tolerance for {unknown[0]!r}, which is no output, module, op or family of ops of this model",
            code="arguments",
            hint=f"did you mean {', '.join(near)}?" if near else None,
        )


@contextmanager
def _workspace(save: str | Path | None) -> Iterator[Path]:
    if save is not None:
        folder = Path(save)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ArgumentValueError(f"save={str(save)!r} exists and is not an empty folder", code="arguments")
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        shutil.rmtree(folder / "packed", ignore_errors=True)
        return
    made = Path(tempfile.mkdtemp(prefix="moec-compare-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
