"""A process of its own for one backend: `python -m moec.comparing.child FOLDER` does the job that FOLDER describes."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moec.comparing import execute
from moec.comparing.routing import Pinned
from moec.comparing.store import Store, Values, ordered
from moec.comparing.transport import answer, read_job, settings_of, unpack
from moec.ir import CompileError, Graph
from moec.program import legalise, lower


def main(folder: Path) -> None:
    job = read_job(folder)
    try:
        result = {"program": _program, "reference": _reference, "tuned": _tuned, "nodes": _nodes}[job["kind"]](job)
    except CompileError as e:
        where = f" ({e.location.describe()})" if e.location else ""
        result = {"error": {"message": e.message + where, "code": e.code, "hint": e.hint}}
    answer(folder, {**result, "peak_bytes": execute.peak_bytes()})


def _inputs(graph: Graph, job: dict[str, Any]) -> list[Any]:
    store = Store(Path(job["inputs"]))
    return [store.get(f"input{i}") for i in range(len(graph.inputs))]


def _program(job: dict[str, Any]) -> dict[str, Any]:
    settings = settings_of(job["settings"])
    graph = unpack(Path(job["packed"]))
    inputs = _inputs(graph, job)
    legal, _, left = legalise(graph, settings)
    del graph
    values = Values(legal, Store(Path(job["store"])))
    index = ordered(legal)
    execute.run_program(lower(legal, settings, left), inputs, [index[i] for i in job["taps"]], values)
    return {"fallbacks": len(left)}


def _reference(job: dict[str, Any]) -> dict[str, Any]:
    settings = settings_of(job["settings"])
    graph = unpack(Path(job["packed"]))
    legal, _, _ = legalise(graph, settings)
    values = Values(legal, Store(Path(job["store"])))
    inputs = _inputs(legal, job)
    if "other" not in job:
        execute.run_reference(legal, inputs, values)
        return {}
    index = ordered(legal)
    theirs = Store(Path(job["other"]))
    chosen = {index[int(i)]: theirs.get(name) for i, name in job["chosen"].items()}
    logits = {index[int(i)]: theirs.get(name) for i, name in job["logits"].items()}
    tolerances = {index[int(i)].producer: t for i, t in job["tolerances"].items()}
    pinned = Pinned(job["name"], chosen, logits, lambda node, _: tolerances[node])
    execute.run_reference(legal, inputs, values, pinned)
    return {"flips": [asdict(f) for f in pinned.flips]}


def _tuned(job: dict[str, Any]) -> dict[str, Any]:
    graph = unpack(Path(job["packed"]))
    legal, _, _ = legalise(graph, settings_of(job["settings"]))
    plain = _values(graph, job, job["plain"])
    found = execute.run_tuned(
        legal, _inputs(legal, job), plain, Values(legal, Store(Path(job["store"]))), job["tolerance"]
    )
    place = {n: i for i, n in enumerate(plain.graph.nodes)}
    return {"rows": [{"node": place[node], "difference": asdict(d)} for node, d in found]}


def _values(graph: Graph, job: dict[str, Any], held: dict[str, Any]) -> Values:
    """The values in a store, of the graph as it was legalised for them."""
    legal, _, _ = legalise(graph, settings_of({**job["settings"], "backend": held["for"], "tuning": held["tuning"]}))
    return Values(legal, Store(Path(held["store"])), held["for"], held["tuning"])


def _nodes(job: dict[str, Any]) -> dict[str, Any]:
    values = _values(unpack(Path(job["packed"])), job, job["values"])
    legal = values.graph
    every = list(legal.nodes)
    nodes = [every[i] for i in job["nodes"]]
    place = {n: i for i, n in enumerate(every)}
    rows = execute.run_nodes(values, nodes, settings_of(job["settings"]), job["tolerance"], moves=job["moves"])
    return {"rows": [{"node": place[r.node], "problem": r.problem, "difference": asdict(r.difference)} for r in rows]}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
