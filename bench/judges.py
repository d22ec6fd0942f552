"""What outside judges said of each backend, in build/judges.json: suite → backend → passed, failed, skipped, failures.

    make judges         every suite, two samples per op of torch's database
    make judges-full    all samples

Each suite is a script of its own (bench/judge_*.py) that runs alone too and calls `record` per backend. Run by itself,
this file shows what they found; with --run or --full it runs them first. The exit code is 1 where one of them says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SUITES = ("onnx_node", "onnx_other", "op_db", "fuzz")
SCRIPTS = {
    "judge_onnx.py": ([], []),
    "judge_op_db.py": ([], ["--full"]),
    "judge_fuzz.py": (["--graphs", "1000"], ["--graphs", "5000"]),
}  # arguments of a short and of a full run
RESULTS = Path(__file__).resolve().parents[1] / "build" / "judges.json"


@dataclass
class Tally:
    """Counts of one suite on one backend. `failures` and `skips`: reason → names of the cases; `notes`: further
    figures, such as how many of the passed ran in native ops only and how many through `extern.*`."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: dict[str, list[str]] = field(default_factory=dict)
    skips: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def passes(self) -> None:
        self.passed += 1

    def fails(self, case: str, reason: str) -> None:
        self.failed += 1
        self.failures.setdefault(reason, []).append(case)

    def skip(self, case: str, reason: str) -> None:
        self.skipped += 1
        self.skips.setdefault(reason, []).append(case)


def record(suite: str, backend: str, tally: Tally) -> None:
    """Put one tally into build/judges.json; what other suites wrote there stays."""
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}, one of {', '.join(SUITES)}")
    found = load()
    found.setdefault(suite, {})[backend] = asdict(tally)
    RESULTS.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=RESULTS.parent, suffix=".json", delete=False, encoding="utf-8") as file:
        json.dump(found, file, indent=1)
    os.replace(file.name, RESULTS)


def load() -> dict[str, dict[str, Any]]:
    """What was recorded so far."""
    return json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}


def show() -> None:
    """The counts, and the failures by reason."""
    console = Console()
    table = Table(
        "suite", "backend", "passed", "failed", "skipped", "notes", title="outside judges", title_justify="left"
    )
    results = load()
    for suite in (s for s in SUITES if s in results):
        for backend, r in results[suite].items():
            notes = ", ".join(f"{k} {v}" for k, v in r["notes"].items() if isinstance(v, int | float | str))
            table.add_row(suite, backend, str(r["passed"]), str(r["failed"]), str(r["skipped"]), notes)
    console.print(table)
    for suite in (s for s in SUITES if s in results):
        for backend, r in results[suite].items():
            for reason, cases in sorted(r["failures"].items(), key=lambda item: -len(item[1])):
                shown = ", ".join(cases[:4]) + (" …" if len(cases) > 4 else "")
                console.print(f"{suite} {backend}: {len(cases)} × {reason}: {shown}", markup=False, highlight=False)


def run(full: bool) -> bool:
    """Every script in turn; whether all of them are content."""
    here = Path(__file__).resolve().parent
    content = True
    for script, (short, long) in SCRIPTS.items():
        start = time.perf_counter()
        code = subprocess.run([sys.executable, str(here / script), *(long if full else short)]).returncode
        print(f"{script}: exit code {code} after {time.perf_counter() - start:.0f} s", flush=True)
        content &= code == 0
    return content


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run every suite first")
    parser.add_argument("--full", action="store_true", help="run every suite first, with all samples")
    options = parser.parse_args()
    content = run(options.full) if options.run or options.full else True
    show()
    sys.exit(not content)
