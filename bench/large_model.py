"""Memory and seconds of starting a model of more than 2 GB on onnxruntime: `make bench-large`. Linux only.

A chain of products whose weights lie in a safetensors file. Each row is a process of its own: how long it took from the
graph to a session, the anonymous memory (which the system cannot drop) at the peak and afterwards, less that before,
and milliseconds of a run. The page cache is warm. "saved" rows are of `moec.load`, which digests every file first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROWS = (  # name, compile or load, memory, with a cache
    ("compile, fast", "compile", "fast", False),
    ("compile, mapped", "compile", "mapped", False),
    ("compile, cache empty", "compile", "fast", True),
    ("compile, from the cache", "compile", "fast", True),
    ("saved, fast", "load", "fast", False),
    ("saved, mapped", "load", "mapped", False),
    ("saved, from the cache", "load", "fast", True),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=34)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options)))
        return 0
    table = Table("", "seconds", "peak MB", "MB", "ms, 1 row", "ms, 64 rows", title_justify="left")
    with tempfile.TemporaryDirectory() as work:
        size = write(Path(work), options.width, options.layers)
        table.title = f"{options.layers} weights of {options.width}², {size / 1e9:.2f} GB; anonymous memory"
        for name, how, memory, cache in ROWS:
            if how == "load" and not (Path(work) / memory).exists():
                child(options, work, "save", memory, "")
            row = child(options, work, how, memory, str(Path(work) / "cache") if cache else "")
            print(name, row, file=sys.stderr)
            table.add_row(name, *(f"{row[k]:.2f}" if k == "seconds" else f"{row[k]:,.0f}" for k in row))
    Console(width=100, highlight=False).print(table)
    return 0


def child(options: argparse.Namespace, *one: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--width", str(options.width), "--layers", str(options.layers)]
    command += ["--runs", str(options.runs), "--one", *one]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def write(folder: Path, width: int, layers: int) -> int:
    """The weights' file; bytes of its weights."""
    import torch
    from safetensors.torch import save_file

    first = torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    save_file({f"w{i}": first.roll((i, 7 * i), (0, 1)) for i in range(layers)}, folder / "weights.safetensors")
    return layers * width * width * 4


def graph_of(folder: Path, width: int, layers: int) -> Any:
    from moec.ir import Builder, Dim, DType, Graph, TensorType
    from moec.ir.weight import SafetensorsSource, Weight

    graph = Graph("chain")
    x = graph.add_input("x", TensorType(DType.F32, (Dim("T"), width)))
    b = Builder(graph)
    for i in range(layers):
        source = SafetensorsSource(folder / "weights.safetensors", f"w{i}")
        w = graph.add_weight(Weight(f"w{i}", TensorType(DType.F32, (width, width)), source))
        x = b.silu(b.op("linear.linear", [x, w]))
    graph.add_output(x)
    return graph


class Anonymous(threading.Thread):
    """Watches how much memory of its own this process has, in MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.ended = 0.0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.005):
            self.peak = max(self.peak, self.now())

    @staticmethod
    def now() -> float:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon:"))


def measure(work: str, how: str, memory: str, cache: str, options: argparse.Namespace) -> dict[str, float]:
    import torch

    import moec
    import moec.backends.onnxruntime

    folder = Path(work)
    moec.compile(moec.parse(_TINY), backend="onnxruntime", threads=1)
    before, watch = Anonymous.now(), Anonymous()
    watch.start()
    began = time.perf_counter()
    if how == "load":
        compiled = moec.load(folder / memory, threads=1, cache=cache or None)
    else:
        graph = graph_of(folder, options.width, options.layers)
        compiled = moec.compile(graph, backend="onnxruntime", threads=1, memory=memory, cache=cache or None)
    seconds = time.perf_counter() - began
    watch.ended.set()
    watch.join()
    if how == "save":
        compiled.save(folder / memory)
        return {}
    now = Anonymous.now()
    for note in compiled.report.notes():
        print(note, file=sys.stderr)
    found = {"seconds": seconds, "peak": watch.peak - before, "now": now - before}
    for rows in (1, 64):
        x = torch.randn(rows, options.width)
        compiled(x)
        began = time.perf_counter()
        for _ in range(options.runs):
            compiled(x)
        found[f"ms {rows}"] = (time.perf_counter() - began) / options.runs * 1e3
    return found


_TINY = """
graph(%x: f32[T, 4]) -> (%y: f32[T, 4]) {
  %0: f32[T, 4] = math.silu(%x)
  return %0
}
"""


if __name__ == "__main__":
    sys.exit(main())
