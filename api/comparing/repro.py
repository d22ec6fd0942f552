"""A folder that shows a divergence again: the node with its operands, and what was found."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from moec.backends import BACKENDS
from moec.comparing.result import Comparison, Divergence
from moec.graph_file import save_graph


def save(comparison: Comparison, divergence: Divergence, folder: Path) -> Path:
    """See `Comparison.save_repro`."""
    folder.mkdir(parents=True, exist_ok=True)
    if divergence.case is not None:
        graph, inputs = divergence.case
        save_graph(graph, folder / "node.ir", inputs, f"{divergence}\n{command(comparison, divergence, folder)}")
    (folder / "comparison.txt").write_text(f"{comparison}\n", "utf-8")
    (folder / "comparison.json").write_text(json.dumps(comparison.to_dict(), indent=1), "utf-8")
    return folder


def command(comparison: Comparison, divergence: Divergence, folder: Path) -> str:
    """The line that compares the node again."""
    path = str(folder / "node.ir")
    names = ["reference", divergence.backend]
    if all(n in BACKENDS for n in names):
        return f"moec compare {shlex.quote(path)} --backends {','.join(names)}"
    load = f"moec.compare(*moec.graph_file.load_graph({path!r}), "
    return load + f"backends=['reference', …])  # … is the {divergence.backend} of this run"
