"""Random graphs over every op, through text, passes and backends, held against the reference.

    make fuzz                                          5,000 graphs
    python bench/judge_fuzz.py --graphs 500 --seed 7   fewer, others
    python bench/judge_fuzz.py --seed 7 --only 123     one again: as it is, what is wrong, and the smallest that is

Each graph has a seed of its own, made of `--seed` and its number. What breaks a law (`moec.fuzzing`) is shrunk and
saved under build/fuzz/ as <seed>-<number>.ir with its weights and inputs (.safetensors). Every graph goes through text,
copies, the default pipeline and ONNX Runtime (each fourth with standard operators only), each third through the passes
of choice, each twentieth through Triton's interpreter.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from hypothesis import Phase
from judges import Tally, record
from safetensors.torch import save_file

from moec.fuzzing import Broken, Outcome, check_all
from moec.fuzzing.graphs import Run, of_seed

FOLDER = Path(__file__).resolve().parents[1] / "build" / "fuzz"
JUDGES = ("reference", "onnxruntime", "triton")
TRITON_EVERY, PORTABLE_EVERY, CHOICE_EVERY = 20, 4, 3
_STEP = 1_000_003  # seeds of different runs share no graph


@dataclass
class Result:
    """What was found on one graph."""

    number: int
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    ops: Counter[str] = field(default_factory=Counter)
    nodes: int = 0
    kind: str = ""
    error: str = ""  # making the graph failed
    seconds: float = 0.0


def _seed(seed: int, number: int) -> int:
    return seed * _STEP + number


def judged(number: int, case: Run) -> Iterator[tuple[str, Outcome]]:
    return check_all(
        case,
        portable=number % PORTABLE_EVERY == 0,
        triton=number % TRITON_EVERY == 0,
        choice=number % CHOICE_EVERY == 0,
    )


def examine(seed: int, number: int) -> Result:
    """Make a graph and hold it against everything."""
    found, start = Result(number), time.perf_counter()

    def look(case: Run) -> None:
        found.kind, found.nodes = case.kind, len(case.graph)
        for g in (case.graph, *case.graph.functions.values()):
            found.ops.update(n.op for n in g.nodes)
        found.outcomes.update(judged(number, case))

    try:
        of_seed(_seed(seed, number), look)
    except Exception:  # the maker of graphs is under test too
        found.error = traceback.format_exc(limit=-6)
    found.seconds = time.perf_counter() - start
    return found


def shrink(seed: int, number: int, judge: str, law: str) -> tuple[Run, Broken] | None:
    """The smallest graph that hypothesis finds to break the same law."""
    least: list[tuple[Run, Broken]] = []

    def look(case: Run) -> None:
        for name, outcome in judged(number, case):
            if name == judge and outcome.broken is not None and outcome.broken.law == law:
                least[:] = [(case, outcome.broken)]
                raise AssertionError(str(outcome.broken))

    try:
        of_seed(_seed(seed, number), look, (Phase.generate, Phase.shrink))
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt):
            raise
    return least[0] if least else None


def save(name: str, case: Run, broken: Broken) -> Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.ir"
    head = f"# {case.kind} inputs, {dict(case.binding)}\n# " + str(broken).replace("\n", "\n# ")
    path.write_text(f"{head}\n{case.graph}", encoding="utf-8")
    tensors = {f"input.{i}": t.contiguous().clone() for i, t in enumerate(case.inputs)}
    for prefix, g in (("", case.graph), *case.graph.functions.items()):
        for weight, v in g.weights.items():
            if v.weight is not None:
                tensors[f"weight.{prefix}.{weight}"] = v.weight.load().contiguous().clone()
    save_file(tensors, path.with_suffix(".safetensors"))
    return path


def _start() -> None:
    torch.set_num_threads(1)
    sys.setrecursionlimit(10_000)


def _one(task: tuple[int, int]) -> Result:
    return examine(*task)


def run_all(seed: int, graphs: int, first: int, workers: int) -> list[Result]:
    tasks = [(seed, n) for n in range(first, first + graphs)]
    results: list[Result] = []
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(workers, _start) as pool:
        for found in pool.imap_unordered(_one, tasks, chunksize=4):
            results.append(found)
            for judge, outcome in found.outcomes.items():
                if outcome.broken is not None:
                    print(f"graph {found.number} (--seed {seed} --only {found.number}), {judge}: {outcome.broken}")
            if found.error:
                print(f"graph {found.number} (--seed {seed} --only {found.number}) is not made:\n{found.error}")
            if len(results) % 250 == 0:
                print(f"{len(results)} graphs, {time.perf_counter() - start:.0f} s", flush=True)
    return sorted(results, key=lambda r: r.number)


def tally(results: list[Result]) -> dict[str, Tally]:
    tallies = {judge: Tally() for judge in JUDGES}
    for r in results:
        if r.error:
            tallies["reference"].fails(str(r.number), r.error.strip().splitlines()[-1][:200])
        for judge, outcome in r.outcomes.items():
            t = tallies[judge]
            if outcome.broken is not None:
                t.fails(str(r.number), outcome.broken.law)
            elif outcome.skipped:
                t.skip(str(r.number), outcome.skipped)
            else:
                t.passes()
                if outcome.note:
                    t.notes[outcome.note] = t.notes.get(outcome.note, 0) + 1
    ops = sum((r.ops for r in results), Counter())
    tallies["reference"].notes |= {"nodes": sum(r.nodes for r in results), "ops": len(ops)}
    return tallies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first graph")
    parser.add_argument("--only", type=int, help="one graph by its number")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shrink", type=int, default=5, help="at most so many failures are shrunk")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    _start()
    if args.only is not None:
        results = [examine(args.seed, args.only)]
        of_seed(_seed(args.seed, args.only), lambda case: print(case.kind, dict(case.binding), case.graph, sep="\n"))
        print(
            results[0].error,
            *(f"{j}: {o.broken or o.skipped or 'holds'}" for j, o in results[0].outcomes.items()),
            sep="\n",
        )
    else:
        shutil.rmtree(FOLDER, ignore_errors=True)
        results = run_all(args.seed, args.graphs, args.first, args.workers)
    tallies = tally(results)
    for judge, t in tallies.items():
        if args.only is None and (t.passed or t.failed or t.skipped):
            record("fuzz", judge, t)
        print(f"{judge}: {t.passed} passed, {t.failed} failed, {t.skipped} skipped, {t.notes}")
        for reason, cases in (*t.failures.items(), *t.skips.items()):
            print(f"  {len(cases)} × {reason}: {', '.join(cases[:6])}")
    laws: set[str] = set()
    for r in results:
        for judge, outcome in r.outcomes.items():
            if outcome.broken is not None and outcome.broken.law not in laws and len(laws) < args.shrink:
                laws.add(outcome.broken.law)
                least = shrink(args.seed, r.number, judge, outcome.broken.law)
                if least is not None:
                    print(f"shrunk to {save(f'{args.seed}-{r.number}', *least)}\n{least[0].graph}\n{least[1]}")
    return int(any(t.failed for t in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
