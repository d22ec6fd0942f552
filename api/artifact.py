"""Saved models: text IR, safetensors weights, a manifest and the backend's own files in one folder.

    manifest.json           what is here: format, versions, call structure, programs, SHA-256 of every file
    weights.safetensors     every weight once, whichever programs use it; the manifest has the SHA-256 of each
    forward.ir, cached.ir   the graphs after the target-independent passes
    forward/, cached/       what the backend wrote (model.onnx, …)
    tokenizer.json          of the checkpoint, where it had one

Legalisation is deterministic and is done again at load; the manifest holds the digest of its result, so that the
backend's files and the graph always belong together.
"""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from moec.files import TEXT_LIMIT, Folder
from moec.frontend import Signature
from moec.frontend.checkpoints import is_checkpoint
from moec.frontend.containers import type_names
from moec.frontend.limits import Limits
from moec.generation import Generator, Stops
from moec.in_place import SLOT
from moec.ir import (
    ArgumentTypeError,
    ArtifactError,
    CompileError,
    Graph,
    SafetensorsSource,
    TensorType,
    Weight,
    parse,
)
from moec.ir.arrays import packed_type
from moec.ir.opdef import known
from moec.ir.weight import PackedSource, WeightSource
from moec.manifest import MANIFEST, TOKENIZER, WEIGHTS, Manifest, read_manifest
from moec.program import Program, Settings, cache_folder, legalise, lower
from moec.speculation import Speculator
from moec.transformers_types import import_class

if TYPE_CHECKING:
    from moec.compiled import CompiledModel


def load(
    folder: str | Path, *, threads: int | None = None, cache: str | Path | None = None, **unknown: Any
) -> CompiledModel:
    """A model that `CompiledModel.save` wrote, on the backend that it was compiled for; its outputs are bit-equal to
    the saved model's on the same machine.

    threads: CPU threads, None for what it was compiled with. cache: as in `moec.compile`, whose entries serve both.
    Every file is checked against its digest, nothing in the folder is executed or unpickled. Raises ArtifactError
    naming the file or field, expected and got, and ArgumentTypeError (a TypeError) for other options of `moec.compile`.
    """
    if unknown:
        raise ArgumentTypeError(
            f"load() takes no {', '.join(map(repr, unknown))}: a saved model keeps the backend and the passes that it "
            "was compiled with",
            code="arguments",
            hint="compile the model again, or what was saved: moec.compile(moec.load(folder).graph, backend=…)",
        )
    root = Path(folder)
    if is_checkpoint(root) and not (root / MANIFEST).exists():
        raise ArtifactError(
            f"{root} is a checkpoint folder, not a saved model", code="artifact", hint="moec.compile reads it"
        )
    until = time.monotonic() + _PATIENCE
    while True:
        with Folder(root) as files:
            try:
                model = _load(files, threads, cache_folder(cache))
                files.check_unchanged()
                return model
            except ArtifactError:
                # where someone saved over it meanwhile, what is there now is a whole model too
                if not files.replaced or time.monotonic() > until:
                    raise


_PATIENCE = 60.0  # seconds for which a folder may be replaced faster than it is read
_READERS = 4  # threads that digest files
_LONGEST_PAD = 1 << 16


def _load(files: Folder, threads: int | None, cache: Path | None) -> CompiledModel:
    from moec.compiled import CompiledModel

    manifest = read_manifest(files, MANIFEST)
    entries = manifest.mapping("programs")
    unknown = set(entries) - {"forward", "cached", "prompt", "speculative"}
    if unknown or not entries or ("cached" not in entries and set(entries) != {"forward"}):
        raise manifest.bad(
            "programs", "'forward', 'cached' or both, and beside 'cached' 'prompt' or 'speculative'", sorted(entries)
        )
    _check_files(files, manifest)
    _check_ops(manifest)
    settings = _settings(manifest, threads, cache)
    programs = {name: _program(files, manifest, name, settings) for name in entries}
    signature = None
    if "forward" in programs:
        signature = _signature(manifest, programs["forward"].graph)
    generator = speculator = None
    if "cached" in programs:
        stops, past = _stops(manifest), _past(manifest)
        generator = Generator(programs["cached"], stops, programs.get("prompt"), _least_prompt(manifest), past)
        speculator = Speculator(programs["speculative"], stops) if "speculative" in programs else None
        decoders = {name: program.graph for name, program in programs.items() if name != "forward"}
        _check_decoders(files.path, decoders, past is not None)
    tokenizer = files.read(TOKENIZER, TEXT_LIMIT) if TOKENIZER in manifest.mapping("files") else None
    name, forward = manifest.text("name"), programs.get("forward")
    return CompiledModel(
        name, settings, forward, signature, generator=generator, speculator=speculator, seconds={}, tokenizer=tokenizer
    )


