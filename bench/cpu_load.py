"""How compiling for onnxruntime scales with depth: DeepSeek-V3's layers in small sizes, 256 experts each.

See `make bench-load`. Each row is a process of its own on one thread; seconds are of CPU time, and the least of the
rounds counts. "×" is a row's seconds per layer over those of the row before, so linear is 1. Up to 2,048 experts in
all, each is a chain of MatMuls of its own; beyond, a layer's experts are one operator (`experts` says which).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

STEPS = ("passes", "lowering", "load")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", default="8,16,32,61", help="numbers of layers, in order")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--width", type=int, default=32, help="of an expert")
    parser.add_argument("--quantize", help="fp8 or fp8-weight-only")
    parser.add_argument("--memory", default="fast", help="fast, fp8 or mapped")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=15.0, help="most for a session to load")
    parser.add_argument("--bound", type=float, default=1.2, help="most growth of passes per layer, row over row")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options.one, options)))
        return 0
    rows = []
    for layers in map(int, options.layers.split(",")):
        tries = [_child(layers) for _ in range(options.rounds)]
        rows.append({k: min(t[k] for t in tries) if k != "by pass" else tries[0][k] for k in tries[0]})
    return show(rows, options.seconds, options.bound)


def _child(layers: int) -> dict[str, Any]:
    command = [sys.executable, *sys.argv, "--one", str(layers)]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def measure(layers: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each step for one model, and what it became."""
    import dataclasses
    import resource

    import torch

    import moec
    from moec.backends.onnxruntime.lower import lower
    from moec.backends.onnxruntime.options import Options
    from moec.backends.onnxruntime.session import start
    from moec.models import build, config
    from moec.passes import default_pipeline
    from moec.program import Settings, legalise

    experts, hidden, width = options.experts, options.hidden, options.width
    groups = 8 if experts % 8 == 0 else 1
    small = dataclasses.replace(
        config("deepseek-v3-mini"), num_layers=layers, hidden_size=hidden, moe_intermediate_size=width,
        intermediate_size=2 * hidden, num_experts=experts, top_k=min(8, experts), n_group=groups,
        topk_group=max(groups // 2, 1), num_heads=2, q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16, num_mtp_layers=0, first_k_dense=0,
    )  # fmt: skip
    model, ids = build(small), torch.zeros(2, 24, dtype=torch.int64)
    found: dict[str, Any] = {"layers": layers}
    clock = time.process_time

    began = clock()
    graph = moec.trace(model, (ids,), dynamic_shapes="auto")
    found["trace"] = clock() - began
    backend = moec.backends.get_backend("onnxruntime")
    settings = Settings(backend, default_pipeline(options.quantize), threads=1)

    began = clock()
    after, records = settings.pipeline.run(graph)
    legal, tuned, _ = legalise(after, settings)
    found["passes"] = clock() - began

    began, chosen = clock(), Options(memory=options.memory)
    lowered = lower(legal, chosen, backend)
    found["lowering"] = clock() - began

    began = clock()
    session = start(lowered, chosen, 1)
    found["load"] = clock() - began

    began = clock()
    session.run(legal, [ids], legal.outputs)
    found["first run"] = clock() - began
    return found | {
        "nodes": len(graph),
        "experts": ", ".join(k.removeprefix("experts.") for k in lowered.choices),
        "operators": sum(1 for _ in lowered.model.graph.all_nodes()),
        "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "by pass": {r.name: round(r.seconds, 3) for r in (*records, *tuned)},
    }


def show(rows: Sequence[dict[str, Any]], most: float, bound: float) -> int:
    """Print the table and what holds; 1 where something does not."""
    table = Table(title="experts by layers: CPU seconds, and × per layer over the row before", title_justify="left")
    for name in ("layers", "IR nodes", "ONNX nodes", "experts", "trace", *STEPS, "first run", "peak MiB"):
        table.add_column(name, justify="left" if name == "experts" else "right")
    before: dict[str, Any] | None = None
    growth: dict[str, list[float]] = {step: [] for step in STEPS}
    for row in rows:
        cells = []
        for step in STEPS:
            text = f"{row[step]:.2f}"
            # a load of other operators is no measure of how that of these grows
            if before is not None and (step == "passes" or before["experts"] == row["experts"]):
                ratio = row[step] / before[step] * before["layers"] / row["layers"]
                growth[step].append(ratio)
                text += f"  ×{ratio:.2f}"
            cells.append(text)
        counts = str(row["layers"]), f"{row['nodes']:,}", f"{row['operators']:,}", row["experts"]
        table.add_row(*counts, f"{row['trace']:.1f}", *cells, f"{row['first run']:.2f}", f"{row['peak MiB']:,.0f}")
        before = row
    Console(width=120, highlight=False).print(table)
    slowest = max(row["load"] for row in rows)
    loads, linear = slowest <= most, max(growth["passes"], default=0.0) <= bound
    print(f"slowest load {slowest:.1f} s, at most {most:g}: {'holds' if loads else 'MISSED'}")
    print(f"passes per layer, at most ×{bound:g} row over row: {'holds' if linear else 'MISSED'}")
    return int(not (loads and linear))


if __name__ == "__main__":
    sys.exit(main())
