"""The CPU figures: `make bench-cpu`. Each pair of contenders runs by turns in a process of its own (cpu_pair.py).

python bench/cpu.py [--model NAME ...] [--peer NAME ...]

Writes build/bench-cpu.json; `--plot` also docs/bench-cpu.png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from cpu_floor import Machine, products
from cpu_models import MODELS, ROWS, ids
from cpu_pair import block, calls
from cpu_peers import CONTENDERS, FOLDER, THREADS, environment, ours
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RESULT = FOLDER.with_suffix(".json")
PLOT = HERE.parent / "docs" / "bench-cpu.png"
# (peer, quantize) and what is asked of each row, where something is
TARGETS: dict[tuple[str, str | None], tuple[float, ...]] = {
    ("onnx-export", None): (1.45, 1.35, 1.4, 1.3),
    ("eager", None): (4.5, 3.8, 2.0, 1.5),
    ("torch.compile", None): (4, 3.2, 1.9, 1.4),
    ("openvino", None): (1.8, 1.6, 1.4, 1.3),
    ("llama.cpp", None): (0, 0, 0, 0),
    ("onnx-export", "int8"): (2.0, 1.8, 1.2, 1.0),
    ("onnx-export", "int4"): (2.8, 2.4, 1.4, 1.0),
}
FLOOR = (0.6, 0.6, 0.7, 0.77)


def pair(model: str, peer: str, quantize: str | None) -> list[dict[str, Any]]:
    command = [sys.executable, str(HERE / "cpu_pair.py"), model, peer, *([quantize] if quantize else [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    notes = [line for line in done.stdout.splitlines() if line.startswith(f"{peer}:")]
    if done.returncode or notes:
        sys.stderr.write("\n".join(notes or done.stderr.splitlines()[-5:]) + "\n")
    return rows


def floor(model: str) -> list[dict[str, Any]]:
    """How near ours is to what the machine allows."""
    torch.set_num_threads(THREADS)
    import moec

    shapes = {"input_ids": {0: "B", 1: "S"}}
    compiled = moec.compile(MODELS[model](), (ids(2, 16),), dynamic_shapes=shapes, backend="onnxruntime",
                            threads=THREADS)  # fmt: skip
    run = ours(model)["moec"]
    found = []
    for row, size in ROWS.items():
        x = ids(*size)
        work = products(compiled, x)
        machine = Machine.measured(sum(p.bytes for p in work))
        least, own = machine.floor(work) * 1e3, min(block(run, x, calls(run, x)) for _ in range(3))
        found.append({
            "model": model, "peer": "floor", "quantize": None, "row": row, "ours_ms": own, "peer_ms": least,
            "ratio": least / own, "bytes": sum(p.bytes for p in work), "flops": sum(p.flops for p in work),
            "bandwidth": machine.bandwidth, "peak": machine.peak,
        })  # fmt: skip
    return found


def table(results: list[dict[str, Any]]) -> Table:
    shown = Table("model", "against", *ROWS, title="time of peer / our time (asked; lowest to highest block)",
                  title_justify="left")  # fmt: skip
    for model in MODELS:
        for peer, quantize in [*TARGETS, ("floor", None)]:
            rows = {r["row"]: r for r in results if (r["model"], r["peer"], r["quantize"]) == (model, peer, quantize)}
            if not rows:
                continue
            asked = FLOOR if peer == "floor" else TARGETS[peer, quantize]
            cells = [_cell(rows.get(row), need) for row, need in zip(ROWS, asked, strict=True)]
            title = "share of the floor" if peer == "floor" else CONTENDERS[peer].title
            shown.add_row(model, title + (f", ours {quantize}" if quantize else ""), *cells)
    return shown


def _cell(row: dict[str, Any] | None, asked: float) -> str:
    if row is None:
        return "not run"
    mark = "" if row["ratio"] >= asked else "[red]"
    spread = f"; {row['lowest']:.2f} to {row['highest']:.2f}" if "lowest" in row else ""
    return f"{mark}{row['ratio']:.2f} ({asked or 'none'}{spread})\n{row['ours_ms']:.2f} ms"


def plot(results: list[dict[str, Any]]) -> None:
    """Ratios as bars, one panel per model."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(MODELS), 1, figsize=(10, 7), sharex=True)
    for panel, model in zip(panels, MODELS, strict=True):
        kinds = [k for k in TARGETS if any((r["model"], r["peer"], r["quantize"]) == (model, *k) for r in results)]
        for i, (peer, quantize) in enumerate(kinds):
            rows = {r["row"]: r["ratio"] for r in results
                    if (r["model"], r["peer"], r["quantize"]) == (model, peer, quantize)}  # fmt: skip
            places = [j + i * 0.8 / len(kinds) for j in range(len(ROWS))]
            label = CONTENDERS[peer].title + (f", moec {quantize}" if quantize else "")
            bars = panel.bar(places, [rows.get(r, 0) for r in ROWS], 0.75 / len(kinds), label=label, align="edge")
            panel.bar_label(bars, fmt="%.1f", fontsize=7)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_title(f"{model}: time of the other / time of moec, {THREADS} threads", fontsize=10)
        panel.set_xticks([j + 0.4 for j in range(len(ROWS))], list(ROWS))
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--peer", nargs="*", default=["floor", *CONTENDERS], choices=["floor", *CONTENDERS])
    parser.add_argument("--quantize", nargs="*", default=["none", "int8", "int4"], choices=["none", "int8", "int4"])
    parser.add_argument("--plot", action="store_true")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    console = Console(width=150)
    for model in args.model:
        if "floor" in args.peer:
            results += floor(model)
        for peer, quantize in TARGETS:
            if peer in args.peer and (quantize or "none") in args.quantize:
                results += pair(model, peer, quantize)
                FOLDER.mkdir(parents=True, exist_ok=True)
                RESULT.write_text(json.dumps({"environment": environment(), "rows": results}, indent=1))
    console.print(environment())
    console.print(table(results))
    if args.plot:
        plot(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