def _check_files(files: Folder, manifest: Manifest) -> None:
    listed = manifest.mapping("files")
    for name in (*(f"{program}.ir" for program in manifest.mapping("programs")), WEIGHTS):
        if name not in listed:
            raise manifest.bad("files", f"an entry for {name}", sorted(listed))
    for name in listed:
        manifest.mapping("files", name)
        want, path = manifest.integer("files", name, "bytes"), files.path / name
        size = files.size(name)
        if size != want:
            raise ArtifactError(f"{path} has {size} bytes, expected {want}", code="artifact")
        if name.endswith(".ir") and size > TEXT_LIMIT:
            raise ArtifactError(f"{path} has {size} bytes, more than {TEXT_LIMIT}", code="artifact")
    with ThreadPoolExecutor(_READERS) as pool:
        for name, found in zip(listed, pool.map(files.digest, listed), strict=True):
            want = listed[name].get("sha256")
            if found != want:
                raise ArtifactError(f"{files.path / name} has SHA-256 {found}, expected {want}", code="artifact")
    for name in files.names():
        if name not in listed and name != MANIFEST:
            raise ArtifactError(f"{files.path / name} is not listed in {MANIFEST}", code="artifact")


def _check_ops(manifest: Manifest) -> None:
    """That the ops of other packages are declared. They are not imported: nothing that the folder names is run."""
    for name, module in (manifest.mapping("ops") if "ops" in manifest.data else {}).items():
        if known(name) is None:
            raise ArtifactError(
                f"{manifest.path}: the model uses the op {name}, which nothing has declared",
                code="artifact",
                hint=f"import the module that declares it and its lowerings before moec.load; it was {module!r}",
            )


def _settings(manifest: Manifest, threads: int | None, cache: Path | None) -> Settings:
    from moec.backends import BACKENDS, get_backend
    from moec.passes.pipeline import Pipeline

    name = manifest.text("backend")
    if name not in BACKENDS:
        raise manifest.bad("backend", f"one of {', '.join(BACKENDS)}", name)
    if threads is None:
        threads = manifest.value("threads")
    try:
        return Settings(get_backend(name), Pipeline(()), manifest.text("fallback"), threads, cache=cache)
    except ArtifactError:
        raise
    except CompileError as e:
        raise ArtifactError(f"{manifest.path}: {e.message}", code="artifact", hint=e.hint) from None


def _program(files: Folder, manifest: Manifest, name: str, settings: Settings) -> Program:
    path = files.path / f"{name}.ir"
    try:
        graph = parse(files.read(path.name, TEXT_LIMIT).decode("utf-8"))
    except (CompileError, UnicodeDecodeError) as e:
        raise e if isinstance(e, ArtifactError) else ArtifactError(f"{path}: {e}", code="artifact") from None
    _bind_weights(files, manifest, name, graph)
    try:
        legal, records, left = legalise(graph, settings)
        found = hashlib.sha256(str(legal).encode()).hexdigest()
        expected = manifest.value("programs", name, "legal_sha256")
        if found != expected:
            raise ArtifactError(
                f"{manifest.path}: programs.{name}.legal_sha256 is {expected}, this version of moec gives {found}",
                code="artifact",
                hint=f"it was saved by other versions ({manifest.mapping('versions')}), or with other lowerings of the "
                "caller's own: compile the model again",
            )
        files.check_unchanged()  # backends open by name, which must not block; what they opened is checked at the end
        executable = lower(legal, settings, left, files.path / name)
    except ArtifactError:
        raise
    except CompileError as e:
        raise ArtifactError(
            f"{path}: {e.message}", code="artifact", location=e.location, excerpt=e.excerpt, hint=e.hint
        ) from e
    return Program(graph, legal, executable, records, {}, left, _limits(manifest, name))


def _limits(manifest: Manifest, program: str) -> Limits:
    if "limits" not in manifest.mapping("programs", program):  # folders of before have none
        return Limits()
    try:
        return Limits.from_dict(manifest.mapping("programs", program, "limits"))
    except ArtifactError as e:
        raise ArtifactError(f"{manifest.path}: programs.{program}.limits: {e.message}", code="artifact") from None


