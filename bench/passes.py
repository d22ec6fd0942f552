"""How the rewriting passes scale: a traced model's layers repeated to a number of nodes, all rules that ship applied.

See `make bench-passes`. The rewrite phase is what the engine does: matching and replacing, without verification,
which is timed beside it. Seconds are of CPU time; sizes alternate, and the least of the rounds counts.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moec import passes
from moec.ir import Graph, parse
from moec.ir.graph import copy_node
from moec.passes import Canonicalise, Pass, Rewrite, RuleSet, default_pipeline
from moec.passes.base import snake_case
from moec.passes.rewrite import limited

GRAPHS = Path(__file__).parent.parent / "tests" / "graphs"
VERIFY = "verification"


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--graph", default="deepseek_v3.sdpa.grouped.prefill", help="one of tests/graphs")
    parser.add_argument("--sizes", default="2500,5000,10000,20000", help="numbers of nodes, each twice the last")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bound", type=float, default=1.2, help="most growth per doubling beyond linear")
    options = parser.parse_args()
    source = parse((GRAPHS / f"{options.graph}.ir").read_text("utf-8"))
    graphs = {n: stacked(source, n) for n in map(int, options.sizes.split(","))}
    steps = [p for p in default_pipeline().passes if isinstance(p, Pass)]
    steps += opt_in(steps)
    rewriting = {p.name for p in steps if isinstance(p, Rewrite | RuleSet | Canonicalise)}
    best: dict[int, dict[str, float]] = {n: {} for n in graphs}
    applied: dict[int, int] = {}
    for _ in range(options.rounds):
        for n, graph in graphs.items():
            times, applied[n] = measure(graph, steps)
            for name, seconds in times.items():
                best[n][name] = min(seconds, best[n].get(name, seconds))
    sizes = {n: len(g) for n, g in graphs.items()}
    return show(options.graph, sizes, best, applied, rewriting, options.bound)


def stacked(source: Graph, nodes: int) -> Graph:
    """The graph with its decoder layers repeated until it has about `nodes` nodes; their weights are shared."""
    layers = [n for n in source.nodes if any(".layers." in f".{f.module}" for f in n.location.frames)]
    hidden = source.find("gather")[0].result  # the embedding
    last = [r for n in layers for r in n.results if r.type == hidden.type][-1]
    behind = set(layers)  # the layers, and what depends on them
    for node in source.nodes:
        if any(v is not None and v.producer in behind for v in node.operands):
            behind.add(node)
    before = [n for n in source.nodes if n not in behind]
    graph = Graph()
    mapping = {v: graph.add_input(str(v.name), v.type) for v in source.inputs}
    mapping |= {v: graph.add_weight(v.weight) for v in source.weights.values() if v.weight}
    for node in before:
        copy_node(node, graph, mapping)
    for _ in range(max(1, round((nodes - len(before)) / len(layers)))):
        for node in layers:
            copy_node(node, graph, mapping)
        mapping[hidden] = mapping[last]
    graph.add_output(mapping[last], "hidden")
    graph.verify()
    return graph


def opt_in(steps: Sequence[Pass]) -> list[Pass]:
    """The rules and rule sets that ship beside the default pipeline."""
    names = {p.name for p in steps}
    found = [getattr(passes, name) for name in passes.__all__]
    classes = [c for c in found if isinstance(c, type) and issubclass(c, Rewrite | RuleSet)]
    return [c() for c in classes if c not in (Rewrite, RuleSet) and snake_case(c.__name__) not in names]


def measure(graph: Graph, steps: Sequence[Pass]) -> tuple[dict[str, float], int]:
    """Seconds of each pass and of verifying all results; applications of rules."""
    times = {VERIFY: 0.0}
    applied = 0
    gc.collect()
    for p in steps:
        start = time.process_time()
        with limited() as log:
            graph = p.run(graph)
        times[p.name] = times.get(p.name, 0.0) + time.process_time() - start
        applied += len(log.applications)
        start = time.process_time()
        graph.verify()
        times[VERIFY] += time.process_time() - start
    return times, applied


def show(name: str, sizes: Mapping[int, int], best: Mapping[int, Mapping[str, float]], applied: Mapping[int, int],
         rewriting: set[str], bound: float) -> bool:  # fmt: skip
    """Print the table; whether every doubling of the rewrite phase stays within the bound."""
    wanted = list(sizes)
    table = Table(title=f"{name}: CPU seconds by nodes, growth over the column before", title_justify="left")
    table.add_column("pass")
    for n in wanted:
        table.add_column(f"{sizes[n]:,}", justify="right")
    phase = {n: sum(t for k, t in best[n].items() if k in rewriting) for n in wanted}
    other = {n: sum(t for k, t in best[n].items() if k not in rewriting | {VERIFY}) for n in wanted}
    rows = {k: {n: best[n][k] for n in wanted} for k in best[wanted[0]] if k in rewriting}
    rows |= {"[bold]rewrite phase[/bold]": phase, "other passes": other, VERIFY: {n: best[n][VERIFY] for n in wanted}}
    for row, values in rows.items():
        cells = [f"{values[wanted[0]]:.3f}"]
        cells += [f"{values[b]:.3f}  ×{values[b] / max(values[a], 1e-9):.2f}" for a, b in pairwise(wanted)]
        table.add_row(row, *cells)
    table.add_row("applications", *(f"{applied[n]:,}" for n in wanted))
    Console(width=120, highlight=False).print(table)
    growth = [(phase[b] / phase[a]) / (sizes[b] / sizes[a]) for a, b in pairwise(wanted)]
    ok = max(growth) <= bound
    shown = ", ".join(f"{g:.2f}" for g in growth)
    print(f"rewrite phase beyond linear, per doubling: {shown}; bound {bound}: {'holds' if ok else 'MISSED'}")
    return ok


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
