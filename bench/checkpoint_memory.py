"""Memory of a compiled block-FP8 checkpoint against the bytes of its files: `make bench-checkpoints`. Linux only.

Each row is a process of its own: proportional set size after two runs less that before compiling, of a random
DeepSeek-V3 folder of some 190 MB (three shards, blocks of 128 × 128).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.frontend.test_fp8_checkpoints import LARGE, MEASURE, RESIDENT, write_random


def main() -> int:
    table = Table("backend", "memory", "MB", "of the files", "at most", title="block-FP8 checkpoint, resident",
                  title_justify="left")  # fmt: skip
    fits = True
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "it"
        write_random(folder.with_name("it-small"))
        size = write_random(folder, **LARGE)
        for backend, memory, most in RESIDENT:
            command = [sys.executable, "-c", MEASURE, str(folder), backend, memory, "None"]
            used = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            fits &= used <= most * size
            table.add_row(backend, memory, f"{used / 1e6:.0f}", f"{used / size:.2f}", f"{most:.1f}")
        table.caption = f"files: {size / 1e6:.0f} MB"
    Console(width=100).print(table)
    return int(not fits)


if __name__ == "__main__":
    sys.exit(main())
