"""Integer weights on ONNX Runtime against f32, one thread: `make bench-integers`.

Of linear layers, eight in a row with weights of their own, and of one layer of experts in both forms. Every figure is
f32's time over the form's, of the fastest rounds (others may use the machine), in which all forms run by turns in one
process; f32's own time is in the first column, in µs per layer.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import moec
from moec.backends import Executable, get_backend
from moec.ir import Builder, Dim, Graph, TensorType, Weight
from moec.passes.pipeline import Pipeline
from moec.passes.quantize import QuantizeWeights
from moec.program import Settings, legalise

LINEARS = ((512, 512), (1024, 512), (1024, 1024))  # columns, rows of the weight
EXPERTS = ((16, 256, 64, 4), (64, 1024, 512, 8))  # experts, hidden, width of an expert, chosen
ROWS = (1, 8, 64, 128, 512)
DEPTH = 8
PLANS = {
    "int8": moec.Quantization("i8", None),
    "int8, 32": moec.Quantization("i8", None, (1, 32)),
    "int4": moec.Quantization("i4", None),
    "int4, 128": moec.Quantization("i4", None, (1, 128)),
}


def linears(k: int, n: int) -> Graph:
    """x through DEPTH layers k → n and back."""
    g = Graph()
    x = g.add_input("x", TensorType("f32", (Dim("T"), k)))
    for i in range(DEPTH):
        shape = (n, k) if i % 2 == 0 else (k, n)
        x = Builder(g).linear(x, g.add_weight(Weight.of(f"w{i}", torch.randn(shape) / shape[1] ** 0.5)))
    g.add_output(x)
    return g


def experts(num: int, d: int, f: int, k: int) -> Graph:
    g = Graph()
    x = g.add_input("x", TensorType("f32", (Dim("T"), d)))
    shapes = {"router": (num, d), "gate_up": (num, 2 * f, d), "down": (num, d, f)}
    router, gate_up, down = (g.add_weight(Weight.of(n, torch.randn(s) / s[-1] ** 0.5)) for n, s in shapes.items())
    b = Builder(g)
    routed = b.route(b.linear(x, router), k=k)
    g.add_output(b.op("moe.experts", [x, *routed, gate_up, down]))
    return g


def compiled(graph: Graph, plan: moec.Quantization | None, **options: Any) -> Executable:
    backend = get_backend("onnxruntime")
    quantised = graph if plan is None else QuantizeWeights(plan).run(graph)
    legal, _, _ = legalise(quantised, Settings(backend, Pipeline(())))
    return backend.compile(legal, threads=1, options=options)


def compare(title: str, forms: dict[str, Executable], width: int, rounds: int, layers: int) -> None:
    names = [n for n in forms if n != "f32"]
    table = Table("rows", "f32 µs", *names, title=title, title_justify="left")
    for rows in ROWS:
        spent: dict[str, list[float]] = {n: [] for n in forms}
        for i in range(rounds + 1):
            x = torch.randn(rows, width)
            for name, executable in forms.items():
                start = time.perf_counter()
                executable.run([x])
                if i:
                    spent[name].append(time.perf_counter() - start)
        best = {n: min(t) for n, t in spent.items()}
        shown = [f"{best['f32'] / best[n]:.2f}" for n in names]
        table.add_row(str(rows), f"{best['f32'] / layers * 1e6:.0f}", *shown)
    Console(width=170).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for k, n in LINEARS:
        graph = linears(k, n)
        forms = {"f32": compiled(graph, None)} | {name: compiled(graph, plan) for name, plan in PLANS.items()}
        compare(f"linear {k} → {n} and back", forms, k, options.rounds, DEPTH)
    for num, d, f, k in EXPERTS:
        graph = experts(num, d, f, k)
        forms = {"f32": compiled(graph, None)}
        for name, plan in PLANS.items():
            forms |= {f"{name} {how}": compiled(graph, plan, experts=how) for how in ("moe", "unrolled")}
        compare(f"{num} experts, {d} → {f} → {d}, {k} chosen", forms, d, options.rounds, 1)


if __name__ == "__main__":
    main()
