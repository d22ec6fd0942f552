"""Peak memory of `moec.compare` against that of plain runs: `make bench-memory`.

Each measurement is a process of its own; its figure is the largest sum, over it and its children, of the proportional
set size (shared pages count once), sampled 20 times a second. Linux only.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

SCRIPT = """
import torch, moec
from moec import models

config = models.ModelConfig(
    vocab_size=8192, hidden_size=1024, num_layers=4, num_heads=16, num_kv_heads=4, head_dim=64, num_experts=16, top_k=4,
    moe_intermediate_size=768, intermediate_size=4096, first_k_dense=1, max_position=1024,
)
model = models.build(config)
ids = torch.arange(4 * 256).reshape(4, 256) % config.vocab_size
what = {what!r}
if what == "model":
    with torch.no_grad():
        model(ids)
elif what in ("reference", "onnxruntime"):
    moec.compile(model, (ids,), backend=what)(ids)
else:
    comparison = moec.compare(model, (ids,), isolated=what == "compare, isolated")
    assert comparison.ok, str(comparison)
"""


def main() -> None:
    figures = {what: measure(what) for what in ("model", "reference", "onnxruntime", "compare", "compare, isolated")}
    plain = max(figures["reference"], figures["onnxruntime"])
    table = Table("run", "peak MiB", "of the larger plain run", title="peak memory", title_justify="left")
    for what, peak in figures.items():
        table.add_row(what, f"{peak / 2**20:.0f}", f"{peak / plain:.2f}")
    Console().print(table)


def measure(what: str) -> int:
    """The largest memory of a run, in bytes."""
    process = subprocess.Popen([sys.executable, "-c", SCRIPT.format(what=what)])
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(_pss, _tree(process.pid))))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{what} failed")
    return peak


def _tree(pid: int) -> list[int]:
    found = [pid]
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += _tree(int(child))
    except OSError:  # it ended meanwhile
        pass
    return found


def _pss(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


if __name__ == "__main__":
    main()
