"""The forms of grouped experts on one thread, each against what the cost model predicts: `make bench-experts`.

Layers of a shape follow each other until their weights do not fit into a cache. All forms run by turns in one process;
times are medians per layer. `chosen` is the form that `moec.compile` takes by itself, `lost` its time over the best
form's. Results are saved in build/bench-experts.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from cpu_peers import environment
from rich.console import Console
from rich.table import Table

import moec
from moec.backends import Executable, get_backend
from moec.backends.onnxruntime.options import EXPERTS
from moec.ir import Builder, Dim, Graph, TensorType, Weight
from moec.passes.pipeline import Pipeline
from moec.passes.quantize import QuantizeWeights
from moec.program import Settings, legalise

RESULT = Path(__file__).parent.parent / "build" / "bench-experts.json"
# experts, chosen, width (d), hidden (f)
SHAPES = (
    (64, 8, 1024, 512),
    (32, 4, 512, 256),
    (8, 2, 1024, 2048),
    (16, 4, 256, 64),
    (4, 2, 128, 128),
    (128, 8, 128, 64),
)
TOKENS = (1, 8, 64, 512)
FORMS = EXPERTS[1:]
BYTES = 128 << 20  # of weights, at least
MOST = 12  # layers
ROUNDS = 7


def graph(shape: tuple[int, int, int, int], layers: int) -> Graph:
    """x + experts(x), `layers` times."""
    num, k, d, f = shape
    g = Graph()
    x = g.add_input("x", TensorType("f32", (Dim("T"), d)))
    b = Builder(g)
    for i in range(layers):
        sizes = {"router": (num, d), "gate_up": (num, 2 * f, d), "down": (num, d, f)}
        router, *pair = (g.add_weight(Weight.of(f"{n}{i}", torch.randn(s) / s[-1] ** 0.5)) for n, s in sizes.items())
        x = b.add(x, b.experts(x, *b.route(b.linear(x, router), k=k), *pair))
    g.add_output(x)
    return g


def compiled(g: Graph, plan: str | None, **options: Any) -> Executable:
    backend = get_backend("onnxruntime")
    quantised = g if plan is None else QuantizeWeights(moec.Quantization.of(plan)).run(g)
    legal, _, _ = legalise(quantised, Settings(backend, Pipeline(())))
    return backend.compile(legal, threads=1, options=options)


def once(exe: Executable, x: torch.Tensor, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        exe.run([x])
    return (time.perf_counter() - start) / count


def measure(shape: tuple[int, int, int, int], plan: str | None) -> list[dict[str, Any]]:
    num, _, d, f = shape
    layers = max(1, min(MOST, BYTES // (num * 3 * d * f * 4)))
    g = graph(shape, layers)
    auto = compiled(g, plan).stats["experts"][0]
    forms = FORMS if plan is None else ("moe", "unrolled")
    runs, load = {}, {}
    for form in forms:
        start = time.perf_counter()
        runs[form] = compiled(g, plan, experts=form)
        load[form] = time.perf_counter() - start
    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens, d)
        spent: dict[str, list[float]] = {form: [] for form in forms}
        counts = {form: max(1, min(100, int(0.1 / once(exe, x, 1)))) for form, exe in runs.items()}
        for _ in range(ROUNDS):
            for form, exe in runs.items():
                spent[form].append(once(exe, x, counts[form]) / layers)
        ms = {form: statistics.median(times) * 1e3 for form, times in spent.items()}
        predicted = {form: auto["costs"][form]["ms"][tokens] for form in forms}
        rows.append({
            "shape": shape, "layers": layers, "quantize": plan, "tokens": tokens, "chosen": auto["form"], "ms": ms,
            "predicted": predicted, "load_seconds": load, "lost": ms[auto["form"]] / min(ms.values()),
        })  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="*", type=int, default=list(range(len(SHAPES))), help="which of SHAPES")
    parser.add_argument("--quantize", nargs="*", default=["none", "int8", "int4"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=150)
    console.print(environment() | {"threads": 1})
    results = []
    for index in args.shape:
        for plan in args.quantize:
            rows = measure(SHAPES[index], None if plan == "none" else plan)
            results += rows
            num, k, d, f = SHAPES[index]
            title = f"{num} experts, {k} a token, {d} × {f}, {plan}: ms a layer (predicted)"
            table = Table("tokens", *rows[0]["ms"], "chosen", "lost", title=title, title_justify="left")
            for r in rows:
                cells = [f"{ms:.3f} ({r['predicted'][form]:.3f})" for form, ms in r["ms"].items()]
                table.add_row(str(r["tokens"]), *cells, r["chosen"], f"{r['lost']:.2f}")
            console.print(table)
            RESULT.parent.mkdir(parents=True, exist_ok=True)
            RESULT.write_text(json.dumps({"environment": environment() | {"threads": 1}, "rows": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
