"""What an optimised model depends on, as one digest: the model, its weights, the options, the library, the CPU."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx_ir as onnx
import onnxruntime

import moec.ir
from moec.backends.onnxruntime.lower import Lowered
from moec.backends.onnxruntime.options import Options
from moec.ir import Weight
from moec.ir.weight import ComputedSource, digest, loading_once

_WORKERS = 2  # threads that digest weights; one core does some 1.5 GB/s


def content_key(lowered: Lowered, options: Options) -> str:
    """SHA-256 in hex. Reads every weight whose source does not know its digest; the number of threads does not matter
    to an optimised model. Raises CompileError where a weight cannot be read."""
    whole = hashlib.sha256()
    for part in (*_versions(), _code(), cpu_features(), json.dumps(asdict(options), sort_keys=True)):
        _add(whole, part.encode())
    for data in _structure(lowered.model):
        _add(whole, data)
    digests = _weight_digests({id(w): w for weights, _ in lowered.stored.values() for w in weights}.values())
    for value in lowered.model.graph.initializers.values():
        tensor, stored = value.const_value, lowered.stored.get(str(value.name))
        assert tensor is not None
        _add(whole, f"{value.name} {tensor.dtype} {tensor.shape}".encode())
        if stored is not None and not lowered.foreign:
            weights, how = stored
            _add(whole, " ".join([*(digests[id(w)] for w in weights), how]).encode())
        else:  # a constant, or what somebody else's lowering makes of a weight
            _add(whole, tensor.tobytes())
    return whole.hexdigest()


def _add(whole: Any, data: bytes) -> None:
    """Feed one field, told apart from its neighbours by its length."""
    whole.update(len(data).to_bytes(8, "little"))
    whole.update(data)


def _structure(model: onnx.Model) -> Iterator[bytes]:
    """The model without its initialisers, as messages of protobuf."""
    graph = model.graph
    yield f"{model.ir_version} {sorted(graph.opset_imports.items())}".encode()
    for value in (*graph.inputs, *graph.outputs):
        yield onnx.serde.serialize_value(value).SerializeToString(deterministic=True)
    for node in graph:
        yield onnx.serde.serialize_node(node).SerializeToString(deterministic=True)


def _weight_digests(weights: Iterable[Weight]) -> dict[int, str]:
    """By the `id` of the weight. What is known to be made of other weights has a digest of theirs: a merged weight of a
    saved model, whose digests are known, is not read."""
    weights = list(weights)
    found = _data_digests({id(w): w for weight in weights for w in _origins(weight)}.values())
    for weight in weights:
        _derive(weight, found)
    return found


def _origins(weight: Weight) -> Iterator[Weight]:
    """The weights that a weight is made of in the end, or itself."""
    parts = _parts(weight)
    for part in parts:
        yield from _origins(part)
    if not parts:
        yield weight


def _parts(weight: Weight) -> tuple[Weight, ...]:
    return weight.source.of if isinstance(weight.source, ComputedSource) and weight.digest is None else ()


def _derive(weight: Weight, found: dict[int, str]) -> str:
    """Put the digest of a weight, whose origins' are there, beside them."""
    if id(weight) not in found:
        assert isinstance(weight.source, ComputedSource)
        whole = hashlib.sha256()
        for part in (weight.source.how, str(weight.type), *(_derive(w, found) for w in weight.source.of)):
            _add(whole, part.encode())
        found[id(weight)] = whole.hexdigest()
    return found[id(weight)]


def _data_digests(weights: Iterable[Weight]) -> dict[int, str]:
    """By the `id` of the weight. They are read one after another; threads digest what was read."""
    found: dict[int, str] = {}
    running: deque[tuple[Weight, Future[str]]] = deque()
    with ThreadPoolExecutor(min(_WORKERS, os.cpu_count() or 1)) as pool:
        for weight in weights:
            known = weight.digest or getattr(weight.source, "digest", None)
            if known is not None:
                found[id(weight)] = known
                continue
            with loading_once():  # what is computed is computed again for the session, if there is none in the cache
                running.append((weight, pool.submit(digest, weight.load())))
            if len(running) > _WORKERS:  # bounds what is held at once
                done, future = running.popleft()
                found[id(done)] = future.result()
        found.update((id(w), future.result()) for w, future in running)
    return found


@functools.cache
def _versions() -> tuple[str, ...]:
    found = [f"onnxruntime {onnxruntime.__version__} {onnxruntime.get_build_info()}"]
    for package in ("moec", "torch", "onnx"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # a source tree that is not installed
            found.append(package)
    return tuple(found)


@functools.cache
def _code() -> str:
    """SHA-256 of our own code that makes weights and operators of a graph, which changes without a version."""
    whole = hashlib.sha256()
    for package in (Path(__file__).parent, *map(Path, moec.ir.__path__)):
        for path in sorted(package.rglob("*.py")):
            _add(whole, path.relative_to(package).as_posix().encode())
            _add(whole, path.read_bytes())
    return whole.hexdigest()


@functools.cache
def cpu_features() -> str:
    """What kernels are chosen by, as text: the architecture and the instruction sets that the system tells of."""
    found = [platform.machine()]
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() in ("flags", "Features"):  # x86, ARM; the first core's
                    return " ".join([*found, *sorted(value.split())])
    except OSError:
        pass  # no Linux
    return " ".join([*found, platform.processor()])