def _bind_weights(files: Folder, manifest: Manifest, program: str, graph: Graph) -> None:
    path = files.path / WEIGHTS
    names = manifest.mapping("programs", program, "weights")
    digests = manifest.mapping("tensors") if "tensors" in manifest.data else {}
    try:
        with files.opened(WEIGHTS) as fd:
            file = safe_open(f"/dev/fd/{fd}", framework="pt")  # what was checked, not what the name leads to by now
        present = set(file.keys())
        bound = {}
        for name, value in graph.weights.items():
            key = names.get(name, name)
            if not isinstance(key, str) or key not in present:
                raise ArtifactError(f"{path}: weight {key!r} of {program}.ir is missing", code="artifact")
            found = TensorType.of(file.get_tensor(key))
            held = packed_type(value.type)
            if found != held:
                raise ArtifactError(f"{path}: weight {key!r} is {found}, {program}.ir expects {held}", code="artifact")
            source: WeightSource
            if found == value.type:
                source = SafetensorsSource(path, key, file, digests.get(key))
            else:
                source = PackedSource(SafetensorsSource(path, key, file), value.type, digests.get(key))
            bound[name] = Weight(name, value.type, source)
    except (SafetensorError, OSError) as e:
        raise ArtifactError(f"{path}: {e}", code="artifact") from None
    except CompileError as e:
        raise e if isinstance(e, ArtifactError) else ArtifactError(f"{path}: {e.message}", code="artifact") from None
    graph.bind_weights(bound)


def _stops(manifest: Manifest) -> Stops:
    eos, pad = manifest.value("stops", "eos"), manifest.value("stops", "pad")
    if not isinstance(eos, list) or not all(type(e) is int and 0 <= e < 2**63 for e in eos):
        raise manifest.bad("stops.eos", "a list of token ids", eos)
    if pad is not None and (type(pad) is not int or not 0 <= pad < 2**63):
        raise manifest.bad("stops.pad", "a token id or null", pad)
    positions = manifest.mapping("stops").get("positions")
    if positions is not None and (type(positions) is not int or positions < 1):
        raise manifest.bad("stops.positions", "a positive number or null", positions)
    return Stops(tuple(eos), pad, positions)


def _least_prompt(manifest: Manifest) -> int:
    least = manifest.mapping("stops").get("least_prompt", 1)
    if type(least) is not int or not 1 <= least <= _LONGEST_PAD:
        raise manifest.bad("stops.least_prompt", f"a number from 1 to {_LONGEST_PAD}", least)
    return least


def _past(manifest: Manifest) -> str | None:
    past = manifest.mapping("stops").get("past")
    if past is not None and not (isinstance(past, str) and past.isidentifier()):
        raise manifest.bad("stops.past", "a symbol or null", past)
    return past


def _signature(manifest: Manifest, graph: Graph) -> Signature:
    data = manifest.mapping("signature")
    try:
        for spec in ("in_spec", "out_spec"):
            for name in type_names(manifest.value("signature", spec)):
                import_class(name)
    except ImportError as e:
        raise ArtifactError(f"{manifest.path}: field 'signature' needs {e.name}, which is not installed",
                            code="artifact") from None  # fmt: skip
    try:
        signature = Signature.from_dict(data)
    except ArtifactError as e:
        raise ArtifactError(f"{manifest.path}: {e.message}", code="artifact") from None
    if signature.tensor_names != tuple(v.name for v in graph.inputs):
        raise manifest.bad("signature.input_names", f"the inputs {[v.name for v in graph.inputs]}", data["input_names"])
    leaves = (
        (signature.in_spec.num_leaves, len(signature.input_names)),
        (
            signature.out_spec.num_leaves,
            len(signature.outputs),
        ),
    )
    if any(a != b for a, b in leaves):
        raise manifest.bad("signature", "as many leaves as names and outputs", leaves)
    for kind, index in signature.outputs:
        known = type(index) is int and 0 <= index < len(graph.outputs)
        if kind not in ("tensor", "complex", "size", "number", "constant") or (kind != "constant" and not known):
            raise manifest.bad("signature.outputs", f"outputs of a graph with {len(graph.outputs)}", [kind, index])
    return signature


def _check_decoders(root: Path, graphs: dict[str, Graph], in_place: bool) -> None:
    """That programs have the inputs and outputs that decoding relies on."""
    plain = ("input_ids", "attention_mask")
    lead = {"cached": (*plain, SLOT) if in_place else plain, "speculative": (*plain, "known")}
    for name, graph in graphs.items():
        given, made = [v.name for v in graph.inputs], len(graph.outputs)
        if name == "prompt":
            past = len(graphs["cached"].inputs) - len(lead["cached"])
            ok = given == list(plain) and made == past + 1
        else:
            own = len(lead[name])
            caches = len(given) - own
            ok = given[:own] == list(lead[name]) and caches > 0 and made == caches + (2 if name == "speculative" else 1)
        if not ok or isinstance(graph.inputs[0].shape[0], int):
            raise ArtifactError(
                f"{root / name}.ir: inputs {given} and {made} outputs are not those of a {name} program",
                code="artifact",
            )
