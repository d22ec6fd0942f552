"""A graph and its weights in a folder, for a process that runs a backend on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from moec.backends import BACKENDS, get_backend
from moec.backends.base import ships
from moec.ir import CompileError, Graph, SafetensorsSource, Weight, parse
from moec.ir.arrays import BYTES, as_bytes
from moec.ir.weight import BytesSource, loading_once
from moec.passes.pipeline import Pipeline
from moec.program import Settings

_GRAPH, _JOB, _RESULT, _KEY = "graph.ir", "job.json", "result.json", "weight"


def obstacle(graph: Graph, settings: Settings) -> str | None:
    """Why a graph and backend cannot go to another process, or None."""
    backend = settings.backend
    if backend.name not in BACKENDS or get_backend(backend.name) is not backend:
        return f"backend {backend.name} is an object of this process"
    for g in (graph, *graph.functions.values()):
        if g is not graph and g.weights:
            return "a called function has weights of its own"
        for node in g.nodes:
            if node.opdef.cls.__module__.split(".")[0] != "moec":
                return f"{node.op} is declared in this process"
            lowering = backend.lowerings.get(node.op)
            if lowering is not None and not ships(lowering):
                return f"{backend.name} has a lowering of {node.op} from this process"
    return None


def pack(graph: Graph, folder: Path) -> None:
    """Write the graph and its weights, one at a time; weights in safetensors files stay where they are."""
    folder.mkdir(parents=True)
    (folder / _GRAPH).write_text(str(graph), "utf-8")
    places: dict[str, tuple[str, str]] = {}
    for i, (name, value) in enumerate(graph.weights.items()):
        weight = value.weight
        assert weight is not None
        if isinstance(weight.source, SafetensorsSource) and weight.type.dtype not in BYTES:
            places[name] = str(Path(weight.source.path).resolve()), weight.source.key
            continue
        path = folder / f"weight{i}.safetensors"
        with loading_once():
            save_file({_KEY: as_bytes(weight.load().cpu()).contiguous()}, path)
        places[name] = str(path), _KEY
    (folder / "weights.json").write_text(json.dumps(places), "utf-8")


def unpack(folder: Path) -> Graph:
    """The graph that `pack` wrote, its weights memory-mapped."""
    graph = parse((folder / _GRAPH).read_text("utf-8"))
    places = json.loads((folder / "weights.json").read_text("utf-8"))
    bound = {}
    for name, (file, key) in places.items():
        type, source = graph.weights[name].type, SafetensorsSource(Path(file), key)
        bound[name] = Weight(name, type, BytesSource(source, type.dtype) if type.dtype in BYTES else source)
    graph.bind_weights(bound)
    return graph


def describe(settings: Settings) -> dict[str, Any]:
    """Settings for another process."""
    kept = {name: getattr(settings, name) for name in ("fallback", "threads", "memory", "tuning")}
    return {"backend": settings.backend.name, **kept, "more": dict(settings.more)}


def settings_of(data: Mapping[str, Any]) -> Settings:
    """Settings from `describe`."""
    return Settings(get_backend(data["backend"]), Pipeline(()), **{k: v for k, v in data.items() if k != "backend"})


def call(kind: str, packed: Path, job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run a job of `moec.comparing.child` on a packed graph and return what it gives. Raises the CompileError that it
    raised, or one that says how its process ended."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _RESULT).unlink(missing_ok=True)
    (folder / _JOB).write_text(json.dumps({"kind": kind, "packed": str(packed), **job}), "utf-8")
    command = [sys.executable, "-m", "moec.comparing.child", str(folder)]
    log = folder / "log.txt"
    with log.open("wb") as out:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=_environment())
    name = job["settings"]["backend"]
    if not (folder / _RESULT).exists():
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        said = log.read_text("utf-8", "replace").strip().splitlines()
        raise CompileError(
            f"the process that ran {name} ended with {how}" + (f": {said[-1]}" if said else ""),
            code="backend-crash",
            hint="a backend that crashes on a program is at fault; processes=False shows it in this process",
        )
    result = json.loads((folder / _RESULT).read_text("utf-8"))
    if "error" in result:
        e = result["error"]
        raise CompileError(e["message"], code=e["code"], hint=e["hint"])
    return result


def answer(folder: Path, result: Mapping[str, Any]) -> None:
    """Write a result, whole or not at all."""
    work = folder / "result.tmp"
    work.write_text(json.dumps(result), "utf-8")
    os.replace(work, folder / _RESULT)


def read_job(folder: Path) -> dict[str, Any]:
    return json.loads((folder / _JOB).read_text("utf-8"))


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _environment() -> dict[str, str]:
    """This process's, with its import path."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
