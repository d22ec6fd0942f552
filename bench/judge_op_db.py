"""torch's op database as a judge: every op that takes float32, as a one-op module, against torch itself.

    python bench/judge_op_db.py                 two seeded samples per op
    python bench/judge_op_db.py --full          all samples
    python bench/judge_op_db.py --ops 40        a seeded choice of ops
    python bench/judge_op_db.py --only addmm    ops by name (a regular expression)

Of a sample that `torch.export.export(strict=False)` takes, each backend must give torch's result or refuse it with a
CompileError that names the op; the exit code is 1 where one is wrong or crashes. Worker processes have a limit of
memory, and of time per op; one that is lost counts as a crash.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import select
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from judges import Tally, record

BACKENDS = ("reference", "onnxruntime")
MEMORY = 6 * 2**30  # address space of a worker; torch and ONNX Runtime map 3 of them
SECONDS = 60  # without a verdict
RECYCLE = 120  # ops of one worker: torch keeps what it compiled


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all samples of an op")
    parser.add_argument("--samples", type=int, default=2, help="samples per op")
    parser.add_argument("--ops", type=int, help="only so many ops, chosen by the seed")
    parser.add_argument("--only", help="only ops whose name matches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--verdicts", type=Path, help="write every verdict there, one JSON object a line")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    count = None if options.full else options.samples
    if options.worker:
        work(count, options.seed)
        return True
    start = time.perf_counter()
    names = chosen(options)
    verdicts = collect(names, options)
    tallies = {b: tally([v for v in verdicts if v["backend"] == b]) for b in BACKENDS}
    if not options.only and not options.ops:
        for backend, t in tallies.items():
            record("op_db", backend, t)
    show(tallies, len(names), time.perf_counter() - start)
    return all(not t.notes["wrong"] and not t.notes["crashed"] for t in tallies.values())


def chosen(options: argparse.Namespace) -> list[str]:
    from op_db import ops

    names = [o.full_name for o in ops()]
    if options.only:
        names = [n for n in names if re.search(options.only, n)]
    if options.ops:
        names = sorted(random.Random(options.seed).sample(names, min(options.ops, len(names))))
    return names


# -- a worker -----------------------------------------------------------------------------------------


def work(count: int | None, seed: int) -> None:
    """Reads op names, a line each; writes verdicts as JSON lines, and {"done": name} after each op."""
    import warnings

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not an answer
    warnings.simplefilter("ignore")
    import torch
    from op_db import judge, ops, samples

    torch.set_num_threads(1)
    known = {o.full_name: o for o in ops()}

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    answer({"ready": True})
    for line in sys.stdin:
        name = line.strip()
        for sample in samples(known[name], count, seed):
            answer({"start": sample.name})
            for v in judge(sample):
                answer({"case": sample.name, "backend": v.backend, "status": v.status, "reason": v.reason})
            torch._dynamo.reset()
        answer({"done": name})


class Worker:
    """A process that judges one op after the other."""

    def __init__(self, options: argparse.Namespace):
        flags = ["--full"] if options.full else ["--samples", str(options.samples)]
        command = [sys.executable, __file__, "--worker", "--seed", str(options.seed), *flags]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._rest = b""
        self.ops = 0
        self.op: str | None = None
        self.case: str | None = None
        self.answered: set[str] = set()
        self.last = time.monotonic()

    def give(self, op: str) -> None:
        assert self.process.stdin is not None
        self.op, self.case, self.last = op, None, time.monotonic()
        self.ops += 1
        self.process.stdin.write(op.encode() + b"\n")
        self.process.stdin.flush()

    def messages(self) -> list[dict[str, Any]] | None:
        """What it wrote since the last call; None where it has ended."""
        assert self.process.stdout is not None
        data = os.read(self.process.stdout.fileno(), 2**16)
        self.last = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines] if data else None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def collect(names: list[str], options: argparse.Namespace) -> list[dict[str, str]]:
    """The verdicts of all ops."""
    waiting, finished, started = list(reversed(names)), 0, time.perf_counter()
    verdicts: list[dict[str, str]] = []
    workers: list[Worker] = []
    written = options.verdicts.open("w", encoding="utf-8") if options.verdicts else None

    def found(*new: dict[str, str]) -> None:
        verdicts.extend(new)
        if written is not None:
            written.write("".join(json.dumps(v) + "\n" for v in new))
            written.flush()

    def retire(worker: Worker) -> None:
        workers.remove(worker)
        worker.close()

    while waiting or workers:
        while waiting and len(workers) < options.jobs:
            workers.append(Worker(options))
        ready, _, _ = select.select([w.process.stdout for w in workers], [], [], 1.0)
        for w in list(workers):
            silent = w.process.stdout not in ready
            messages = [] if silent else w.messages()
            if messages is None or (silent and time.monotonic() - w.last > SECONDS):
                code = w.process.wait() if messages is None else 0
                found(*lost(w, f"the worker died ({code})" if messages is None else f"no answer in {SECONDS} s"))
                finished += 1
                retire(w)
                continue
            for message in messages:
                if "case" in message:
                    found(message)
                    w.answered.add(message["backend"])
                elif "start" in message:
                    w.case, w.answered = message["start"], set()
                else:
                    finished += "done" in message
                    if "done" in message and finished % 50 == 0:
                        print(f"{finished} of {len(names)} ops, {time.perf_counter() - started:.0f} s", flush=True)
                    if waiting and w.ops < RECYCLE:
                        w.give(waiting.pop())
                    else:
                        retire(w)
    return verdicts


def lost(worker: Worker, what: str) -> list[dict[str, str]]:
    """A sample that took its worker with it counts as a crash of the backends that had not answered."""
    case = worker.case or worker.op
    if case is None:
        raise RuntimeError(f"a worker failed at its start ({what})")
    return [
        {"case": case, "backend": b, "status": "crashed", "reason": what} for b in BACKENDS if b not in worker.answered
    ]


# -- results ------------------------------------------------------------------------------------------


def tally(verdicts: list[dict[str, str]]) -> Tally:
    """Failures by kind and reason; the notes count the kinds."""
    t = Tally()
    for v in verdicts:
        if v["status"] == "passed":
            t.passes()
        elif v["status"] == "skipped":
            t.skip(v["case"], v["reason"])
        else:
            t.fails(v["case"], f"{v['status']}: {v['reason']}")
    kinds = Counter(v["status"] for v in verdicts)
    judged = t.passed + t.failed
    t.notes = {k: kinds[k] for k in ("refused", "wrong", "crashed")}
    t.notes["share"] = round(t.passed / judged, 4) if judged else 0.0
    return t


def show(tallies: dict[str, Tally], count: int, seconds: float) -> None:
    for backend, t in tallies.items():
        judged = t.passed + t.failed
        kinds = ", ".join(f"{t.notes[k]} {k}" for k in ("refused", "wrong", "crashed"))
        print(
            f"{backend}: {t.passed} of {judged} pass ({t.notes['share']:.1%}), {kinds}; "
            f"{t.skipped} that torch does not export; {count} ops in {seconds:.0f} s"
        )
    for backend, t in tallies.items():
        for reason, cases in sorted(t.failures.items(), key=lambda item: (item[0][:4], -len(item[1]))):
            print(f"  {backend} {len(cases)} × {reason}: {', '.join(cases[:4])}{' …' if len(cases) > 4 else ''}")


if __name__ == "__main__":
    sys.exit(not main())
